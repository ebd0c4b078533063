"""Data hyper-cleaning: learn a weight for each training example, so that false labels lose their influence.

    min_x  f(y*(x)) = mean over validation of CE_j(y*)
    y*(x) = argmin_y g(x, y) = mean over training of sigmoid(x_i) · CE_i(y) + l2 / 2 · ‖y‖²

Reference: Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", arXiv 1703.01785,
section 5.1.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import filesize
from rich.console import Console
from sklearn.metrics import roc_auc_score

import bilevax as bx
from benchmarks.data import Data, digits
from benchmarks.figure import draw
from benchmarks.loop import Carry, compiled, drive
from benchmarks.report import Run, table
from benchmarks.session import collect

TASK = "hyper_cleaning"
DATA = {"digits": digits}
SPLIT: dict[str, Any] = {"train": 1000, "validation": 300, "corruption": 0.5}
L2 = 1e-3
INNER_STEPS = 20
INNER = {"learning_rate": 0.5, "momentum": 0.9}
OUTER = {"learning_rate": 0.1}
QUICK_STEPS = 20
LARGEST_CHUNK = 10

COLUMNS = {
    "test_accuracy": ("test\nacc.", "{:.3f}".format),
    "auc": ("weight\nAUC", "{:.3f}".format),
    "outer_loss": ("outer\nloss", "{:.3f}".format),
    "inner_gradients": ("inner\ngrads", "{:,.0f}".format),
    "hessian_products": ("Hessian\nprods", "{:,.0f}".format),
    "cross_products": ("cross\nprods", "{:,.0f}".format),
    "seconds": ("run\n(s)", "{:.2f}".format),
    "compile_seconds": ("comp.\n(s)", "{:.1f}".format),
    "temp_bytes": ("temp.\nmemory", lambda number: filesize.decimal(round(number))),
}
CAPTION = (
    "corrupted: trained on all labels as given; clean: on the true ones only; validation: on the validation images\n"
    "alone. outer loss: on the validation images; weight AUC: of true against false labels.\n"
)


def logits(y: chex.ArrayTree, images: chex.Array) -> chex.Array:
    """Softmax regression: images [N, 64] -> [N, 10]."""
    return images @ y["weights"] + y["bias"][None]


def zeros() -> chex.ArrayTree:
    """The first y."""
    return {"weights": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}


def cross_entropy(y: chex.ArrayTree, batch: tuple) -> chex.Array:
    """The loss of each example, [N]."""
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(y, images), labels)


def inner_loss(x: chex.Array, y: chex.ArrayTree, batch: tuple) -> chex.Array:
    """g, the weighted training loss; x [N]."""
    return jnp.mean(jax.nn.sigmoid(x) * cross_entropy(y, batch)) + L2 / 2 * optax.tree.norm(y, squared=True)


def outer_loss(x: chex.Array, y: chex.ArrayTree, batch: tuple) -> chex.Array:
    """f, the validation loss."""
    return jnp.mean(cross_entropy(y, batch))


@jax.jit
def accuracy(y: chex.ArrayTree, images: chex.Array, labels: chex.Array) -> chex.Array:
    """Share of the images that are classified right; NaN if a logit is not finite."""
    outputs = logits(y, images)
    return jnp.where(jnp.isfinite(outputs).all(), jnp.mean(jnp.argmax(outputs, axis=1) == labels), jnp.nan)


def evaluate(data: Data, learns: bool, carry: Carry) -> dict[str, float | None]:
    """Test accuracy, and the AUC with which learnt weights tell true labels from false ones."""
    scores: dict[str, float | None] = {"test_accuracy": accuracy(carry.estimator.y, *data.test).item(), "auc": None}
    if learns:
        weights = np.asarray(jax.nn.sigmoid(carry.x))
        scores["auc"] = float(roc_auc_score(data.clean, weights)) if np.isfinite(weights).all() else float("nan")
    return scores


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      name: in lower case, also the name of its files.
      solver: `solver(**settings)` builds the inner solver.
      settings: what it is built with.
      weights: `weights(data) -> x`, the first outer variable [N].
      batch: `batch(data)`, what it trains and validates on.
      learns: whether the outer optimizer moves x.
    """

    name: str
    solver: Callable[..., bx.InnerSolver]
    settings: Mapping[str, Any]
    weights: Callable[[Data], chex.Array] = lambda data: jnp.zeros(data.clean.shape)
    batch: Callable[[Data], bx.Batch] = lambda data: data.batch
    learns: bool = True


reverse = functools.partial(bx.inner.reverse, inner_loss, optax.sgd(**INNER))
no_gradient = functools.partial(bx.inner.no_gradient, inner_loss, optax.sgd(**INNER))


def implicit(ihvp: Callable[..., bx.IHVP], **settings: Any) -> bx.InnerSolver:
    """Implicit differentiation with an inverse-Hessian-vector product of these settings."""
    return bx.inner.implicit(inner_loss, optax.sgd(**INNER), INNER_STEPS, ihvp(**settings))


def truncated(steps: int) -> bx.InnerSolver:
    """Differentiates through the last of the inner steps."""
    return bx.inner.chain(no_gradient(INNER_STEPS - steps), reverse(steps))


METHODS = (
    Row("identity", functools.partial(implicit, bx.ihvp.identity), {"scale": 0.5}),
    Row("neumann", functools.partial(implicit, bx.ihvp.neumann), {"steps": 10, "step_size": 0.5}),
    Row("cg", functools.partial(implicit, bx.ihvp.cg), {"maxiter": 5}),
    Row("truncated", truncated, {"steps": 5}),
    Row("reverse", reverse, {"steps": INNER_STEPS}),
)


# Plain training with fixed weights, for as many steps.
anchor = functools.partial(Row, solver=no_gradient, settings={"steps": INNER_STEPS}, learns=False)


# sigmoid(±30) is 1 or 0 in float32.
ANCHORS = (
    anchor("corrupted", weights=lambda data: jnp.full(data.clean.shape, 30.0)),
    anchor("clean", weights=lambda data: jnp.where(data.clean, 30.0, -30.0)),
    anchor(
        "validation",
        weights=lambda data: jnp.full(len(data.batch.outer[1]), 30.0),
        batch=lambda data: bx.Batch(data.batch.outer, data.batch.outer),
    ),
)


@dataclasses.dataclass(frozen=True)
class HyperCleaning:
    """Data hyper-cleaning: learn a weight for each training example, half of whose labels are redrawn at random."""

    data: Literal["digits"] = "digits"
    """Images: scikit-learn's embedded digits."""
    methods: tuple[str, ...] = tuple(method.name for method in METHODS)
    """Hypergradients to compare. The anchors (plain training on the corrupted labels, on the clean subset, and on the
    validation images) always run."""
    seeds: int = 1
    """How many seeds. Each has its own split, labels and keys; from 2 on, numbers are mean ± standard error."""
    seed: int = 0
    """The first seed."""
    outer_steps: int = 300
    """Outer steps of each run."""
    budget: float = 6.0
    """Seconds for each run, compilation apart. A run that has spent them stops early, and the output says where."""
    quick: bool = False
    """At most 20 outer steps, to see that everything runs."""
    results: Path = Path("results")
    """Folder of the results; files go to its subfolder hyper_cleaning."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        names = [method.name for method in METHODS]
        if not self.methods or not {*self.methods} <= {*names}:
            raise ValueError(
                f"methods must be some of {', '.join(names)}; got {' '.join(self.methods) or 'none'}. "
                f"Pass, say, --methods {names[0]}."
            )
        for name, least in (("seeds", 1), ("seed", 0), ("outer_steps", 1)):
            if (value := getattr(self, name)) < least:
                fix = f"--{name.replace('_', '-')} {least}"
                raise ValueError(f"{name} must be an int >= {least}; got {value}. Pass {fix} or more.")
        if not self.budget > 0:
            raise ValueError(f"budget must be a number of seconds > 0; got {self.budget:g}. Pass, say, --budget 6.")

    @property
    def steps(self) -> int:
        """Outer steps of each run."""
        return min(self.outer_steps, QUICK_STEPS) if self.quick else self.outer_steps

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        rows = [*ANCHORS, *(method for method in METHODS if method.name in self.methods)]
        anchors = [row.name for row in ANCHORS]
        seeds = range(self.seed, self.seed + self.seeds)
        plan = [(row.name, seed) for row in rows for seed in seeds]
        folder = self.results / TASK
        finished = collect(plan, self.steps, functools.partial(self._runs, rows, seeds), folder, console)
        if finished:
            several = f"seeds {seeds[0]} to {seeds[-1]}, mean ± standard error"
            which = several if self.seeds > 1 else f"seed {self.seed}"
            title = f"Data hyper-cleaning of {self.data}, {self.steps} outer steps, {which}"
            console.print(table(title, finished, COLUMNS, anchors))
            console.print(CAPTION, style="dim")
            for note in (note for run in finished for note in run.notes):
                console.print(note, style="yellow", soft_wrap=True)
            console.print(f"One JSON file for each run: {folder}", markup=False, soft_wrap=True)
        if any(run.method not in anchors and run.finite for run in finished):
            path = folder / f"{TASK}.png"
            draw(finished, anchors, self._load).savefig(path)
            console.print(f"Plot: {path}", markup=False, soft_wrap=True)
        return 0 if len(finished) == len(plan) else 130

    def _load(self, seed: int) -> Data:
        return DATA[self.data](seed, **SPLIT)

    def _runs(self, rows: Sequence[Row], seeds: Sequence[int], advance: Callable[[int], None]) -> Iterator[Run]:
        datasets = [self._load(seed) for seed in seeds]
        size = max(size for size in range(1, LARGEST_CHUNK + 1) if self.steps % size == 0)
        for row in rows:
            hypergrad = bx.hypergradient(outer_loss, row.solver(**row.settings))
            optimizer = optax.adam(**OUTER) if row.learns else optax.set_to_zero()
            program = compiled(hypergrad, optimizer, row.weights(datasets[0]), zeros(), row.batch(datasets[0]), size)
            for seed, data in zip(seeds, datasets, strict=True):
                carry = program.start(row.weights(data), zeros())
                keys = jax.random.split(jax.random.key(seed), (self.steps // size, size))
                scores = functools.partial(evaluate, data, row.learns)
                outcome = drive(program, carry, keys, row.batch(data), scores, self.budget, advance)
                yield Run(TASK, row.name, seed, self._configuration(row), outcome)

    def _configuration(self, row: Row) -> dict[str, Any]:
        return {
            "data": self.data,
            **SPLIT,
            "settings": dict(row.settings),
            "l2": L2,
            "inner_steps": INNER_STEPS,
            "inner_optimizer": {"sgd": INNER},
            "outer_optimizer": {"adam": OUTER} if row.learns else None,
            "outer_steps": self.steps,
            "budget": self.budget,
        }

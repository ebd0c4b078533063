"""Which blocks of curvature models get, and what those are worth: cosines to the exact hypergradient.

    g(x, y) = 1/N Σ_n σ(x_n) loss_n(y) + l2/2 ‖y‖²          f(x, y) = mean loss on examples that are not in g

The labels of g are false for three examples in ten, and x weighs them. y takes steps of Adam on g; then every
hypergradient is asked at that y, in float64. The exact one solves with the dense Hessian, to which all add the same
damping: as much as makes its least eigenvalue that of the option.
"""

import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from rich import box
from rich.console import Console
from rich.table import Table

import bilevax as bx
from benchmarks.harness.folder import prepared
from benchmarks.harness.loop import Outcome
from benchmarks.harness.report import Run
from benchmarks.harness.resuming import kept
from benchmarks.networks.small import CLASSES, MODELS, SHAPES, VOCABULARY, Small
from bilevax.typing import Array, Key

TASK = "curvature-models"
CAPTION = """\
Means ± standard errors over seeds. blocks: what kfac makes of the leaves of y. PCG-3: three products with the Hessian,
preconditioned by KFAC. smallest: the least eigenvalue of the Hessian, over all seeds.
"""


def drawn(key: Key, kind: str, n: int) -> tuple[Array, Array]:
    """Inputs and labels that a random linear map of them has chosen."""
    input_key, map_key = jax.random.split(key)
    shape = SHAPES[kind]
    if kind == "texts":
        inputs = jax.random.randint(input_key, (n, *shape), 0, VOCABULARY)
        features = jax.nn.one_hot(inputs, VOCABULARY).mean(1)
    else:
        inputs = features = jax.random.normal(input_key, (n, *shape))
    features = features.reshape(n, -1)
    scores = features @ jax.random.normal(map_key, (features.shape[1], CLASSES))
    return inputs, scores.argmax(1)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares hypergradients of small models of every kind with the exact one."""

    models: tuple[str, ...] = tuple(MODELS)
    """Which models."""
    examples: int = 48
    """Of g; as many of f."""
    steps: int = 1000
    """Of Adam on g before the hypergradients are asked."""
    l2: float = 1e-2
    """Weight decay in g."""
    damping: float = 1e-2
    """The least eigenvalue of the damped Hessian; where it has negative ones, more is added to every curvature."""
    seeds: int = 3
    """Draws of data and first y."""
    quick: bool = False
    """One seed and few steps, to see that everything runs."""
    results: Path = Path("results")
    """Folder of the results; files go to its subfolder curvature-models, or curvature-models-quick."""
    checkpoint: Path | None = None
    """Folder in which the command keeps what is done, so that the same command goes on where it was killed."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        for name in ("examples", "seeds"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be an int >= 1; got {value}. Pass, say, --{name} 3.")
        if unknown := [name for name in self.models if name not in MODELS]:
            raise ValueError(f"models must be some of {sorted(MODELS)}; got {unknown}. Leave the option out for all.")

    def run(self) -> int:
        """Measures every model, prints the table and writes the files; returns the exit code."""
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        folder, work = prepared(self, TASK, console), kept(self)
        with jax.enable_x64(True):
            found = {name: work.once(name, functools.partial(self._found, MODELS[name])) for name in self.models}
        console.print(self._table(found))
        console.print(CAPTION, style="dim", soft_wrap=True, markup=False)
        for name, (size, blocks, metrics) in found.items():
            for seed in range(len(metrics["kfac"])):
                own = {metric: float(values[seed]) for metric, values in metrics.items()}
                chosen = {"model": name, "weights": size, "blocks": blocks, "damping": self.damping, "l2": self.l2}
                Run(TASK, name.replace(",", "").replace(" ", "-"), seed, chosen, Outcome((), own, {})).write(folder)
        console.print(f"JSON files: {folder.words}", markup=False, soft_wrap=True)
        return 0

    def _found(self, small: Small) -> tuple[int, str, dict[str, np.ndarray]]:
        """Of a model: how many weights, which blocks, and for each seed the cosines."""
        return *self._blocks(small), self._cosines(small)

    def _loss(self, model: Any) -> bx.curvature.ModelLoss:
        return bx.curvature.ModelLoss(
            model,
            bx.curvature.softmax_cross_entropy,
            lambda x, batch: batch,
            weights=lambda x, batch: jax.nn.sigmoid(x),
            l2=self.l2,
        )

    def _blocks(self, small: Small) -> tuple[int, str]:
        """How many weights a model has, and its blocks, counted by rule."""
        model, y = small.make(jax.random.key(0))
        batch = drawn(jax.random.key(0), small.inputs, self.examples)
        report = bx.curvature.describe(self._loss(model), jnp.zeros(self.examples), y, batch)
        rules = Counter(row.rule for row in report.rows)
        listed = ", ".join(rule if count == 1 else f"{count} {rule}" for rule, count in rules.items())
        return sum(leaf.size for leaf in jax.tree.leaves(y)), listed

    def _cosines(self, small: Small) -> dict[str, np.ndarray]:
        """For each seed the cosines of the hypergradients to the exact one, and the smallest eigenvalue."""
        seeds = 1 if self.quick else self.seeds
        keys = jax.random.split(jax.random.key(0), seeds)
        measure = jax.jit(functools.partial(self._one, small))
        return {name: np.stack(values) for name, values in _columns([measure(key) for key in keys])}

    def _one(self, small: Small, key: Key) -> dict[str, Array]:
        keys = jax.random.split(key, 5)
        model, y = small.make(keys[0])
        inputs, labels = drawn(keys[1], small.inputs, 2 * self.examples)
        noise = jax.random.bernoulli(keys[2], 0.3, (self.examples,))
        false = jnp.where(noise, jax.random.randint(keys[3], (self.examples,), 0, CLASSES), labels[: self.examples])
        train, held = (inputs[: self.examples], false), (inputs[self.examples :], labels[self.examples :])
        loss, x = self._loss(model), jnp.zeros(self.examples)

        def outer(y: Any) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(y, held[0]), held[1]).mean()

        y = descended(loss, x, y, train, 50 if self.quick else self.steps)
        point = (x, y, train)
        flat, unravel = ravel_pytree(y)
        eigenvalues, vectors = jnp.linalg.eigh(jax.hessian(lambda flat: loss(x, unravel(flat), train))(flat))
        damping = self.damping + jnp.maximum(0, -eigenvalues[0])
        inverse, _ = bx.ihvp.kfac(damping=damping, fisher=bx.curvature.fisher.exact).prepare(keys[4], (), loss, point)
        kfac = bx.problem.IHVP(lambda *given: (), lambda key, state, loss, point: (inverse, state), spd=True)
        ihvps = {
            "identity": bx.ihvp.identity(),
            "kfac": kfac,  # measured once, for itself and as a preconditioner
            "pcg": bx.ihvp.cg(maxiter=3, tol=0.0, damping=damping, preconditioner=kfac),
        }
        b = jax.grad(outer)(y)
        vs = {"exact": unravel(vectors @ (vectors.T @ ravel_pytree(b)[0] / (eigenvalues + damping)))}
        for name, ihvp in ihvps.items():
            apply, _ = ihvp.prepare(keys[4], (), loss, point)
            vs[name], _ = apply(b)
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *vs.values())
        grads = dict(zip(vs, jax.vmap(bx.curvature.cross(loss, x, y, train))(together), strict=True))
        cosines = {name: optax.losses.cosine_similarity(grad, grads["exact"]) for name, grad in grads.items()}
        return cosines | {"smallest": eigenvalues[0]}

    def _table(self, found: dict[str, tuple[int, str, dict[str, np.ndarray]]]) -> Table:
        title = f"Cosine to the exact hypergradient, l2 = {self.l2:g}, damping {self.damping:g}"
        view = Table(title=title, box=box.HORIZONTALS, padding=(0, 1, 0, 0), show_edge=False)
        for header in ("model", "weights", "blocks", "identity", "KFAC", "PCG-3", "smallest"):
            view.add_column(header, justify="left" if header in ("model", "blocks") else "right")
        for name, (size, blocks, metrics) in found.items():
            cosines = [_mean(metrics[metric]) for metric in ("identity", "kfac", "pcg")]
            view.add_row(name, f"{size:,}", blocks, *cosines, f"{metrics['smallest'].min():.1g}")
        return view


def descended(loss: bx.curvature.ModelLoss, x: Array, y: Any, batch: Any, steps: int) -> Any:
    """Y after so many steps of Adam on all data, whose size falls to 0."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, steps))

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        y, state = carry
        updates, state = optimizer.update(jax.grad(loss, argnums=1)(x, y, batch), state)
        return (optax.apply_updates(y, updates), state), None

    return jax.lax.scan(step, (y, optimizer.init(y)), None, steps)[0][0]


def _columns(rows: list[dict[str, Array]]) -> Iterator[tuple[str, list[np.ndarray]]]:
    return ((name, [np.asarray(row[name]) for row in rows]) for name in rows[0])


def _mean(values: np.ndarray) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}"

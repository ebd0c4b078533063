"""Layer rates: learn the rate and the decay of AdamW for each layer, while a network with BatchNorm and Dropout trains.

    min_x  F(x) = f(y_T(x))          f(y) = mean over validation of CE_i(y), in evaluation mode
    y_t = y_{t−1} + AdamW(∇_y g(y_{t−1}, batch_t)),  t = 1..T        rate exp(x_rate) s(t), decay exp(x_decay), by layer

s(t) is a warmup and a cosine over the whole training, the batches are those of reshuffled epochs, and g is the cross
entropy in training mode, which also moves the statistics of BatchNorm. There is one training: the network, its
statistics, the moments of AdamW and the count of the schedule go on from one outer step to the next, and x moves while
they do. So an outer step is worth as many steps of training as any others, and all rows make equally many.

What is compared is what one would do otherwise: train with the first x; the same on the validation images too, which
have no other use then; the best of a grid of rates, common to all layers, by the validation loss of whole trainings.

A horizon of few steps sees of a rate what it does within them, which is to lower the loss now: it favours low rates
where the noise of the gradients is what holds the loss up, and it hardly sees what a decay is for. The rates that come
out are good for the training that they were learnt in, and are not the best constants.

Reference: Franceschi et al., arXiv 1703.01785 (real-time hyperparameter optimization); Wu et al., arXiv 1803.02021 (the
bias of short horizons); Loshchilov and Hutter, arXiv 1711.05101 (AdamW).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx
from matplotlib.figure import Figure

import bilevax as bx
from benchmarks.data.images import Data, load
from benchmarks.harness.grid import choice
from benchmarks.harness.loop import Carry
from benchmarks.harness.report import COSTS, Run
from benchmarks.harness.runner import Common, Method, Task, outer_loops, perform
from benchmarks.harness.style import STYLE, curves
from benchmarks.networks.normalized import Normalized
from benchmarks.tasks.methods import Shared
from bilevax.typing import Array, Key, PyTree, Scalar

TASK = "layer-rates"
SPLIT = {"train": 4000, "validation": 1000}
BATCH = 50
STEPS = 10  # of an outer step
OUTER_STEPS = 40
OUTER_RATE = 0.2
RATE, DECAY = 1e-3, 1e-4  # the first x, and what "untuned" means
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LAYERS = ("first", "first_norm", "second", "second_norm", "head")

COLUMNS = {
    "validation_loss": ("valid.\nloss", "{:.3f}".format),
    "test_loss": ("test\nloss", "{:.3f}".format),
    "test_accuracy": ("test\naccuracy", "{:.4f}".format),
    **{name: column for name, column in COSTS.items() if not name.endswith("products")},
}
CAPTION = f"""\
All rows make equally many steps of training, from the same weights. untuned: rate {RATE:g}, decay {DECAY:g};
untuned-all: the same on training and validation images; grid: the best of the rates
{", ".join(f"{rate:g}" for rate in GRID)} by the validation loss, whose other trainings are not counted;
reverse: starts as untuned, and x moves every {STEPS} steps.
"""


class Problem(NamedTuple):
    """What is trained.

    Attributes:
      inner_loss: g with what is carried next, the cross entropy of a batch (images, labels), dropout key.
      outer_loss: f.
      optimizer: x -> AdamW.
      start: `start(seed) -> y`, weights and statistics.
      logits: `logits(y, images)` in evaluation mode.
    """

    inner_loss: Callable[..., Any]
    outer_loss: Callable[..., Array]
    optimizer: Callable[[PyTree], optax.GradientTransformation]
    start: Callable[[int], bx.inner.Carried]
    logits: Callable[[bx.inner.Carried, Array], Array]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Its mean."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def layer_of(path: Any, leaf: Any) -> str:
    """The layer of a weight."""
    return path[0].key


def make_problem(side: int, steps: int) -> Problem:
    """The network for images of this side, and its training in so many steps."""
    graph, *_ = nnx.split(Normalized(side, nnx.Rngs(0)), nnx.Param, ...)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 10, 1), steps)

    def merged(y: bx.inner.Carried) -> Normalized:
        return nnx.merge(graph, y.params, y.carried, copy=True)

    def inner_loss(x: PyTree, y: bx.inner.Carried, batch: Any) -> tuple[Array, PyTree]:
        (images, labels), key = batch
        model = merged(y)
        model.train()
        loss = cross_entropy(model(images, nnx.Rngs(dropout=key)), labels)
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    def logits(y: bx.inner.Carried, images: Array) -> Array:
        model = merged(y)
        model.eval()
        return model(images)

    def outer_loss(x: PyTree, y: bx.inner.Carried, batch: Any) -> Array:
        return cross_entropy(logits(y, batch[0]), batch[1])

    def optimizer(x: PyTree) -> optax.GradientTransformation:
        def adamw(layer: str) -> optax.GradientTransformation:
            rate, decay = jnp.exp(x["rate"][layer]), jnp.exp(x["decay"][layer])
            return optax.adamw(lambda t: rate * schedule(t), weight_decay=decay)

        labels = functools.partial(jax.tree_util.tree_map_with_path, layer_of)
        return optax.partition({layer: adamw(layer) for layer in LAYERS}, labels)

    def start(seed: int) -> bx.inner.Carried:
        return bx.inner.Carried(*nnx.split(Normalized(side, nnx.Rngs(seed)), nnx.Param, ...)[1:])

    return Problem(inner_loss, outer_loss, optimizer, start, logits)


def first_x(rate: float = RATE) -> PyTree:
    """One rate and the usual decay for all layers, as logarithms."""
    return {
        name: dict.fromkeys(LAYERS, jnp.log(jnp.asarray(value, jnp.float32)))
        for name, value in {"rate": rate, "decay": DECAY}.items()
    }


EPOCHS = bx.sampling.epochs(BATCH)


def sample(key: Key | None, t: Scalar, data: Any) -> Any:
    """Rows of an epoch, and a key for the dropout of this step."""
    return EPOCHS(key, t, data), key


def reverse(problem: Problem) -> bx.problem.InnerSolver:
    """Differentiates all steps of an outer step."""
    return bx.inner.reverse(problem.inner_loss, problem.optimizer, STEPS, sample=sample)


def no_gradient(problem: Problem) -> bx.problem.InnerSolver:
    """Trains, and differentiates nothing."""
    return bx.inner.no_gradient(problem.inner_loss, problem.optimizer, STEPS, sample=sample)


def everything(data: Data) -> bx.Batch:
    """The batch of who has no other use for the validation images than to train on them."""
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), data.batch.inner, data.batch.outer)
    return data.batch._replace(inner=both)


def measure(problem: Problem) -> Callable[[Data, Carry], dict[str, float | None]]:
    """Numbers for the table, of the network as it is."""

    @jax.jit
    def measured(y: bx.inner.Carried, validation: Any, test: Any) -> dict[str, Array]:
        guesses = problem.logits(y, test[0])
        return {
            "validation_loss": cross_entropy(problem.logits(y, validation[0]), validation[1]),
            "test_loss": cross_entropy(guesses, test[1]),
            "test_accuracy": jnp.mean(guesses.argmax(axis=-1) == test[1]),
        }

    def evaluate(data: Data, carry: Carry) -> dict[str, float | None]:
        found = measured(carry.estimator.y, data.batch.outer, data.test)
        return {name: value.item() for name, value in found.items()}

    return evaluate


def by_grid(problem: Problem, outer_steps: int) -> Callable[[Data], PyTree]:
    """The rate for all layers with which a whole training ends at the lowest validation loss."""
    hypergrad = bx.hypergradient(problem.outer_loss, no_gradient(problem))

    @jax.jit
    def final(x: PyTree, y: bx.inner.Carried, batch: bx.Batch, keys: Key) -> Array:
        def step(state: Any, key: Key) -> tuple[Any, Array]:
            _, state, info = hypergrad.estimate(key, state, x, batch)
            return state, info.outer_loss

        return jax.lax.scan(step, hypergrad.init(x, y), keys)[1][-1]

    found: dict[int, PyTree] = {}

    def best(data: Data) -> PyTree:
        if data.seed not in found:
            keys = jax.random.split(jax.random.key(data.seed), outer_steps)
            losses = [final(first_x(rate), problem.start(data.seed), data.batch, keys).item() for rate in GRID]
            found[data.seed] = first_x(GRID[int(np.nanargmin(losses))])
        return found[data.seed]

    return best


def told(runs: Sequence[Run]) -> list[Run]:
    """The same runs; those of the grid with their choice, and whether it is at an end."""

    def one(run: Run) -> Run:
        rate = min(GRID, key=lambda rate: abs(np.log(rate) - float(run.outcome.x["rate"]["head"])))
        return dataclasses.replace(run, configuration={**run.configuration, **choice({"rate": GRID}, {"rate": rate})})

    return [one(run) if run.method == "grid" else run for run in runs]


ANCHORS = ("untuned", "untuned-all", "grid")
ROWS = {"reverse": reverse}


def draw(runs: Sequence[Run]) -> Figure:
    """Test loss and accuracy against outer steps, and the last rates of the first seed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
        losses, accuracies, rates = figure.subplots(1, 3)
        curves(losses, runs, [*ANCHORS], "test_loss", "outer_step")
        curves(accuracies, runs, [*ANCHORS], "test_accuracy", "outer_step")
        losses.set(xlabel=f"outer step, {STEPS} steps of training", ylabel="test loss")
        accuracies.set(xlabel=f"outer step, {STEPS} steps of training", ylabel="test accuracy")
        figure.legend(*losses.get_legend_handles_labels(), loc="outside upper center", ncols=5)
        first = next(run for run in runs if run.method in ROWS)
        for name in ("rate", "decay"):
            rates.plot(LAYERS, [np.exp(first.outcome.x[name][layer]) for layer in LAYERS], "o-", label=name)
        rates.set(yscale="log", ylabel=f"at the end, seed {first.seed}")
        rates.tick_params("x", rotation=30)
        rates.legend()
    return figure


DEFAULTS = Common(tuple(ROWS), budget=600.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Layer rates: AdamW's rate and decay for each layer of a network with BatchNorm and Dropout, on Fashion-MNIST.

    The anchors always run: training without tuning, on the validation images too, and with the best rate of a grid.
    """

    side: int = 28
    """Of the images: 28, or a divisor of it (14, 7), for which they are reduced."""
    common: tyro.conf.OmitArgPrefixes[Common] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if self.side not in (28, 14, 7):
            raise ValueError(f"side must be 28, 14 or 7; got {self.side}. Pass --side 14.")
        self.common.check_methods([*ROWS])

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        steps = self.common.steps(OUTER_STEPS)
        methods = self._methods(steps)
        read = functools.partial(load, "fashion-mnist", corruption=0.0, times=28 // self.side, **SPLIT)
        task = Task(
            title=f"Rates and decays of {len(LAYERS)} layers on {sum(SPLIT.values()):,} images of Fashion-MNIST",
            folder=TASK,
            outer_steps=steps,
            methods=[method.name for method in methods],
            anchors=ANCHORS,
            runs=functools.partial(outer_loops, TASK, methods, read, steps, self.common),
            columns=COLUMNS,
            caption=CAPTION,
            draw=draw,
            settle=told,
        )
        return perform(task, self.common, self)

    def _methods(self, steps: int) -> list[Method]:
        problem = make_problem(self.side, steps * STEPS)

        def start(x: Callable[[Data], PyTree]) -> Callable[[Data], tuple[PyTree, PyTree]]:
            return lambda data: (x(data), problem.start(data.seed))

        shared = Shared(
            outer_loss=problem.outer_loss,
            optimizer=optax.adam(OUTER_RATE),
            start=start(lambda data: first_x()),
            evaluate=measure(problem),
            configuration={
                **{"side": self.side, **SPLIT, "inner_steps": STEPS, "batch": BATCH},
                **{"first_rate": RATE, "first_decay": DECAY, "outer_optimizer": {"adam": OUTER_RATE}},
            },
        )
        anchors = {
            "untuned": shared.fixed(),
            "untuned-all": shared.fixed(batch=everything),
            "grid": shared.fixed(start=start(by_grid(problem, steps))),
        }
        return [
            *(anchor.method(name, no_gradient, problem, {}) for name, anchor in anchors.items()),
            *(shared.method(name, ROWS[name], problem, {}) for name in ROWS if name in self.common.methods),
        ]

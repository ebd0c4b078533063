"""Data condensation: learn the few images themselves on which a new network, trained for T steps, learns to classify.

    min_x  F(x) = E f(y_T(x))          f(y) = mean over real images of CE_i(y)          0 ≤ x ≤ 1, for every pixel
    y_T(x) = T steps of SGD from a fresh random network y_0 on
    g(x, y) = mean over the learnt images of CE_j(y) + l2 / 2 · ‖y‖²

x are all pixels of a few images for each class, whose labels are fixed. Each outer step draws a network and some real
images, the same ones for all methods of a seed. T steps do not solve the inner problem: a method that takes y_T for a
minimum, or looks at the last steps only, follows another direction than that of F.

Reference: Wang et al., "Dataset distillation", arXiv 1811.10959; Shen et al., "Memory-efficient gradient unrolling for
large-scale bi-level optimization", arXiv 2406.14095, with larger networks and longer runs.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import bilevax as bx
from benchmarks.data.images import IMAGES, Data, ImageName, load
from benchmarks.harness.grid import choice
from benchmarks.harness.loop import Carry
from benchmarks.harness.plugin import restarted
from benchmarks.harness.report import COSTS, Run
from benchmarks.harness.runner import Method, Options, Task, outer_loops, perform
from benchmarks.networks.dense import perceptron, random_layers
from benchmarks.networks.model import Model, hits, mean_cross_entropy
from benchmarks.tasks.condensation_figure import chosen, draw
from benchmarks.tasks.condensation_methods import ROWS, Row, Training, foreign, no_gradient
from benchmarks.tasks.estimators import MOMENTUM
from benchmarks.tasks.methods import Shared, first_weights
from bilevax.typing import Array, Key, PyTree

TASK = "condensation"
CLASSES = 10
L2 = 1e-4
HIDDEN = 64
WIDTH, QUICK_WIDTH = 128, 16  # of the convolutional network
QUICK_INNER_STEPS = 20  # at most
NETWORKS = 10  # fresh ones, in each evaluation
AT_ONCE = 500  # images that an evaluation classifies at once


class CondensationSetting(NamedTuple):
    """What suits a data set.

    Attributes:
      split: real images to learn from, and others to choose a rate with; tests are on the rest, or on a test set.
      outer_steps: of each run.
      minibatch: real images that an outer step draws.
    """

    split: Mapping[str, int]
    outer_steps: int
    minibatch: int


SMALL = CondensationSetting({"train": 1000, "validation": 200}, 1000, 256)
LARGE = CondensationSetting({"train": 45_000, "validation": 5000}, 10_000, 512)
QUICK_SPLIT = {"train": 1000, "validation": 200, "test": 500}
INNER_RATES = {"mlp": 0.1, "cnn": 0.01}

COLUMNS = {
    "validation_accuracy": ("valid.\naccuracy", "{:.3f}".format),
    "test_accuracy": ("test\naccuracy", "{:.3f}".format),
    "inner_steps": ("T", "{:.0f}".format),
    "outer_loss": ("outer\nloss", "{:.3f}".format),
    **{name: column for name, column in COSTS.items() if name != "cross_products"},
}
CAPTION = """\
random: real images of each class; means: of all real images of each class. Accuracies: mean over ten fresh networks,
trained on the images for T steps each. A name ends in T and in the rate of Adam where several are compared; all methods
have the same rates. The plot shows, for each T, that rate of each whose mean validation accuracy is highest.
"""


def training(model: Model, rate: float, steps: int, directions: int, chunk: int | None = None) -> Training:
    """SGD on the learnt images x, its rate falling to 0 along a cosine; what g takes as its batch are their labels."""

    def split(x: Array, labels: Array) -> tuple[Array, Array]:
        return x, labels

    loss = bx.curvature.ModelLoss(model.logits, bx.curvature.softmax_cross_entropy, split, l2=L2)
    return Training(loss, optax.sgd(optax.cosine_decay_schedule(rate, steps), MOMENTUM), steps, rate, directions, chunk)


def renewed(hypergrad: bx.problem.Hypergradient, model: Model, minibatch: int) -> bx.problem.Hypergradient:
    """The hypergradient from a fresh network and on some of the real images, both drawn with the key."""

    def estimate(key: Key | None, state: Any, x: Array, batch: bx.Batch) -> tuple:
        network_key, outer_key, key = jax.random.split(bx.sampling.needed(key, "a fresh network"), 3)
        state = restarted(state, model.init(network_key, x.shape[1]))
        outer = bx.sampling.minibatch(minibatch)(outer_key, 0, batch.outer)
        return hypergrad.estimate(key, state, x, bx.Batch(outer, batch.inner))

    return bx.problem.Hypergradient(hypergrad.init, estimate)


def within_range(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, followed by a projection on pixels in [0, 1]."""
    clip = optax.stateless(lambda updates, x: jnp.clip(x + updates, 0, 1) - x)
    return optax.chain(optimizer, clip)


def labels(images: int) -> Array:
    """Of the learnt images, so many for each class, class by class."""
    return jnp.repeat(jnp.arange(CLASSES), images)


def uniform(images: int, data: Data) -> Array:
    """Pixels drawn from [0, 1], the start of all methods."""
    shape = (CLASSES * images, data.batch.inner[0].shape[1])
    return jax.random.uniform(jax.random.fold_in(jax.random.key(data.seed), 0), shape)


def parts(images: int, data: Data) -> list[np.ndarray]:
    """The real images of each class in random order, in as many parts as there are images to learn, class by class."""
    pixels, classes = (np.asarray(part) for part in data.batch.inner)
    rarest = np.bincount(classes, minlength=CLASSES).min()
    if rarest < images:
        raise ValueError(
            f"ipc must not exceed the number of real images of any class; got {images}, the rarest has {rarest}. "
            f"Pass, say, --ipc 10."
        )
    order = np.random.default_rng(data.seed).permutation(len(classes))
    groups = (np.array_split(order[classes[order] == label], images) for label in range(CLASSES))
    return [pixels[group] for group in itertools.chain.from_iterable(groups)]


def random(images: int, data: Data) -> Array:
    """Real images of each class."""
    return jnp.stack([part[0] for part in parts(images, data)])


def means(images: int, data: Data) -> Array:
    """The mean of the real images of each class; of several parts of them, where there are several to learn."""
    return jnp.stack([part.mean(axis=0) for part in parts(images, data)])


ANCHORS = {"random": random, "means": means}


def evaluation(model: Model, training: Training) -> Callable[[Data, Carry], dict[str, float | None]]:
    """A function (data, carry) -> accuracies of fresh networks trained on the images in the carry, mean over them."""
    solve = bx.differentiable(no_gradient(training))

    def right(y: PyTree, image: tuple) -> Array:
        return hits(model, y, *(part[None] for part in image))[0]

    def measured(x: Array, real: dict[str, tuple], key: Key) -> dict[str, Array]:
        y = solve(x, model.init(key, x.shape[1]), labels(len(x) // CLASSES))
        found = {
            name: jax.lax.map(functools.partial(right, y), images, batch_size=AT_ONCE) for name, images in real.items()
        }
        return {f"{name}_accuracy": each.mean() for name, each in found.items()}

    @jax.jit
    def accuracies(key: Key, x: Array, real: dict[str, tuple]) -> dict[str, Array]:
        shares = jax.lax.map(functools.partial(measured, x, real), jax.random.split(key, NETWORKS))
        return jax.tree.map(jnp.mean, shares)

    def evaluate(data: Data, carry: Carry) -> dict[str, float | None]:
        key = jax.random.fold_in(jax.random.key(data.seed), 1)
        found = accuracies(key, carry.x, {"validation": data.batch.outer, "test": data.test})
        return {"inner_steps": training.steps, **{name: share.item() for name, share in found.items()}}

    return evaluate


def with_rates(runs: Sequence[Run]) -> list[Run]:
    """The same runs; those with the best rate of several with that choice, and whether it is at an end."""
    adams = [run for run in runs if run.configuration["outer_optimizer"] is not None]
    rates = [*dict.fromkeys(run.configuration["outer_optimizer"]["adam"]["linear_schedule"] for run in adams)]
    best = [id(run) for run in chosen(adams)] if len(rates) > 1 else []

    def told(run: Run) -> Run:
        rate = run.configuration["outer_optimizer"]["adam"]["linear_schedule"]
        return dataclasses.replace(run, configuration={**run.configuration, **choice({"rate": rates}, {"rate": rate})})

    return [told(run) if id(run) in best else run for run in runs]


DEFAULTS = Options(tuple(row.name for row in ROWS), budget=300.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Data condensation: learn few images from which a new network learns in T steps to classify real ones.

    The anchors (random real images, and the means of the classes) always run. At all default rates a seed takes tens of
    minutes on a laptop: pass `--rates 0.05` for a third of them. For one GPU:
    `--data mnist --network cnn --inner-steps 100 400 --directions 64 --chunk 16 --budget 7200`.
    """

    data: ImageName = "digits"
    """Images: scikit-learn's embedded digits, or a public data set; CIFAR-10 from lossy JPEG."""
    network: Literal["mlp", "cnn"] = "mlp"
    """A network with one hidden layer of 64 units, or three normalized convolutions with 128 channels (needs flax)."""
    ipc: int = 1
    """Images to learn for each class."""
    inner_steps: tuple[int, ...] = (100,)
    """T, steps on the learnt images; several are compared. A quick run takes 20 at most."""
    directions: int = 16
    """b, random directions of the forward gradients."""
    chunk: int | None = None
    """Directions among them that are pushed at once, for less memory; by default all."""
    rates: tuple[float, ...] = (0.005, 0.02, 0.05)
    """Rates of Adam on the images, falling to 0 linearly; the same for each method. A quick run takes the last one."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods([row.name for row in ROWS])
        counts = {
            **{"ipc": (self.ipc,), "inner_steps": self.inner_steps, "directions": (self.directions,)},
            **({} if self.chunk is None else {"chunk": (self.chunk,)}),
        }
        for name, values in counts.items():
            if not values or min(values) < 1:
                given = " ".join(map(str, values)) or "none"
                raise ValueError(f"{name} must be >= 1; got {given}. Pass, say, --{name.replace('_', '-')} 10.")
        if not self.rates or not min(self.rates) > 0:
            given = " ".join(f"{rate:g}" for rate in self.rates) or "none"
            raise ValueError(f"rates must be numbers > 0; got {given}. Pass, say, --rates 0.02 0.05.")

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        images = IMAGES[self.data]
        setting = SMALL if images.small else LARGE
        if self.common.quick and not images.small:
            setting = setting._replace(split=QUICK_SPLIT)
        steps = self.common.steps(setting.outer_steps)
        methods = self._methods(setting, steps)

        def read(seed: int) -> Data:
            return load(self.data, seed, corruption=0, **setting.split)

        anchors = [method.name for method in methods if method.configuration["estimator"] in ANCHORS]
        task = Task(
            title=f"Condensation of {self.data} to {self.ipc} images for each class, {self.network}, "
            f"b = {self.directions}",
            folder=f"{TASK}-{self.data}-{self.network}-{self.ipc}",
            outer_steps=steps,
            methods=[method.name for method in methods],
            anchors=anchors,
            runs=functools.partial(outer_loops, TASK, methods, read, steps, self.common),
            columns=COLUMNS,
            caption=CAPTION,
            draw=lambda runs: draw(runs, anchors, images.shape),
            settle=with_rates,
        )
        return perform(task, self.common, self)

    def _model(self) -> Model:
        if self.network == "mlp":
            return Model(functools.partial(random_layers, HIDDEN), perceptron, bx.curvature.gauss_newton)
        from benchmarks.networks.condensation_network import network

        return network(QUICK_WIDTH if self.common.quick else WIDTH)

    def _methods(self, setting: CondensationSetting, outer_steps: int) -> list[Method]:
        model, quick = self._model(), self.common.quick
        rates = dict.fromkeys(self.rates[-1:] if quick else self.rates)
        lengths = dict.fromkeys(min(T, QUICK_INNER_STEPS) if quick else T for T in self.inner_steps)
        trainings = [training(model, INNER_RATES[self.network], T, self.directions, self.chunk) for T in lengths]
        evaluations = {inner.steps: evaluation(model, inner) for inner in trainings}

        def outer_loss(x: Array, y: PyTree, batch: tuple) -> Array:
            return mean_cross_entropy(model, y, batch)

        def shared(start: Callable[[int, Data], Array], inner: Training, rate: float) -> Shared:
            return Shared(
                outer_loss=outer_loss,
                optimizer=within_range(optax.adam(optax.linear_schedule(rate, 0, outer_steps))),
                start=lambda data: (start(self.ipc, data), first_weights(model, data)),
                batch=lambda data: bx.Batch(data.batch.inner, labels(self.ipc)),
                around=lambda hypergradient: renewed(hypergradient, model, setting.minibatch),
                evaluate=evaluations[inner.steps],
                configuration={
                    **{"data": self.data, "network": self.network, "ipc": self.ipc},
                    **setting._asdict(),
                    **{"directions": self.directions, "chunk": self.chunk, "l2": L2, "inner_steps": inner.steps},
                    "inner_optimizer": {
                        "sgd": {"cosine_decay_schedule": INNER_RATES[self.network], "momentum": MOMENTUM}
                    },
                    "outer_optimizer": {"adam": {"linear_schedule": rate}},
                },
            )

        def method(row: Row, shared: Shared, inner: Training, rate: float) -> Method:
            compared = f"-T{inner.steps}" * (len(lengths) > 1) + f"-{rate:g}" * (rate > 0 and len(rates) > 1)
            made = shared.method(row.name + compared, row.solver, inner, row.settings)
            return made._replace(configuration={**made.configuration, "estimator": row.name})

        return [
            *(
                method(Row(name, no_gradient), shared(start, inner, 0.0).fixed(), inner, 0.0)
                for inner, (name, start) in itertools.product(trainings, ANCHORS.items())
            ),
            *(
                method(row, shared(uniform, inner, rate), inner, rate)
                for row, inner, rate in itertools.product(self.common.chosen(ROWS, foreign), trainings, rates)
            ),
        ]

"""Meta-learning: learn a first point from which few steps on one image of each of five new classes classify others.

    min_x  mean over tasks of f(y(x)) = mean over query of CE_j(y(x))
    MAML     y(x) = T steps of SGD from x on  mean over support of CE_i(y)
    iMAML    y(x) ≈ argmin_y g(x, y) = mean over support of CE_i(y) + strength / 2 · ‖y − x‖²,  from x

x are the first weights of a small convolutional network, y the weights of one task.

Reference: Finn et al. (MAML), arXiv 1703.03400, section 5.2; Rajeswaran et al. (iMAML), arXiv 1909.04630, section 4.
The images here are smaller, the network is narrower, and the training is much shorter than theirs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure, SubFigure

import bilevax as bx
from benchmarks.data.few_shot import QUERIES, WAYS, draw_task, read
from benchmarks.harness.clock import Spent
from benchmarks.harness.loop import Outcome
from benchmarks.harness.plugin import Function, InnerProblem, finished
from benchmarks.harness.report import COSTS, Run
from benchmarks.harness.runner import Advance, Method, Options, Task, outer_loops, perform
from benchmarks.harness.style import COLOURS, STYLE, curves
from benchmarks.networks.few_shot import Network
from bilevax.typing import Array, Key, PyTree

TASK = "meta_learning"
TASKS, TEST_TASKS = 16, 200
OUTER_STEPS = 1000
BUDGET = 90.0  # seconds for each run

COLUMNS = {
    "test_accuracy": ("test\nacc.", "{:.3f}".format),
    "test_error": ("error\nof it", "{:.3f}".format),
    "test_loss": ("test\nloss", "{:.3f}".format),
    "gradient_norm": ("inner\nnorm", "{:.2f}".format),
    **COSTS,
}
CAPTION = (
    f"test: {TEST_TASKS} tasks of classes that were not learnt from, after the inner steps on their support images;\n"
    f"error of it: standard error over these tasks. Counts: {TASKS} tasks in each outer step.\n"
    "inner norm: of the gradient of g at the returned y, zero where imaml is exact.\n"
    "untrained: maml's inner steps from random weights; pixels: the nearest support image;\n"
    "first-order: imaml without the curvature of the task's loss; imaml-kfac: by Kronecker factors alone.\n"
    "The settings were chosen on such tasks as well: the accuracies flatter all methods a little.\n"
)


class Data(NamedTuple):
    """What one seed learns from and is tested on.

    Attributes:
      images: of the classes to learn from, [classes, number, side, side] where 1 is ink, or [..., side, side, 3].
      test: tasks of other classes, leaves [TEST_TASKS, ...].
      x: random weights.
    """

    images: Array
    test: bx.Batch
    x: PyTree


NETWORK = Network()


def logits(y: PyTree, images: Array) -> Array:
    """Those of the network with the weights y, [N, WAYS]."""
    return jnp.asarray(NETWORK.apply({"params": y}, images))


def loss(model: Callable, output_loss: bx.curvature.OutputLoss, strength: float = 0.0) -> bx.curvature.ModelLoss:
    """Mean of the output loss, and strength / 2 · ‖y − x‖²; a batch is (inputs, targets)."""
    return bx.curvature.ModelLoss(model, output_loss, lambda x, batch: batch, l2=strength, center=lambda x: x)


cross_entropy = functools.partial(loss, logits, bx.curvature.softmax_cross_entropy)


@functools.partial(jax.jit, static_argnums=2)
def draw_tasks(keys: Key, images: Array, shots: int) -> bx.Batch:
    """A task for each key."""
    return jax.vmap(lambda key: draw_task(key, images, shots))(keys)


def over_tasks(
    hypergradient: bx.problem.Hypergradient, tasks: int, shots: int = 1, one_by_one: bool = False
) -> bx.problem.Hypergradient:
    """The mean of a hypergradient over tasks that are drawn anew at each outer step, from the images in the batch.

    Its info has means of the losses and of the norm, sums of the calls, and whether any task broke down. Each task
    starts from the first state: nothing is kept. Tasks run in one batch, or `one_by_one`.
    """

    def estimate(key: Key | None, state: Any, x: PyTree, batch: Any) -> tuple:  # whose batch is the images alone
        drawn = draw_tasks(jax.random.split(bx.sampling.needed(key, "random tasks"), tasks), batch, shots)

        def estimate_one(task: bx.Batch) -> tuple:
            return hypergradient.estimate(None, state, x, task)

        grads, _, info = jax.lax.map(estimate_one, drawn) if one_by_one else jax.vmap(estimate_one)(drawn)
        inner = info.inner._replace(
            inner_loss=jnp.mean(info.inner.inner_loss),
            gradient_norm=jnp.mean(info.inner.gradient_norm),
            breakdown=jnp.any(info.inner.breakdown),
            calls=jax.tree.map(jnp.sum, info.inner.calls),
        )
        grad = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), grads)
        return grad, state, bx.hypergradients.HypergradientInfo(jnp.mean(info.outer_loss), inner)

    def init(x: PyTree, y: PyTree, batch: Any = None, *, opt_state: Any = None) -> Any:
        return hypergradient.init(x, y, opt_state=opt_state)

    return bx.problem.Hypergradient(init, estimate)


def maml(steps: int, learning_rate: float) -> bx.problem.InnerSolver:
    """Differentiates through all inner steps."""
    sgd = optax.sgd(learning_rate)
    return bx.inner.reverse(cross_entropy(), sgd, steps, initial=lambda x: x, checkpoint=bx.inner.store_all)


def proximal(ihvp: bx.problem.IHVP, steps: int, learning_rate: float, strength: float) -> bx.problem.InnerSolver:
    """Solves the proximal inner problem, and differentiates its solution."""
    sgd = optax.sgd(learning_rate)
    return bx.inner.implicit(cross_entropy(strength), sgd, steps, ihvp=ihvp, initial=lambda x: x, warm_start=False)


def first_order(strength: float, **descent: Any) -> bx.problem.InnerSolver:
    """Leaves the curvature of the task out: v = ∇_y f / strength, and so x_bar = strength · v = ∇_y f."""
    return proximal(bx.ihvp.identity(1 / strength), strength=strength, **descent)


def imaml(strength: float, maxiter: int, **descent: Any) -> bx.problem.InnerSolver:
    """Takes v from conjugate gradients on the Gauss–Newton matrix, as the Hessian of a network is indefinite."""
    ihvp = bx.ihvp.cg(maxiter=maxiter, curvature=bx.curvature.gauss_newton)
    return proximal(ihvp, strength=strength, **descent)


def factors() -> bx.problem.IHVP:
    """Kronecker factors of one task: exact pseudo-gradients, as it has few images, and no damping but the strength.

    Each task has its own at each outer step, too many for eigenvalues: they are inverted by Cholesky factors, which
    split the strength between the two of them and so damp more than it does.
    """
    return bx.ihvp.kfac(damping=0.0, fisher=bx.curvature.fisher.exact, inverse=bx.curvature.kronecker.factored)


def imaml_kfac(strength: float, **descent: Any) -> bx.problem.InnerSolver:
    """Takes v from Kronecker factors."""
    return proximal(factors(), strength=strength, **descent)


def imaml_pcg(strength: float, maxiter: int, **descent: Any) -> bx.problem.InnerSolver:
    """Takes v from conjugate gradients as `imaml` does, preconditioned by Kronecker factors."""
    ihvp = bx.ihvp.cg(maxiter=maxiter, curvature=bx.curvature.gauss_newton, preconditioner=factors())
    return proximal(ihvp, strength=strength, **descent)


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      name: in lower case, also the name of its files.
      solver: `solver(**settings)` builds the inner solver.
      settings: what it is built with.
      outer_rate: the first step size of Adam, which decays to zero along a cosine over the outer steps.
      decomposes: whether each task decomposes matrices; a CPU then takes the tasks one by one, since batches of
        decompositions were seen to block each other there.
    """

    name: str
    solver: Callable[..., bx.problem.InnerSolver]
    settings: Mapping[str, Any]
    outer_rate: float
    decomposes: bool = False


# Only maml's gradient sees where SGD diverges; the others need smaller steps, inside and outside.
PROXIMAL = {"steps": 16, "learning_rate": 0.03, "strength": 0.5}
METHODS = (
    Row("maml", maml, {"steps": 3, "learning_rate": 0.4}, outer_rate=6e-3),
    Row("first-order", first_order, PROXIMAL, outer_rate=3e-3),
    Row("imaml", imaml, {**PROXIMAL, "maxiter": 5}, outer_rate=3e-3),
    Row("imaml-kfac", imaml_kfac, PROXIMAL, outer_rate=3e-3, decomposes=True),
    Row("imaml-pcg", imaml_pcg, {**PROXIMAL, "maxiter": 2}, outer_rate=3e-3, decomposes=True),
)


def foreign(function: Function) -> Row:
    """The row of a function of a plugin, with the settings of the rows of iMAML."""

    def solver(steps: int, learning_rate: float, strength: float) -> Any:
        loss, sgd = cross_entropy(strength), optax.sgd(learning_rate)
        curvature = bx.curvature.gauss_newton
        return function.hypergradient(
            InnerProblem(loss, sgd, steps, learning_rate, curvature, initial=lambda x: x, warm_start=False)
        )

    return Row(function.name, solver, PROXIMAL, outer_rate=3e-3)


def tested(row: Row) -> bx.problem.InnerSolver:
    """What adapts to a task of the test: the row's own solver, or for a plugin the inner steps of iMAML."""
    solver = row.solver(**row.settings)
    return proximal(bx.ihvp.identity(), **row.settings) if callable(solver) else solver


def load(name: str, shots: int, seed: int) -> Data:
    """Draws the test tasks and the first weights."""
    images, unseen = read(name)
    test_key, network_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1))
    test = draw_tasks(jax.random.split(test_key, TEST_TASKS), unseen, shots)
    return Data(images, test, jax.jit(NETWORK.init)(network_key, images[0, :1])["params"])


def adapted(solver: bx.problem.InnerSolver) -> Callable[[PyTree, bx.Batch], Array]:
    """A function (x, task) -> logits of the query images, with the y that the solver reaches from x."""
    solve = bx.differentiable(solver)
    return lambda x, task: logits(solve(x, x, task.inner), task.outer[0])


def nearest(x: PyTree, task: bx.Batch) -> Array:
    """Minus the squared distances to the nearest support image of each class, as logits of the query images."""
    support, query = (part[0].reshape(len(part[0]), -1) for part in (task.inner, task.outer))
    distances = jnp.sum((query[:, None] - support[None]) ** 2, axis=2)
    return -distances.reshape(len(query), WAYS, -1).min(axis=2)


def scores(predict: Callable) -> Callable[[PyTree, bx.Batch], dict[str, float | None]]:
    """A function (x, tasks) -> accuracy with its standard error over the tasks, and loss; NaN if a logit is not finite.

    Args:
      predict: `predict(x, task)`, logits of the query images.
    """

    @jax.jit
    def evaluate(x: PyTree, tasks: bx.Batch) -> tuple[Array, Array]:
        outputs = jax.vmap(predict, (None, 0))(x, tasks)
        labels = tasks.outer[1]
        finite, right = jnp.isfinite(outputs).all(axis=(1, 2)), jnp.mean(outputs.argmax(axis=2) == labels, axis=1)
        return jnp.where(finite, right, jnp.nan), bx.curvature.softmax_cross_entropy.value(outputs, labels).mean()

    def numbers(x: PyTree, tasks: bx.Batch) -> dict[str, float | None]:
        right, value = evaluate(x, tasks)
        error = right.std(ddof=1) / np.sqrt(len(right))
        return {"test_accuracy": right.mean().item(), "test_error": error.item(), "test_loss": value.item()}

    return numbers


ANCHORS: dict[str, Callable] = {"untrained": adapted(maml(**METHODS[0].settings)), "pixels": nearest}


def anchor_runs(seeds: Sequence[int], load: Callable[[int], Data], configuration: Mapping[str, Any]) -> Iterator[Run]:
    """Tests what learns nothing."""
    for name, predict in ANCHORS.items():
        evaluate = scores(predict)
        for seed in seeds:
            data = load(seed)
            point = evaluate(data.x, data.test)
            if name == "pixels":
                point["test_loss"] = None  # distances are no logits
            spent = Spent().named()
            curve: dict[str, list[Any]] = {metric: [value] for metric, value in (spent | point).items()}
            metrics = {**dict.fromkeys(COLUMNS), **point}
            yield Run(
                TASK,
                name,
                seed,
                dict(configuration),
                Outcome(data.x, metrics, curve),
            )


def draw(runs: Sequence[Run], anchors: Sequence[str], load: Callable[[int], Data]) -> Figure:
    """Loss and accuracy against time, and the first test task of the best run with its predictions."""
    learnt = [run for run in runs if run.method not in anchors and run.finite]
    best = max(learnt, key=lambda run: (-run.seed, run.outcome.metrics["test_accuracy"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 5.6), dpi=150, layout="constrained")
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.1)).flat
        value, accuracy = left.subplots(2, 1, sharex=True)
        curves(value, [run for run in runs if run.method != "pixels"], anchors, "test_loss")
        value.set(ylabel="loss on test tasks")
        curves(accuracy, runs, anchors, "test_accuracy")
        accuracy.set(xlabel="run time without compilation (s)", ylabel="accuracy on test tasks")
        figure.legend(*accuracy.get_legend_handles_labels(), loc="outside upper center", ncols=8)
        right.suptitle(f"A test task ({best.method}, seed {best.seed}): support images, and what was predicted")
        gallery(right, best, load(best.seed))
    return figure


def gallery(figure: SubFigure, run: Run, data: Data) -> None:
    """One row for each class: a support image, and the query images with their predicted class."""
    task = jax.tree.map(lambda leaf: leaf[0], data.test)
    own = [row for row in METHODS if row.name == run.method]
    solver = tested(own[0]) if own else proximal(bx.ihvp.identity(), **run.configuration["settings"])
    outputs = jax.jit(adapted(solver))(run.outcome.x, task)
    predicted = np.asarray(outputs.argmax(axis=1)).reshape(WAYS, QUERIES)
    support, query = (np.asarray(part[0]).reshape(WAYS, -1, *part[0].shape[1:]) for part in (task.inner, task.outer))
    for label, line in enumerate(figure.subplots(WAYS, 1 + QUERIES)):
        names = [f"class {label}", *(f"→ {guess}" for guess in predicted[label])]
        wrong = [False, *(predicted[label] != label)]
        for axes, image, name, bad in zip(line, [support[label, 0], *query[label]], names, wrong, strict=True):
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(name, color=COLOURS[4] if bad else "black", fontsize="small")
            axes.axis("off")


DEFAULTS = Options(tuple(row.name for row in METHODS), budget=BUDGET)


@dataclasses.dataclass(frozen=True)
class Config:
    """Meta-learning: 5-way few-shot classification of characters or photographs, by MAML and by implicit MAML.

    The anchors (the nearest support image in pixels, and the same inner steps from random weights) always run.
    For one GPU: `--outer-steps 20000 --budget 3600`.
    """

    data: Literal["omniglot", "mini-imagenet"] = "omniglot"
    """Images: Omniglot, shrunk to 15 × 15, 964 classes to learn from and 659 others for the test; or a third of
    miniImageNet, 200 images of each class, shrunk to 21 × 21, 64 classes and 20 others: figures on it are not those of
    other papers."""
    shots: int = 1
    """Support images of each class."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods([row.name for row in METHODS])
        most = 20 - QUERIES
        if not 1 <= self.shots <= most:
            raise ValueError(f"shots must lie between 1 and {most}; got {self.shots}. Pass, say, --shots 5.")

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        steps = self.common.steps(OUTER_STEPS)
        methods = [self._method(row, steps) for row in self.common.chosen(METHODS, foreign)]

        def runs(advance: Advance) -> Iterator[Run]:
            yield from anchor_runs(self.common.all_seeds, self._load, self._configuration)
            yield from outer_loops(TASK, methods, self._load, steps, self.common, advance)

        first = (self.data, self.shots) == ("omniglot", 1)
        task = Task(
            title=f"Meta-learning on {self.data}, {WAYS}-way {self.shots}-shot",
            folder=TASK if first else f"{TASK}-{self.data}-{self.shots}",
            outer_steps=steps,
            methods=[*ANCHORS, *(method.name for method in methods)],
            anchors=[*ANCHORS],
            runs=runs,
            columns=COLUMNS,
            caption=CAPTION,
            draw=lambda runs: draw(runs, [*ANCHORS], self._load),
        )
        return perform(task, self.common, self)

    def _load(self, seed: int) -> Data:
        return load(self.data, self.shots, seed)

    @property
    def _configuration(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "ways": WAYS,
            "shots": self.shots,
            "queries": QUERIES,
            "width": NETWORK.width,
            "layers": NETWORK.layers,
            "test_tasks": TEST_TASKS,
        }

    def _method(self, row: Row, steps: int) -> Method:
        solver = row.solver(**row.settings)
        evaluate = scores(adapted(tested(row)))
        one_by_one = row.decomposes and jax.default_backend() == "cpu"
        return Method(
            name=row.name,
            hypergradient=lambda: over_tasks(finished(cross_entropy(), solver), TASKS, self.shots, one_by_one),
            optimizer=optax.adam(optax.cosine_decay_schedule(row.outer_rate, steps)),
            start=lambda data: (data.x, data.x),
            batch=lambda data: data.images,
            evaluate=lambda data, carry: evaluate(carry.x, data.test),
            configuration={
                **self._configuration,
                "settings": dict(row.settings),
                "tasks": TASKS,
                "outer_optimizer": {"adam": {"cosine_decay_schedule": row.outer_rate}},
            },
        )

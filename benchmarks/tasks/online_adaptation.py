"""Online adaptation: which bytes of the documents it reads should a language model learn from, and how much?

    min_x  f(y_T(x)) = NLL of the salient bytes of T documents + ½ KL(base model ‖ y_T) on others
    y_t = y_{t−1} − rate · ∇ mean over bytes of w(x) · NLL(y_{t−1}),  document t = 1..T,  from the base model y_0

The weight of a byte is softplus(hᵀ x_slope / √width + x_bias), h what the base model computes before it reads the byte.
A base model is trained first; each outer step draws other documents; x is tested on documents of held-out texts.

Reference: Hu et al., "Meta-learning online adaptation of language models" (CaMeLS), arXiv 2305.15076, with a smaller
model, shorter documents and marks in place of questions; Shen et al., arXiv 2406.14095, with (FG)²U.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bilevax as bx
from benchmarks.data.adaptation_data import BYTES, COLLECTIONS, Chunks, corpus, cut, informative
from benchmarks.harness.grid import choice
from benchmarks.harness.loop import Carry, Outcome
from benchmarks.harness.plugin import Function, InnerProblem
from benchmarks.harness.report import COSTS, Columns, Run
from benchmarks.harness.runner import Advance, Method, Options, Task, outer_loops, perform
from benchmarks.harness.style import COLOURS, STYLE, curves
from benchmarks.networks.decoder import Decoder
from benchmarks.networks.encoder import Size
from benchmarks.tasks.adaptation import LOCALITY, AdaptationSetting, Pool, Problem, judge, start, train, weights
from bilevax.typing import Array, Key, PyTree

TASK = "online_adaptation"
CLIP = 0.5  # of the hypergradient, before Adam
ANCHOR_RATES = tuple(0.004 * 1.25**k for k in range(12))
SHOWN = (6, 63)  # documents and bytes in the picture

COLUMNS: Columns = {
    "held_out": ("held-out\nouter loss", "{:.3f}".format),
    "gain": ("gain over\nuniform", "{:.3f}".format),
    "salient": ("salient\nNLL", "{:.3f}".format),
    "divergence": ("KL to\nbase", "{:.3f}".format),
    "validation": ("validation\nouter loss", "{:.3f}".format),
    "inner_rate": ("inner\nrate", "{:.3f}".format),
    **{name: COSTS[name] for name in ("seconds", "cpu_seconds", "temp_bytes")},
}
CAPTION = (
    "uniform: all weights are 1; none: no adaptation; marked: only the salient bytes count, which no method can see.\n"
    "inner rate: for each seed that of the lowest loss on validation texts, of the anchors too.\n"
    "gain: how much lower the held-out loss is than that of uniform with the same seed, on the same texts.\n"
)

SMALL = AdaptationSetting(Size(BYTES, 63, 48, heads=4, hidden=192, layers=2, types=1), 400, 3e-3, 16, 8, 120, 24)
LARGE = AdaptationSetting(Size(BYTES, 255, 384, heads=6, hidden=1536, layers=6, types=1), 4000, 3e-4, 24, 8, 1000, 24)
SETTINGS = {"small": SMALL, "large": LARGE}
# A quick run has a smaller model, which has hardly been trained, and fewer documents.
QUICK = AdaptationSetting(Size(BYTES, 31, 16, heads=2, hidden=32, layers=1, types=1), 100, 3e-3, 8, 4, 12, 4)


class Data(NamedTuple):
    """What one seed learns from and is tested on.

    Attributes:
      train: chunks to draw documents from, and the inner rate.
      validation: streams of documents, leaves [streams, ...].
      test: the same, of other texts.
      y: the base model.
    """

    train: Pool
    validation: bx.Batch
    test: bx.Batch
    y: PyTree


def unrolled(
    kind: Callable[..., bx.problem.InnerSolver], problem: Problem, steps: int, **settings: Any
) -> bx.problem.InnerSolver:
    """So many inner steps of this kind, with a document in each."""
    return kind(problem.inner_loss, optax.sgd(1.0), steps, sample=bx.sampling.per_step, **settings)


reverse = functools.partial(unrolled, bx.inner.reverse)


def truncated(problem: Problem, steps: int) -> bx.problem.InnerSolver:
    """Differentiates through the last of the inner steps."""
    before = unrolled(bx.inner.no_gradient, problem, problem.steps - steps)
    return bx.inner.chain(before, reverse(problem, steps))


def identity(problem: Problem) -> bx.problem.InnerSolver:
    """Leaves curvature out: each step is differentiated as if it were the last one, and made at the last y."""
    ihvp = bx.ihvp.identity(problem.steps)
    return unrolled(bx.inner.implicit, problem, problem.steps, ihvp=ihvp)


def forward_gradient(problem: Problem, directions: int, guide_steps: int = 0) -> bx.problem.InnerSolver:
    """Pushes so many directions: random ones, or as one of them the gradient truncated to `guide_steps` steps."""
    return unrolled(
        bx.inner.forward_gradient,
        problem,
        problem.steps,
        directions=directions,
        sampler=bx.inner.random_directions.orthogonal,
        guide=bx.inner.guides.from_start(truncated(problem, guide_steps)) if guide_steps else None,
    )


class Row(NamedTuple):
    """A row of the table: `solver(problem, **settings(problem))` builds its inner solver."""

    name: str
    solver: Callable[..., bx.problem.InnerSolver]
    settings: Callable[[Problem], Mapping[str, Any]]


def foreign(function: Function) -> Row:
    """The row of a function of a plugin; the rate of the inner steps is in the loss."""

    def solver(problem: Problem) -> Any:
        curvature, sample = bx.curvature.hessian, bx.sampling.per_step
        given = InnerProblem(problem.inner_loss, optax.sgd(1.0), problem.steps, 1.0, curvature, sample=sample)
        return function.hypergradient(given)

    return Row(function.name, solver, lambda problem: {})


METHODS = (
    Row("reverse", reverse, lambda problem: {"steps": problem.steps}),
    Row("truncated", truncated, lambda problem: {"steps": 2}),
    Row("identity", identity, lambda problem: {}),
    Row("forward-gradient", forward_gradient, lambda problem: {"directions": 8}),
    Row("guided", forward_gradient, lambda problem: {"directions": 8, "guide_steps": problem.steps // 4}),
)


class Anchor(NamedTuple):
    """Weights that are not learnt: `weigh(streams)`, [streams, T, length − 1], and the inner rates to choose from."""

    weigh: Callable[[bx.Batch], Array]
    rates: Sequence[float]


def _marks(streams: bx.Batch) -> Array:
    return streams.outer.chunks.salient[..., 1:]


ANCHORS = {
    "uniform": Anchor(lambda streams: jnp.ones_like(_marks(streams)), ANCHOR_RATES),
    "none": Anchor(lambda streams: jnp.zeros_like(_marks(streams)), (0.0,)),
    "marked": Anchor(_marks, ANCHOR_RATES),
}


def step_sizes(method: str, rate: float, x: PyTree, streams: bx.Batch) -> Array:
    """The inner rate times the weight of each byte, [streams, T, length − 1]; x counts where weights are learnt."""
    weighting = ANCHORS[method].weigh(streams) if method in ANCHORS else weights(x, streams.inner.hidden)
    return rate * weighting


def chosen_of(tried: Mapping[float, float]) -> dict[str, Any]:
    """The best rate, for the configuration."""
    return {"tried": dict(tried), **choice({"inner_rate": [*tried]}, {"inner_rate": best(tried)})}


def best(tried: Mapping[float, float]) -> float:
    """The rate with the lowest loss; one that diverged comes last."""
    return min(tried, key=lambda rate: tried[rate] if math.isfinite(tried[rate]) else math.inf)


def against_uniform(runs: Sequence[Run]) -> list[Run]:
    """The same runs with a curve `excess`: the validation loss minus that of equal weights with the same seed."""
    uniform = {run.seed: run.outcome.metrics["validation"] for run in runs if run.method == "uniform"}
    excess = [[value - uniform[run.seed] for value in run.outcome.curve["validation"]] for run in runs]
    return [
        dataclasses.replace(run, outcome=run.outcome._replace(curve={**run.outcome.curve, "excess": curve}))
        for run, curve in zip(runs, excess, strict=True)
    ]


def draw(runs: Sequence[Run], load: Callable[[int], Data]) -> Figure:
    """Validation loss against time, and the weights of the best run on documents of held-out texts."""
    learnt = [run for run in runs if run.method not in ANCHORS and run.finite]
    best = min(learnt, key=lambda run: (run.seed, run.outcome.metrics["validation"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.8), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
        curves(left, against_uniform(runs), [*ANCHORS], "excess")
        left.set(xlabel="run time without compilation (s)", ylabel="validation loss minus that of uniform")
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=8)
        right.set_title(f"Learnt weights ({best.method}, seed {best.seed}), salient bytes in red")
        written(right, best.outcome.x, load(best.seed).test)
    return figure


def written(axes: Axes, x: PyTree, streams: bx.Batch) -> None:
    """Documents of the first stream, one in each line, the weights behind their bytes."""
    rows, columns = SHOWN
    part = (slice(rows), slice(columns))
    words, marks = (np.asarray(leaf[0][:, 1:])[part] for part_of in [streams.outer.chunks] for leaf in part_of)
    shade = axes.imshow(np.asarray(weights(x, streams.inner.hidden[0]))[part], cmap="YlGn", aspect="auto")
    for (row, column), word in np.ndenumerate(words):
        character = chr(word) if chr(word).isprintable() else "·"
        colour = COLOURS[4] if marks[row, column] else "black"
        axes.text(column, row, character, color=colour, ha="center", va="center", family="monospace", fontsize="small")
    axes.axis("off")
    axes.figure.colorbar(shade, ax=axes, label="weight")


DEFAULTS = Options(tuple(row.name for row in METHODS if row.name != "identity"), budget=600.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Online adaptation: learn which bytes of new documents a language model adapts to.

    The anchors (equal weights, no adaptation, and weights on the salient bytes only) always run. A claim takes at least
    three seeds.
    """

    data: Literal["topics", "agnews", "trec"] = "topics"
    """Texts: the help topics of Python itself, short news, or short questions."""
    model: Literal["small", "large"] = "small"
    """A transformer decoder of bytes: two blocks of width 48 and documents of 64 bytes, or six of width 384 and 256
    bytes (for a GPU, with --budget 3600). A quick run has a smaller one."""
    inner_rates: tuple[float, ...] = (0.01, 0.03)
    """Inner step sizes to choose from, for each method and seed, on validation texts. A quick run tries the last."""
    outer_rate: float = 0.03
    """The first step size of Adam, which decays to zero."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods([row.name for row in METHODS])
        for name, rates in (("inner_rates", self.inner_rates), ("outer_rate", (self.outer_rate,))):
            if not rates or not all(0 < rate < math.inf for rate in rates):
                fix = f"--{name.replace('_', '-')} 0.03"
                raise ValueError(f"{name} must be > 0; got {' '.join(map(str, rates)) or 'none'}. Pass, say, {fix}.")

    @property
    def setting(self) -> AdaptationSetting:
        """What suits the model."""
        return QUICK if self.common.quick else SETTINGS[self.model]

    @functools.cached_property
    def problem(self) -> Problem:
        """The losses."""
        return Problem(Decoder(self.setting.size), self.setting)

    @functools.cached_property
    def judge(self) -> Callable[[PyTree, Array, bx.Batch], tuple[float, ...]]:
        """Tells the outer loss and its two parts."""
        return judge(self.problem)

    def load(self, seed: int) -> Data:
        """Deals out the texts, trains the base model, and draws the streams to validate and to test on."""
        setting, problem = self.setting, self.problem
        collection = COLLECTIONS[self.data]
        parts = corpus(collection, seed)
        words = cut(parts.train, setting.length).words
        train_key, *keys = jax.random.split(jax.random.key(seed), 3)
        y = train(problem.model, words, setting.first_steps, setting.first_rate, train_key)

        @jax.jit
        def draw_all(key: Key, pool: Pool) -> bx.Batch:
            return jax.lax.map(lambda key: problem.draw(key, y, pool), jax.random.split(key, setting.streams))

        chunks, *unseen = (informative(cut(part, setting.length), seed) for part in parts)
        pool = Chunks(*(leaf[: collection.chunks] for leaf in chunks))  # as many for each seed: one program serves all
        validation, test = (draw_all(key, Pool(part, 1.0)) for key, part in zip(keys, unseen, strict=True))
        return Data(Pool(pool, 1.0), validation, test, y)

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        steps = self.common.steps(self.setting.outer_steps)
        rows = self.common.chosen(METHODS, foreign)
        load = functools.cache(self.load)

        def runs(advance: Advance) -> Iterator[Run]:
            learnt = (self._learnt(row, load, steps, advance) for row in rows)
            return self._tested(itertools.chain(self._anchors(load), *learnt), load)

        task = Task(
            title=f"Online adaptation to {self.data}, {self.model} model, T = {self.setting.inner_steps}",
            folder=TASK if (self.data, self.model) == ("topics", "small") else f"{TASK}-{self.data}-{self.model}",
            outer_steps=steps,
            methods=[*ANCHORS, *(row.name for row in rows)],
            anchors=[*ANCHORS],
            runs=runs,
            columns=COLUMNS,
            caption=CAPTION,
            draw=lambda runs: draw(runs, load),
        )
        return perform(task, self.common, self)

    @property
    def _configuration(self) -> dict[str, Any]:
        setting = {key: value for key, value in self.setting._asdict().items() if key != "outer_steps"}
        return {"data": self.data, "model": self.model, **setting, "locality": LOCALITY}

    def _anchors(self, load: Callable[[int], Data]) -> Iterator[Run]:
        """Weights that are not learnt."""
        for name, seed in itertools.product(ANCHORS, self.common.all_seeds):
            data, x = load(seed), jnp.zeros(())
            tried = {
                rate: self.judge(data.y, step_sizes(name, rate, x, data.validation), data.validation)[0]
                for rate in ANCHORS[name].rates
            }
            rate = best(tried)
            curve: dict[str, list[Any]] = {"seconds": [0.0], "cpu_seconds": [0.0], "validation": [tried[rate]]}
            metrics = {**dict.fromkeys(COLUMNS), "validation": tried[rate], "inner_rate": rate}
            yield Run(TASK, name, seed, {**self._configuration, **chosen_of(tried)}, Outcome(x, metrics, curve))

    def _learnt(self, row: Row, load: Callable[[int], Data], steps: int, advance: Advance) -> Iterator[Run]:
        """One run for each seed, that with the best of the inner rates; all rates share one program."""
        rates = self.inner_rates[-1:] if self.common.quick else self.inner_rates
        number = len(rates)

        def with_rate(turn: int) -> Data:
            data = load(turn // number)
            return data._replace(train=data.train._replace(rate=jnp.asarray(rates[turn % number])))

        turns = dataclasses.replace(self.common, seed=number * self.common.seed, seeds=number * self.common.seeds)
        runs = outer_loops(TASK, [self._method(row, steps)], with_rate, steps, turns, advance)
        for seed in self.common.all_seeds:
            each = dict(zip(rates, runs, strict=False))
            tried = {rate: run.outcome.metrics["validation"] for rate, run in each.items()}
            run = each[best(tried)]
            yield dataclasses.replace(run, seed=seed, configuration={**run.configuration, **chosen_of(tried)})

    def _method(self, row: Row, steps: int) -> Method:
        settings = row.settings(self.problem)

        def validate(data: Data, carry: Carry) -> dict[str, float | None]:
            rate = float(data.train.rate)
            sizes = step_sizes(row.name, rate, carry.x, data.validation)
            return {"validation": self.judge(data.y, sizes, data.validation)[0], "inner_rate": rate}

        return Method(
            name=row.name,
            hypergradient=lambda: self.problem.hypergradient(row.solver(self.problem, **settings)),
            optimizer=optax.chain(
                optax.clip_by_global_norm(CLIP), optax.adam(optax.linear_schedule(self.outer_rate, 0.0, steps))
            ),
            start=lambda data: (start(self.setting.size.width), data.y),
            batch=lambda data: data.train,
            evaluate=validate,
            configuration={
                **self._configuration,
                "settings": dict(settings),
                "outer_optimizer": {"clip_by_global_norm": CLIP, "adam": {"linear_schedule": self.outer_rate}},
            },
        )

    def _tested(self, runs: Iterator[Run], load: Callable[[int], Data]) -> Iterator[Run]:
        """The same runs, with their numbers on held-out texts; those of equal weights come first."""
        uniform: dict[int, float] = {}
        for run in runs:
            data, metrics = load(run.seed), run.outcome.metrics
            sizes = step_sizes(run.method, metrics["inner_rate"], run.outcome.x, data.test)
            loss, salient, divergence = self.judge(data.y, sizes, data.test)
            found = {"held_out": loss, "salient": salient, "divergence": divergence}
            found["gain"] = uniform.setdefault(run.seed, loss) - loss
            yield dataclasses.replace(run, outcome=run.outcome._replace(metrics=metrics | found))

"""What a tail adds to the last K of T plain steps: the cosine to the derivative of all T, against K.

Hyper-cleaning of digits again. Weak and strong curvature are weight decays; the steps take minibatches, or all images.
Kronecker factors and cross terms see all images: what differs is the bias of a method and the noise of the steps.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

import bilevax as bx
from benchmarks.data.images import load
from benchmarks.harness import files
from benchmarks.harness.folder import prepared
from benchmarks.harness.loop import Outcome
from benchmarks.harness.report import Columns, Run, mean_and_error, table
from benchmarks.harness.resuming import Kept, kept
from benchmarks.harness.style import COLOURS, STYLE
from benchmarks.networks.model import Model
from benchmarks.tasks.hyper_cleaning import inner_loss, numbered, outer_loss
from bilevax.typing import Array, Key, PyTree, Scalar

TASK = "unrolling-tails"
STEPS, RATE = 600, 0.3
DECAYS = {"weak": 1e-3, "strong": 1e-2}
IMAGES = 512
MINIBATCHES = (16, 128, IMAGES)
SPLIT: dict[str, Any] = {"train": IMAGES, "validation": 256, "corruption": 0.5}
DAMPING = 1e-3  # of Kronecker factors with no steps behind them
CAPTION = f"""\
Cosine to the derivative of all {STEPS} plain steps of {RATE:g}, by weight decay and images of a step. K: how many
of the last are differentiated; tails stand for those before. kfac-tail is damped by 1 / (step size x K),
kfac-tail-tenth by a tenth of it; identity-tail takes step size x K for the inverse. kfac, identity: no step is
differentiated.
"""


class Steps(NamedTuple):
    """The inner problem, and the plain steps that are made on it."""

    loss: bx.curvature.ModelLoss
    sample: bx.sampling.Sample

    def implicit(self, ihvp: bx.problem.IHVP, unrolled: int = 0) -> bx.problem.InnerSolver:
        """All steps but the last K, differentiated by this inverse, and the last K exactly."""
        first = bx.inner.implicit(self.loss, optax.sgd(RATE), STEPS - unrolled, ihvp=ihvp, sample=self.sample)
        return bx.inner.chain(first, self.last(unrolled)) if unrolled else first

    def truncated(self, unrolled: int) -> bx.problem.InnerSolver:
        """The last K steps alone."""
        first = bx.inner.no_gradient(self.loss, optax.sgd(RATE), STEPS - unrolled, sample=self.sample)
        return bx.inner.chain(first, self.last(unrolled))

    def last(self, steps: int, **options: Any) -> bx.problem.InnerSolver:
        """So many steps, differentiated exactly."""
        return bx.inner.reverse(self.loss, optax.sgd(RATE), steps, sample=self.sample, **options)


def _kfac_tail(share: float, steps: Steps, unrolled: int) -> bx.problem.InnerSolver:
    return steps.implicit(bx.ihvp.kfac(damping=share / (RATE * unrolled)), unrolled)


Solver: TypeAlias = Callable[[Steps, int], bx.problem.InnerSolver]
EXACT: Solver = lambda steps, unrolled: steps.last(STEPS, checkpoint=bx.inner.two_level)  # noqa: E731
UNROLLED: dict[str, Solver] = {
    "reverse": Steps.truncated,
    "identity-tail": lambda steps, unrolled: steps.implicit(bx.ihvp.identity(RATE * unrolled), unrolled),
    "kfac-tail": functools.partial(_kfac_tail, 1.0),
    "kfac-tail-tenth": functools.partial(_kfac_tail, 0.1),
}
ALONE: dict[str, Solver] = {
    "identity": lambda steps, unrolled: steps.implicit(bx.ihvp.identity()),
    "kfac": lambda steps, unrolled: steps.implicit(bx.ihvp.kfac(damping=DAMPING)),
}


def hypergradient(
    net: Model, solver: Solver, unrolled: int, minibatch: int, key: Key, y: PyTree, batch: bx.Batch, l2: Scalar
) -> Array:
    """x_bar [N] at equal weights."""
    sample = bx.sampling.full if minibatch >= IMAGES else bx.sampling.minibatch(minibatch)
    steps = Steps(dataclasses.replace(inner_loss(net), l2=l2), sample)
    hypergrad = bx.hypergradient(functools.partial(outer_loss, net), solver(steps, unrolled))
    x = jnp.zeros(len(batch.inner[1]))
    return hypergrad.estimate(key, hypergrad.init(x, y, batch), x, batch)[0]


def estimate(net: Model, solver: Solver, unrolled: int, minibatch: int) -> Callable[[int, float], np.ndarray]:
    """The same as a function of seed and weight decay, all of which one program serves."""
    run = jax.jit(functools.partial(hypergradient, net, solver, unrolled, minibatch))

    def at(seed: int, l2: float) -> np.ndarray:
        batch = numbered(load("digits", seed, **SPLIT).batch)
        y = net.init(jax.random.key(seed), batch.inner[0].shape[1])
        return np.asarray(run(jax.random.key(seed), y, batch, l2), float)

    return at


def each(net: Model, solver: Solver, unrolled: int, minibatch: int, keys: Sequence[tuple]) -> dict[tuple, np.ndarray]:
    """The estimates with each decay and seed."""
    at = estimate(net, solver, unrolled, minibatch)
    return {key: at(key[2], key[1]) for key in keys}


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """0 for a gradient of zero."""
    sizes = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / sizes) if sizes else 0.0


def runs(
    net: Model, numbers: Sequence[int], seeds: Sequence[int], quick: bool, tell: Callable, work: Kept
) -> list[Run]:
    """All methods for each decay, minibatch and seed, each with a curve over K."""
    found: list[Run] = []
    decays = {"weak": DECAYS["weak"]} if quick else DECAYS
    for minibatch in MINIBATCHES[1:2] if quick else MINIBATCHES:
        tell(f"minibatches of {minibatch}")
        keys = [(name, l2, seed) for name, l2 in decays.items() for seed in seeds]
        own = work.within(f"{minibatch}")
        answers = own.once("exact", functools.partial(each, net, EXACT, STEPS, minibatch, keys))
        for method, solver in {**UNROLLED, **ALONE}.items():
            cosines: dict[tuple, list[float]] = {key: [] for key in keys}
            for unrolled in numbers if method in UNROLLED else numbers[:1]:
                make = functools.partial(each, net, solver, unrolled, minibatch, keys)
                for key, gradient in own.once(f"{method}-{unrolled}", make).items():
                    cosines[key].append(cosine(gradient, answers[key]))
            for (name, l2, seed), values in cosines.items():
                values = values if method in UNROLLED else values * len(numbers)
                chosen = {"decay": name, "l2": l2, "minibatch": minibatch, "steps": STEPS, "rate": RATE, "split": SPLIT}
                metrics = {f"cosine_{number}": value for number, value in zip(numbers, values, strict=True)}
                curve: dict[str, list[Any]] = {"unrolled": list(numbers), "cosine": values}
                found.append(Run(TASK, method, seed, chosen, Outcome((), metrics, curve)))
    return found


def panels(found: Sequence[Run]) -> dict[tuple[str, int], list[Run]]:
    """The runs of each decay and minibatch."""
    parts: dict[tuple[str, int], list[Run]] = {}
    for run in found:
        parts.setdefault((run.configuration["decay"], run.configuration["minibatch"]), []).append(run)
    return parts


def draw(found: Sequence[Run]) -> Figure:
    """The cosine against K: a row of panels for each decay, a column for each minibatch; mean ± standard error."""
    parts = panels(found)
    decays, minibatches = (list(dict.fromkeys(names)) for names in zip(*parts, strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.9 * len(decays)), dpi=110, layout="constrained")
        grid = figure.subplots(len(decays), len(minibatches), squeeze=False, sharex=True, sharey=True)
        for (decay, minibatch), members in parts.items():
            axes = grid[decays.index(decay), minibatches.index(minibatch)]
            for colour, method in zip(COLOURS, {**UNROLLED, **ALONE}, strict=False):
                curves = [run.outcome.curve for run in members if run.method == method]
                mean, error = mean_and_error([curve["cosine"] for curve in curves])
                style = {"marker": "o", "linestyle": "-"} if method in UNROLLED else {"linestyle": "--"}
                axes.errorbar(curves[0]["unrolled"], mean, error, color=colour, label=method, linewidth=1, **style)
            images = "all images" if minibatch == IMAGES else f"{minibatch} images a step"
            axes.set(title=f"{decay} decay, {images}", xscale="log")
        for axes in grid[-1]:
            axes.set_xlabel("last steps differentiated, K")
            axes.set_xticks(curves[0]["unrolled"], map(str, curves[0]["unrolled"]), minor=False)
            axes.minorticks_off()
        for axes in grid[:, 0]:
            axes.set_ylabel("cosine")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def run(net: Model, numbers: Sequence[int], seeds: Sequence[int], config: Any, console: Console) -> int:
    """Compares everything, prints the tables and writes the files; returns the exit code."""
    folder = prepared(config, TASK, console)
    numbers = sorted({*numbers[:1], *numbers[-1:]}) if config.quick else numbers
    found = runs(net, numbers, seeds, config.quick, lambda text: console.print(f"[dim]{text} …"), kept(config))
    columns: Columns = {f"cosine_{number}": (f"K = {number}", "{:.3f}".format) for number in numbers}
    for (decay, minibatch), members in panels(found).items():
        for member in members:
            member.write(folder.within(f"{decay}-{minibatch}"))
        console.print(table(f"{decay} decay, minibatches of {minibatch}", members, columns, ()))
    console.print(CAPTION, style="dim", soft_wrap=True, markup=False)
    files.save(draw(found), folder.path / f"{TASK}.png")
    console.print(f"JSON files and the plot: {folder.words}", markup=False, soft_wrap=True)
    return 0

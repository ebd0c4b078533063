"""Suggested step sizes beside tuned ones: what is evaluated until SLDBO's levels of F, the search for steps included.

Each method runs as in every decentralized task: all pairs of a grid on tuning seeds, and on each judged seed those
that a target chooses. On the judged seeds it also runs with the steps of `bx.single_loop.suggest_step_sizes`, from the
state where their search ended, with all that the search has spent on its account.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import bilevax as bx
from benchmarks.decentralized import hyper_cleaning, meta_learning, policy_evaluation, regularization
from benchmarks.decentralized.choices import COINS, Agents
from benchmarks.decentralized.comparison import Here, Job, Place, Turn, attempt, defaults, prepare, runs, turn_of
from benchmarks.decentralized.figure import GRADIENT
from benchmarks.decentralized.levels import LOSSES, Curve, Level, Spent, spent_until
from benchmarks.decentralized.measured import Measured, measured
from benchmarks.decentralized.methods import Row, evaluations, shares
from benchmarks.decentralized.network import Network
from benchmarks.decentralized.records import Record
from benchmarks.decentralized.rows import personal_rows, rows
from benchmarks.decentralized.running import Carry, Pick
from benchmarks.harness.folder import prepared
from benchmarks.harness.loop import Outcome
from benchmarks.harness.report import Run
from benchmarks.harness.resuming import kept
from benchmarks.harness.runner import CHECKPOINT_EVERY, Options

TASK = "decentralized_step_sizes"
METHODS = ("sldbo", "s3ldbo-0.2", "s3ldbo-0.1", "dsvrbgd", "sparkle-ed")
FEW = ("sldbo", "s3ldbo-0.1", "sparkle-ed")  # where a run costs much
COSTS = ("derivatives", "megabytes")
SHARES = LOSSES[1:]  # .9 and .99 of SLDBO's decrease of F
CAPTION = """\
Derivative evaluations of an agent until 90 % and 99 % of SLDBO's decrease of F, medians over judged seeds: with the
pair of a grid that the tuning seeds choose for the target, whose tuning does not count, and with suggested steps, whose
search does, but for its readings of f and g: own is what it spent. inf: not reached in the run. a_y L: with L the
largest curvature of the mean g. Momentum is no step size: suggested steps go with that of the pair for 99 %.
"""


class Suggestion(NamedTuple):
    """Suggested steps on a judged seed, and how far they led.

    Attributes:
      step_sizes: of x, y and v.
      curvature: L that was found.
      warm_up: ∇f of each agent in the last warm-up.
      breakdown: whether no run of the search was good.
      diverged: whether F is not finite at the end of the run with them, or above where it was at the start.
      pilots: steps of x and mean f at the end of each short run.
      own: evaluations, megabytes and rounds that the search spent.
      targets: for each share of SLDBO's decrease of F and each cost what `spent_until` returns, by name: with the pair
        of the grid that the tuning seeds choose for it (tuned) and with suggested steps (suggested); and whether that
        pair reaches it on all tuning seeds (everywhere). Without shares that have no target on some of the seeds.
    """

    step_sizes: dict[str, float]
    curvature: float
    warm_up: int
    breakdown: bool
    diverged: bool
    pilots: list[dict[str, float]]
    own: dict[str, float]
    targets: dict[str, dict[str, dict[str, Any]]]


class Studied(NamedTuple):
    """A task: the methods that it compares, and `make(quick)` of its job and its agents."""

    methods: Sequence[str]
    make: Callable[[bool], tuple[Job, Agents]]


def penalties(data: Literal["synthetic", "mnist"], quick: bool, quick_iterations: int) -> tuple[Job, Agents]:
    """Penalties of a logistic or softmax regression."""
    config, setting = regularization.Config(data=data, common=shared(quick)), regularization.SETTINGS[data]
    level = regularization.curvature(config.load(0))
    inner_grid = [step / level for step in regularization.INNER_GRID]
    job = _job(
        data,
        lambda seed: regularization.network(config.load(seed), setting.start),
        quick_iterations if quick else setting.iterations,
        setting.outer_grid,
        inner_grid,
    )
    return job, config.network


def digits(quick: bool) -> tuple[Job, Agents]:
    """Hyper-cleaning of digits."""
    config = hyper_cleaning.Config(common=shared(quick))
    images = config.setting
    job = _job(
        "digits",
        lambda seed: hyper_cleaning.network(config.load(seed)),
        300 if quick else images.iterations,
        [images.train * step for step in hyper_cleaning.OUTER_GRID],
        images.inner_grid,
    )
    return job, config.network


def meta(quick: bool) -> tuple[Job, Agents]:
    """Meta-learning on miniImageNet, with heads of each agent's own."""
    config = meta_learning.Config(tasks=1 if quick else 4, common=shared(quick, FEW))
    level = config.load(0).curvature()
    inner_grid = [step / level for step in meta_learning.INNER_GRID]
    iterations = 64 if quick else meta_learning.ITERATIONS
    job = _job("meta", config.load, iterations, meta_learning.OUTER_GRID, inner_grid)
    return job._replace(effort=meta_learning.EFFORT), config.network


def policy(quick: bool) -> tuple[Job, Agents]:
    """Policy evaluation."""
    config = policy_evaluation.Config(common=shared(quick))
    job = _job(
        "policy",
        lambda seed: policy_evaluation.network(config.load(seed), config.network.batch_size),
        2000 if quick else 5000,
        policy_evaluation.OUTER_GRID,
        [config.states * step for step in policy_evaluation.INNER_GRID],
    )
    return job, config.network


JOBS: Mapping[str, Studied] = {
    "synthetic": Studied(METHODS, functools.partial(penalties, "synthetic", quick_iterations=600)),
    "mnist": Studied(FEW, functools.partial(penalties, "mnist", quick_iterations=150)),
    "digits": Studied(METHODS, digits),
    "meta": Studied(FEW, meta),
    "policy": Studied(METHODS, policy),
}


def shared(quick: bool, methods: Sequence[str] = METHODS) -> Options:
    """Options of all tasks."""
    return dataclasses.replace(defaults(methods), quick=quick)


def _job(
    name: str,
    load: Callable[[int], Network],
    iterations: int,
    outer_grid: Sequence[float],
    inner_grid: Sequence[float],
) -> Job:
    kept = functools.cache(load)
    return Job(name, name, TASK, kept, iterations, outer_grid, inner_grid, {}, GRADIENT, {})


def correction_of(row: Row, personal: bool) -> Any:
    """What a method corrects its directions by; x alone where each agent has a lower level of its own."""
    correction = bx.single_loop.correction
    upper = correction.exact_diffusion() if row.name == "sparkle-ed" else correction.tracking()
    return bx.Levels(upper, correction.local(), correction.local()) if personal else upper


def suggested(
    row: Row, turn: Turn, here: Here, topologies: bx.Levels, seed: int, settings: dict[str, float], tuned: Measured
) -> Suggestion:
    """Finds steps for a method on a judged seed, and runs on with them."""
    network = here.networks[seed]
    graphs = row.graphs(topologies)
    gossip, correction = bx.gossip(graphs.x), correction_of(row, network.personal)
    problem, batch = network.problem, network.batch

    def make(step_sizes: bx.Levels) -> bx.problem.Algorithm:
        return row.make(network, gossip, step_sizes, **settings)

    found, info = bx.single_loop.suggest_step_sizes(
        make, problem, gossip, *network.start, batch, jax.random.key(seed), correction=correction
    )
    pilots = [
        {"x": float(x), "y": float(y), "score": float(score)}
        for x, y, score in zip(info.steps.x, info.steps.y, info.scores, strict=True)
        if not np.isnan(x)
    ]
    calls = bx.problem.Calls(*(float(jnp.mean(part)) for part in info.calls))
    own = {
        "derivatives": row.at_start + evaluated(calls, shares(row, network), float(info.slopes)),
        "megabytes": float(jnp.mean(info.bytes)) / 1e6,
        "rounds": float(info.rounds),
    }
    spent = {name: jnp.asarray(number, float) for name, number in own.items()}

    def begin(pick: Pick, x: Any, y: Any, batch: bx.Batch) -> Carry:
        return Carry(info.state, *network.point(info.state.x, info.state.y), jnp.zeros(()), spent)

    steps = bx.Levels(*(float(step) for step in found))
    curve: Any = {}
    if not bool(info.breakdown):
        going = turn._replace(program=lambda: turn.program()._replace(begin=begin))
        curve = attempt(going, here, seed, Pick(bx.Levels(*map(jnp.asarray, found)), settings), math.inf).curve
    targets = {
        f"{level.share:g}": {name: _both(row, level, name, seed, curve, own[name], tuned) for name in COSTS}
        for level in SHARES
        if tuned.chosen(row.name, level, COSTS[0]) is not None and seed in tuned.targets(tuned.judged, level)
    }
    first, last = here.starts[seed]["exact_loss"], curve["exact_loss"][-1] if curve else 0.0
    diverged = first is None or last is None or not last <= first
    found_here = steps._asdict(), float(info.curvature), int(info.warm_up), bool(info.breakdown), diverged
    return Suggestion(*found_here, pilots, own, targets)


def _both(
    row: Row, level: Level, name: str, seed: int, curve: Curve, own: float, tuned: Measured
) -> dict[str, dict[str, float] | bool]:
    """What is spent of one cost until a level, with both kinds of steps."""
    target, found = tuned.targets(tuned.judged, level)[seed], tuned.chosen(row.name, level, name)
    mine = spent_until(curve, name, level.metric, target) if curve else Spent(math.inf, False, math.inf)
    amounts = (max(own, amount) for amount in (mine.amount, mine.least, mine.most))  # nothing is known within a search
    amount, least, most = amounts
    return {
        "tuned": tuned.spent(row.name, level, name)[seed]._asdict(),
        "suggested": Spent(amount, mine.reached, least, most)._asdict(),
        "everywhere": found is not None and found[1].reached == len(tuned.tuning[row.name]),
    }


def evaluated(calls: bx.problem.Calls, share: bx.problem.Calls, slopes: float) -> float:
    """Evaluations of a search: those of the curvatures and of the slopes are on all examples, whatever a method draws.

    The curvatures are one ∇_y g and twenty Hessian products, each slope is an evaluation of all directions.
    """
    whole = bx.problem.Calls(slopes, slopes + 1, slopes + 20, slopes)
    drawn = bx.problem.Calls(*(all_calls - part for all_calls, part in zip(calls, whole, strict=True)))
    return float(evaluations(drawn, share) + evaluations(whole, bx.problem.Calls(1.0, 1.0, 1.0, 1.0)))


def found_by(runs: Sequence[Run]) -> Measured:
    """Finished runs as the claims read them from files."""
    records = [
        Record(
            one.task,
            one.method,
            one.seed,
            one.configuration,
            {},
            "",
            one.outcome.metrics,
            one.outcome.curve,
            tries=[each._asdict() for each in one.tries],
        )
        for one in runs
    ]
    return measured({TASK: records}, TASK)


def compared(job: Job, agents: Agents, options: Options) -> Iterator[Run]:
    """For each of the methods and judged seeds a run whose configuration is the `Suggestion`."""
    kinds = personal_rows if job.load(options.seed).personal else rows
    everything = kinds(functools.partial(COINS[agents.coins][0], block=agents.agents), agents.batch_size)
    chosen = options.chosen(everything)
    finished = list(runs(job, agents, options, chosen, Place(), lambda number: None))
    judged = {(run.method, run.seed): run for run in finished if run.configuration["role"] == "judged"}
    tuned = found_by(finished)
    topologies, here = agents.topologies(options.seed), prepare(job, options, Place())
    for row in chosen:
        turn, own = turn_of(row, job, topologies, here, Place()), kept(options).within(job.name).within(row.name)
        for seed in here.judging:
            settings = judged[row.name, seed].configuration["settings"]
            work = functools.partial(suggested, row, turn, here, topologies, seed, settings, tuned)
            one = own.once(f"suggested-seed{seed}", work, Suggestion)
            about = {**{"job": job.name, "row": row.name, "agents": agents.agents, "role": "judged"}, **one._asdict()}
            flat = {
                f"{name}_{level.share:g}": value
                for level in SHARES
                for name, value in numbers(one.targets.get(f"{level.share:g}")).items()
            }
            metrics = {"search": one.own["derivatives"], "search_megabytes": one.own["megabytes"]}
            metrics |= {"diverged": float(one.diverged), **flat}
            yield Run(TASK, f"{job.name}-{row.name}", seed, about, Outcome((), metrics, {}))


def numbers(target: Mapping[str, Any] | None) -> dict[str, float]:
    """Evaluations until a target, and their ratio; inf where it was not reached or there is none."""
    both = {} if target is None else target["derivatives"]
    tuned, mine = (both[who]["amount"] if both and both[who]["reached"] else math.inf for who in ("tuned", "suggested"))
    ratio = mine / tuned if math.isfinite(mine) and math.isfinite(tuned) else math.inf
    return {"tuned": tuned, "suggested": mine, "ratio": ratio}


def table(finished: Sequence[Run]) -> Table:
    """Medians over seeds."""
    drawn = Table(box=box.SIMPLE, title="Suggested step sizes", pad_edge=False)
    heads = (
        "task",
        "method",
        "a_x",
        "a_y L",
        "own",
        "tuned .9",
        "suggested .9",
        "tuned .99",
        "suggested .99",
        "ratio .99",
    )
    for head in heads:
        drawn.add_column(head, justify="left" if head in heads[:2] else "right")
    for name in dict.fromkeys(run.method for run in finished):
        seeds = [run.configuration for run in finished if run.method == name]

        def median(of: Callable[[dict[str, Any]], float], seeds: list[dict[str, Any]] = seeds) -> str:
            return f"{np.median([of(one) for one in seeds]):.3g}"

        def spent(name: str, seeds: list[dict[str, Any]] = seeds) -> list[str]:
            shares = [[numbers(one["targets"].get(f"{level.share:g}"))[name] for one in seeds] for level in SHARES]
            return [f"{np.median(each):.3g}" for each in shares]

        (tuned, most_tuned), (found, most_found) = spent("tuned"), spent("suggested")
        drawn.add_row(
            seeds[0]["job"],
            seeds[0]["row"],
            median(lambda one: one["step_sizes"]["x"]),
            median(lambda one: one["step_sizes"]["y"] * one["curvature"]),
            median(lambda one: one["own"]["derivatives"]),
            *(tuned, found, most_tuned, most_found),
            spent("ratio")[-1],
        )
    return drawn


@dataclasses.dataclass(frozen=True)
class Config:
    """Step sizes that agents find by themselves, beside those that are tuned on a grid."""

    seeds: int = 3
    """How many judged seeds."""
    quick: bool = False
    """Fewer iterations."""
    jobs: tuple[str, ...] = tuple(JOBS)
    """Tasks: penalties of synthetic data and of mnist, hyper-cleaning of digits, meta-learning, policy evaluation."""
    results: Path = Path("results")
    """Folder of the results; files go to a subfolder with the name of the task, and -quick."""
    checkpoint: Path | None = None
    """Folder in which the command keeps what is done, so that the same command goes on where it was killed."""
    checkpoint_every: float = CHECKPOINT_EVERY
    """Seconds between states that are kept within a run, at least; 0: one at each checkpoint of it."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if self.seeds < 1:
            raise ValueError(f"seeds must be an int >= 1; got {self.seeds}. Pass --seeds 1 or more.")
        if not {*self.jobs} <= {*JOBS}:
            raise ValueError(
                f"jobs must be some of {', '.join(JOBS)}; got {' '.join(self.jobs)}. Pass, say, --jobs policy."
            )

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        console = Console(highlight=False)
        folder = prepared(self, TASK, console)
        finished = []
        for methods, make in map(JOBS.__getitem__, self.jobs):
            options = dataclasses.replace(
                shared(self.quick, methods),
                seeds=self.seeds,
                checkpoint=self.checkpoint,
                checkpoint_every=self.checkpoint_every,
            )
            for run in compared(*make(self.quick), options):
                run.write(folder)
                finished.append(run)
                console.print(f"{run.method}, seed {run.seed}: {run.outcome.metrics}", markup=False)
        console.print(table(finished))
        console.print(CAPTION, markup=False)
        return 0

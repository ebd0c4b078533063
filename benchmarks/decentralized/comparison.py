"""The harness of the decentralized tasks: every method is tuned alike, has the same budget, and is judged alike."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure

import bilevax as bx
from benchmarks.decentralized.choices import COINS, Agents
from benchmarks.decentralized.exact import Effort, evaluator, losses
from benchmarks.decentralized.figure import Panel, draw
from benchmarks.decentralized.foreign import foreign
from benchmarks.decentralized.levels import Try
from benchmarks.decentralized.methods import Row, pace, refusal
from benchmarks.decentralized.network import Network
from benchmarks.decentralized.placement import place
from benchmarks.decentralized.rows import CAPTION as METHODS
from benchmarks.decentralized.rows import personal_rows, rows
from benchmarks.decentralized.running import (
    Pick,
    Program,
    backward,
    before,
    compiled,
    evaluate,
    first_point,
    follow,
    glance,
    kept,
    of_both,
    of_loss,
)
from benchmarks.decentralized.trying import (
    BASE,
    LONGER,
    TUNING,
    aimed,
    alike,
    base_of,
    chosen,
    described,
    highest,
    picks,
    schedule,
    tuning_seeds,
    undivided,
)
from benchmarks.harness.errors import DataError
from benchmarks.harness.loop import Outcome
from benchmarks.harness.plugin import DECENTRALIZED
from benchmarks.harness.report import COSTS, Columns, Run
from benchmarks.harness.runner import Advance, Options, Task, perform

CHECKPOINTS = 20  # √2 apart: the first one after some three iterations, before any target
BUDGET = 120.0  # seconds of a run, so that derivatives and not seconds end it
SPENT: Columns = {
    "exact_loss": ("F(x)", "{:.4f}".format),
    "exact_gradient": ("|∇F(x)|²", "{:.1e}".format),
    "consensus": ("dist. of\nx_i", "{:.1e}".format),
    "derivatives": ("deriv.\nevals", "{:,.0f}".format),
    "megabytes": ("sent\n(MB)", "{:,.1f}".format),
    "rounds": ("comm.\nrounds", "{:,.0f}".format),
    "seconds": COSTS["seconds"],
    "cpu_seconds": COSTS["cpu_seconds"],
}
CAPTION = """\
All at the mean x, where F(x) and its gradient are of the accurately solved inner problem. deriv. evals: of one agent,
where one is ∇f, ∇_y g, a Hessian and a cross product on all its examples (a quarter each, and a minibatch counts as
its share); sent: by one agent to all its neighbours; dist.: root mean square distance of the agents' x to their mean.
Each method has as many iterations as evaluate no more derivatives than {iterations} of sldbo do, at most twice as many;
s3ldbo, which skips, {longer} times as many as sldbo.
Steps: each method tries the same {pairs} pairs of step sizes, with three momenta where it has one, on {tuning}
seeds that are not among those of the table. It has those that bring F(x) for good to 99% of sldbo's decrease with the
fewest derivative evaluations on the worse of them; if none does so on either, or sldbo is not among the methods, those
whose last F(x) is the lowest. The files hold those for other targets too.
"""


class Job(NamedTuple):
    """A decentralized task.

    Attributes:
      name: in the JSON files.
      title: of the table.
      folder: subfolder of the results.
      load: `load(seed)`; the same problem and shapes for all seeds save time.
      iterations: of SLDBO.
      outer_grid: step sizes of x.
      inner_grid: step sizes of y and v.
      columns: of the table, the scores of the task in front of those of all tasks.
      panel: what is drawn under F(x): a score, or the gradient.
      configuration: what the task chose, for the JSON files.
      caption: its own lines.
      effort: of the accurate solution.
      finish: `finish(figure, runs)` adds something below the curves, if anything.
      gradients: whether tries keep ‖∇F‖² too, for targets of it; that more than doubles the cost of F.
    """

    name: str
    title: str
    folder: str
    load: Callable[[int], Network]
    iterations: int
    outer_grid: Sequence[float]
    inner_grid: Sequence[float]
    columns: Columns
    panel: Panel
    configuration: Mapping[str, Any]
    caption: str = ""
    effort: Effort = Effort()
    finish: Callable[[Figure, Sequence[Run]], None] | None = None
    gradients: bool = False


class Place(NamedTuple):
    """Where the agents live; see `placement.place`."""

    devices: int = 1
    by: str = "shard_map"
    budget: float | None = None  # seconds in place of the option: several hosts must not stop at different iterations


def defaults(methods: Sequence[str]) -> Options:
    """The options of a decentralized task, whose rows are algorithms of agents."""
    return Options(tuple(methods), budget=BUDGET, kind=DECENTRALIZED)


class Here(NamedTuple):
    """What all rows of a comparison share.

    Attributes:
      networks: of each seed, with batches of one shape.
      undivided: the batch of each seed that F is found with.
      judging, tuning: seeds.
      exactly: F, its gradient and how well both are known.
      look: what a try is judged by, at a point and with a batch.
      starts: what it says of each seed before the first iteration, with what has been spent.
      checkpoints: most of a run.
      budget: seconds of a run.
    """

    networks: Mapping[int, Network]
    undivided: Mapping[int, bx.Batch]
    judging: Sequence[int]
    tuning: Sequence[int]
    exactly: Callable[..., Any]
    look: Callable[..., dict[str, float | None]]
    starts: Mapping[int, Mapping[str, float | None]]
    checkpoints: int
    budget: float

    @property
    def first(self) -> Network:
        """The one that programs are compiled for."""
        return self.networks[self.judging[0]]


class Turn(NamedTuple):
    """A row whose turn it is.

    Attributes:
      row: of the table.
      grid: its picks.
      stops: iterations of its checkpoints.
      program: for every pick, on one device.
      placed: makes the program of one pick where the agents live on several; None where they do not.
    """

    row: Row
    grid: Sequence[Pick]
    stops: Sequence[int]
    program: Program
    placed: Callable[[Pick], Program] | None


def prepare(job: Job, options: Options, where: Place) -> Here:
    """Loads all seeds."""
    judging, tuning = options.all_seeds, tuning_seeds(options.all_seeds)
    networks = alike({seed: job.load(seed) for seed in (*judging, *tuning)})
    batches = {seed: jax.device_put(undivided(network)) for seed, network in networks.items()}
    first = networks[options.seed]
    exactly = evaluator(first, job.effort)
    look = of_both(exactly) if job.gradients else of_loss(losses(first, job.effort))
    begun = {"outer_step": 0, "megabytes": 0.0, "rounds": 0.0}
    return Here(
        networks,
        batches,
        judging,
        tuning,
        exactly,
        look,
        {seed: {**begun, **look(*first_point(network), batches[seed])} for seed, network in networks.items()},
        CHECKPOINTS,
        options.budget if where.budget is None else where.budget,
    )


def turn_of(row: Row, job: Job, topologies: bx.Levels, here: Here, where: Place) -> Turn:
    """Compiles a row."""
    graphs, first = row.graphs(topologies), here.first
    topology = graphs.x if graphs.x is graphs.y is graphs.v else graphs
    grid = picks(job.outer_grid, job.inner_grid, row.settings)

    def on(pick: Pick) -> Callable[[Any], bx.problem.Algorithm]:
        return lambda gossip: row.make(first, gossip, pick.steps, **pick.settings)

    def spread(pick: Pick) -> Program:
        placed = place(on(pick), topology, where.devices, where.by)
        return compiled(row, lambda _: placed, first, pick, jit=False)

    program = compiled(row, lambda pick: place(on(pick), topology, 1, where.by), first, grid[0])
    stops = schedule(row, first, job.iterations, here.checkpoints)
    return Turn(row, grid, stops, program, spread if where.devices > 1 else None)


def attempt(turn: Turn, here: Here, seed: int, pick: Pick, enough: float) -> Try:
    """Runs a pick, and keeps what targets are judged by: from the end back to where F is above `enough`."""
    network = here.networks[seed]
    run = follow(turn.program, pick, network, network.batch, jax.random.key(seed), turn.stops, glance, here.budget)
    look = functools.partial(here.look, batch=here.undivided[seed])
    curve = run.curve | backward(look, run.curve["point"], enough)
    return tried(pick, kept({**here.starts[seed], "derivatives": float(turn.row.at_start)}, curve, turn.stops))


def tried(pick: Pick, curve: Mapping[str, Any]) -> Try:
    """What was tried, and its curve."""
    return Try(pick.steps._asdict(), dict(pick.settings), curve)


def whole(turn: Turn, here: Here, seed: int, pick: Pick, program: Program) -> tuple[Outcome, Try]:
    """Runs the pick of the table where its agents live, and records all there is."""
    network, exactly = here.networks[seed], functools.partial(here.exactly, batch=here.undivided[seed])
    run = follow(
        program,
        pick,
        network,
        program.put(network.batch),
        jax.random.key(seed),
        turn.stops,
        functools.partial(evaluate, network, exactly),
        here.budget,
    )
    outcome, first = run.outcome(program), before(network, exactly, turn.row.at_start)
    curve = {name: [first.get(name), *values] for name, values in outcome.curve.items()}
    return outcome._replace(curve=curve), tried(pick, kept(first, run.curve, turn.stops))


def runs(
    job: Job, agents: Agents, options: Options, rows: Sequence[Row], where: Place, advance: Advance
) -> Iterator[Run]:
    """Runs every pick of each row on the tuning seeds, and those that are chosen on the others; SLDBO first."""
    here, base, levels = prepare(job, options, where), None, aimed(job.gradients)
    limits = dict.fromkeys(here.tuning, -math.inf)  # without SLDBO the end of a try is all that counts
    for row in rows:
        turn = turn_of(row, job, agents.topologies(options.seed), here, where)
        part = functools.partial(advance, max(1, round(job.iterations / len(turn.grid))))
        looked = dict.fromkeys(limits, math.inf) if job.gradients or row.name == BASE else limits
        tries = {
            seed: [_told(part, attempt(turn, here, seed, pick, looked[seed])) for pick in turn.grid]
            for seed in here.tuning
        }
        if row.name == BASE:
            base = base_of(turn.grid, [*tries.values()], levels)
            limits.update({seed: highest(curve) for seed, curve in zip(here.tuning, base.curves, strict=True)})
        found = chosen(row, turn.grid, [*tries.values()], base, levels)
        main = turn.grid[found.main]
        settled = {
            **job.configuration,
            **options.origin(row.name),
            **{name: getattr(agents, name) for name in ("agents", "topology", "lower_topology", "coins")},
            "batch_size": row.batch_size,
            "outer_steps": turn.stops[-1],
            "pace": pace(row, here.first),
            "budget": here.budget,
            "devices": where.devices,
            "placement": where.by if where.devices > 1 else None,
            **described(turn.grid, found, here.tuning),
        }
        for seed in here.tuning:
            curve = tries[seed][found.main].curve
            metrics = {name: values[-1] for name, values in curve.items() if name != "outer_step"}
            whole_curve = {name: [*values] for name, values in curve.items()}
            outcome = Outcome((), {**metrics, "outer_steps": turn.stops[-1]}, whole_curve)
            yield Run(job.name, row.name, seed, {**settled, "role": "tuning"}, outcome, tries[seed])
        program = turn.placed(main) if turn.placed else turn.program
        for seed in here.judging:
            outcome, kept_here = whole(turn, here, seed, main, program)
            judged = [
                kept_here if place == found.main else attempt(turn, here, seed, turn.grid[place], math.inf)
                for place in found.places
            ]
            advance(job.iterations)
            yield Run(job.name, row.name, seed, {**settled, "role": "judged"}, outcome, judged)


def _told(advance: Callable[[], None], one: Try) -> Try:
    """The same, once the bar has moved."""
    advance()
    return one


def selected(everything: Sequence[Row], options: Options, network: Network, agents: Agents) -> tuple[list[Row], str]:
    """The wanted rows that suit problem and graphs, and a line about those that do not.

    Raises:
      DataError: if none is left.
    """
    topologies = agents.topologies(options.seed)
    plugged = functools.partial(foreign, network=network, topologies=topologies, size=agents.batch_size)
    wanted = options.chosen(everything, plugged)
    refused = {row.name: why for row in wanted if (why := refusal(row, network, topologies))}
    reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
    if len(refused) == len(wanted):
        raise DataError(f"No method is left on {agents.words}: {reasons}. Pass, say, --methods sldbo.")
    return [row for row in wanted if row.name not in refused], f"Left out: {reasons}.\n" * bool(refused)


def compare(job: Job, config: Any, where: Place = Place()) -> int:  # noqa: B008
    """Runs everything, prints the table and writes the files; returns the exit code.

    Args:
      job: the task.
      config: its options, with `network`, the agents and their graphs, and `common`, the methods and seeds.
      where: devices.

    Raises:
      DataError: if no method is left.
    """
    agents, options = config.network, config.common
    coins, words = COINS[agents.coins]
    first, *_ = [job.load(seed) for seed in options.all_seeds]
    everything = (personal_rows if first.personal else rows)(
        functools.partial(coins, block=agents.agents // where.devices), agents.batch_size
    )
    wanted, left_out = selected(everything, options, first, agents)
    wanted = sorted(wanted, key=lambda row: row.name != BASE)  # whose ends make the targets
    make = functools.partial(runs, job, agents, options, wanted, where)
    if jax.process_index() > 0:  # the first host reports
        return 0 * sum(1 for _ in make(lambda number: None))
    count = len(job.outer_grid) * len(job.inner_grid)
    shared = CAPTION.format(pairs=count, iterations=job.iterations, longer=LONGER, tuning=TUNING)
    about = METHODS.format(coins=words, batch_size=agents.batch_size)
    task = Task(
        title=f"{job.title}, {agents.words}",
        folder=job.folder,
        outer_steps=job.iterations,
        methods=[row.name for row in wanted],
        anchors=(),
        runs=make,
        columns={**job.columns, **SPENT},
        caption=job.caption + shared + about + left_out,
        draw=lambda finished: draw(finished, job.panel, job.finish),
        tuning=tuning_seeds(options.all_seeds),
    )
    return perform(task, options, config)

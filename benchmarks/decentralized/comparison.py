"""The harness of the decentralized tasks: every method is tuned alike, has the same budget, and is judged alike."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from benchmarks.decentralized.attempts import Here, Turn, attempt, prepare, turn_of, whole
from benchmarks.decentralized.choices import COINS, Agents
from benchmarks.decentralized.figure import draw
from benchmarks.decentralized.foreign import foreign
from benchmarks.decentralized.job import Job, Place
from benchmarks.decentralized.levels import Try
from benchmarks.decentralized.methods import Row, pace, refusal
from benchmarks.decentralized.network import Network
from benchmarks.decentralized.rows import CAPTION as METHODS
from benchmarks.decentralized.rows import personal_rows, rows
from benchmarks.decentralized.trying import (
    BASE,
    LONGER,
    Chosen,
    aimed,
    base_of,
    chosen,
    described,
    highest,
    tuning_seeds,
)
from benchmarks.harness.errors import DataError
from benchmarks.harness.loop import Outcome
from benchmarks.harness.plugin import DECENTRALIZED
from benchmarks.harness.report import COSTS, Columns, Run
from benchmarks.harness.resuming import kept
from benchmarks.harness.runner import Advance, Options, Task, perform

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
Steps: each method tries the same {pairs} pairs of step sizes, with three momenta where it has one, on seeds that are
not among those of the table: {tuning}. It has those that bring F(x) for good to 99% of sldbo's decrease with the fewest
derivative evaluations on the worst of them; if none does so on any, or sldbo is not among the methods, those whose last
F(x) is the lowest. The files hold those for other targets too.
"""


def defaults(methods: Sequence[str]) -> Options:
    """The options of a decentralized task, whose rows are algorithms of agents."""
    return Options(tuple(methods), budget=BUDGET, kind=DECENTRALIZED)


def tuning_run(job: Job, name: str, seed: int, settled: dict[str, Any], main: int, tries: Sequence[Try]) -> Run:
    """The file of a seed that steps are chosen on: all tries, and the curve of the one that is chosen for the table."""
    curve = {name: [*values] for name, values in tries[main].curve.items()}
    metrics = {name: values[-1] for name, values in curve.items() if name != "outer_step"}
    outcome = Outcome((), {**metrics, "outer_steps": settled["outer_steps"]}, curve)
    return Run(job.name, name, seed, {**settled, "role": "tuning"}, outcome, tries)


def configured(
    job: Job, agents: Agents, options: Options, where: Place, here: Here, turn: Turn, found: Chosen
) -> dict[str, Any]:
    """What was chosen for a row, for its files."""
    row = turn.row
    return {
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


def runs(
    job: Job, agents: Agents, options: Options, rows: Sequence[Row], where: Place, advance: Advance
) -> Iterator[Run]:
    """Runs every pick of each row on the tuning seeds, and those that are chosen on the others; SLDBO first."""
    work = kept(options).within(job.name)
    here, base, levels = prepare(job, options, where), None, aimed(job.gradients)
    limits = dict.fromkeys(here.tuning, -math.inf)  # without SLDBO the end of a try is all that counts
    for row in rows:
        turn, own = turn_of(row, job, agents.topologies(options.seed), here, where), work.within(row.name)
        tries: dict[int, list[Try]] = {seed: [] for seed in here.tuning}
        for (seed, found_here), (place, pick) in itertools.product(tries.items(), enumerate(turn.grid)):
            everything = job.gradients or row.name == BASE
            one = functools.partial(attempt, turn, here, seed, pick, math.inf if everything else limits[seed])
            found_here.append(own.by_steps(f"try-{place}-seed{seed}", one, Try))
            advance(max(1, round(job.iterations / len(turn.grid))))
        if row.name == BASE:
            base = base_of(turn.grid, [*tries.values()], levels)
            limits = {seed: highest(curve) for seed, curve in zip(here.tuning, base.curves, strict=True)}
        found = chosen(row, turn.grid, [*tries.values()], base, levels)
        settled = configured(job, agents, options, where, here, turn, found)
        for seed in here.tuning:
            yield tuning_run(job, row.name, seed, settled, found.main, tries[seed])
        main = turn.grid[found.main]
        program = functools.cache(functools.partial(turn.placed, main)) if turn.placed else turn.program
        for seed in here.judging:
            of_table = functools.partial(whole, turn, here, seed, main, program)
            outcome, of_main = own.by_steps(f"judged-seed{seed}", of_table, Outcome, Try)
            others = {}
            for place in {*found.places} - {found.main}:
                one = functools.partial(attempt, turn, here, seed, turn.grid[place], math.inf)
                others[place] = own.by_steps(f"judged-{place}-seed{seed}", one, Try)
            judged = [{**others, found.main: of_main}[place] for place in found.places]
            advance(job.iterations)
            yield Run(job.name, row.name, seed, {**settled, "role": "judged"}, outcome, judged)


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
    tuning = tuning_seeds(options.all_seeds)
    shared = CAPTION.format(pairs=count, iterations=job.iterations, longer=LONGER, tuning=", ".join(map(str, tuning)))
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
        tuning=tuning,
    )
    return perform(task, options, config)

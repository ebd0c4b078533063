"""The harness of the decentralized tasks: every method is tuned alike, has the same budget, and is judged alike."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import bilevax as bx
from benchmarks.decentralized.choices import COINS, Agents
from benchmarks.decentralized.exact import Effort, evaluator
from benchmarks.decentralized.figure import Panel, draw
from benchmarks.decentralized.foreign import foreign
from benchmarks.decentralized.methods import Row, pace, refusal
from benchmarks.decentralized.network import Network
from benchmarks.decentralized.placement import gossip, place
from benchmarks.decentralized.rows import CAPTION as METHODS
from benchmarks.decentralized.rows import personal_rows, rows
from benchmarks.decentralized.running import before, compiled, evaluate, tuned
from benchmarks.harness.errors import DataError
from benchmarks.harness.loop import drive
from benchmarks.harness.plugin import DECENTRALIZED
from benchmarks.harness.report import COSTS, Columns, Run
from benchmarks.harness.runner import Advance, Options, Task, perform

CHECKPOINTS, QUICK_CHECKPOINTS = 20, 12
TUNED = 2  # seeds that step sizes are chosen on, where there are so many
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
Each method has as many iterations as evaluate no more derivatives than {iterations} of sldbo do, at most twice as many
(s3ldbo: as many as sldbo).
Steps: for each method the best of the same {pairs} pairs of step sizes, by the last F(x) of the worse of the first two
seeds, without those whose outer loss was above that of the start halfway, or whose agents drifted apart.
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


class Place(NamedTuple):
    """Where the agents live; see `placement.place`."""

    devices: int = 1
    by: str = "shard_map"
    budget: float | None = None  # seconds in place of the option: several hosts must not stop at different iterations


def defaults(methods: Sequence[str]) -> Options:
    """The options of a decentralized task, whose rows are algorithms of agents."""
    return Options(tuple(methods), budget=BUDGET, kind=DECENTRALIZED)


def pairs(job: Job) -> bx.Levels:
    """Every pair of an outer step and an inner one, which serves v too; leaves [pairs]."""
    x, y = (part.ravel() for part in np.meshgrid(np.asarray(job.outer_grid, float), np.asarray(job.inner_grid, float)))
    return bx.Levels(x, y, y)


def schedule(row: Row, network: Network, iterations: int, checkpoints: int) -> tuple[int, int]:
    """Number of chunks and iterations of each, where SLDBO would take so many iterations in all."""
    own = max(1, math.floor(iterations * pace(row, network)))
    size = max(1, own // checkpoints)
    return own // size, size


def runs(
    job: Job, agents: Agents, options: Options, chosen: Sequence[Row], where: Place, advance: Advance
) -> Iterator[Run]:
    """Tunes each method on the first seeds, and runs it on all of them."""
    networks = {seed: job.load(seed) for seed in options.all_seeds[:TUNED]}
    first, budget = job.load(options.seed), options.budget if where.budget is None else where.budget
    checkpoints, exactly = QUICK_CHECKPOINTS if options.quick else CHECKPOINTS, evaluator(first, job.effort)
    for row in chosen:
        graphs = row.graphs(agents.topologies(options.seed))
        topology = graphs.x if graphs.x is graphs.y is graphs.v else graphs
        number, size = schedule(row, first, job.iterations, checkpoints)
        choice = tuned(_over(row, first, gossip(topology)), networks, exactly, pairs(job), number * size)
        steps, shapes = bx.Levels(**choice["step_sizes"]), None
        placed = place(_on(row, first, steps), topology, where.devices, where.by)
        chosen_here = {
            **job.configuration,
            **options.origin(row.name),
            **{name: getattr(agents, name) for name in ("agents", "topology", "lower_topology", "coins")},
            "batch_size": row.batch_size,
            "outer_steps": number * size,
            "pace": pace(row, first),
            "budget": budget,
            "devices": where.devices,
            "placement": where.by if where.devices > 1 else None,
            **choice,
        }
        for seed in options.all_seeds:
            network = job.load(seed)
            if (found := jax.tree.map(jnp.shape, network.batch)) != shapes:
                shapes, program = found, compiled(row, placed, network, size)
            keys = jnp.broadcast_to(jax.random.key(seed), (number, size))
            start = cast(Any, program.start)(*network.start, network.batch)
            scores = functools.partial(evaluate, network, exactly)
            scaled = functools.partial(_scaled, advance, job.iterations / number)
            outcome = drive(program, start, keys, placed.put(network.batch), scores, budget, scaled)
            first_point = before(network, exactly, row.at_start)
            curve = {name: [first_point.get(name), *values] for name, values in outcome.curve.items()}
            yield Run(job.name, row.name, seed, chosen_here, outcome._replace(curve=curve))


def _over(row: Row, network: Network, gossip: Any) -> Callable[[bx.Levels], bx.problem.Algorithm]:
    """The row, but for the step sizes."""
    return lambda steps: row.make(network, gossip, steps, **row.settings[0])


def _on(row: Row, network: Network, steps: bx.Levels) -> Callable[[Any], bx.problem.Algorithm]:
    """The row, but for the gossip."""
    return lambda gossip: row.make(network, gossip, steps, **row.settings[0])


def _scaled(advance: Advance, iterations: float, number: int) -> None:
    """Every chunk counts the same in the bar, as iterations of SLDBO."""
    advance(round(iterations))


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
    chosen, left_out = selected(everything, options, first, agents)
    make = functools.partial(runs, job, agents, options, chosen, where)
    if jax.process_index() > 0:  # the first host reports
        return 0 * sum(1 for _ in make(lambda number: None))
    count = len(job.outer_grid) * len(job.inner_grid)
    shared = CAPTION.format(pairs=count, iterations=job.iterations)
    about = METHODS.format(coins=words, batch_size=agents.batch_size)
    task = Task(
        title=f"{job.title}, {agents.words}",
        folder=job.folder,
        outer_steps=job.iterations,
        methods=[row.name for row in chosen],
        anchors=(),
        runs=make,
        columns={**job.columns, **SPENT},
        caption=job.caption + shared + about + left_out,
        draw=lambda finished: draw(finished, job.panel, job.finish),
    )
    return perform(task, options, config)

"""One row on one seed: with any pick, of which targets need little, and with the pick of the table."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

import bilevax as bx
from benchmarks.decentralized.exact import evaluator, losses
from benchmarks.decentralized.job import Job, Place
from benchmarks.decentralized.levels import Try
from benchmarks.decentralized.methods import Row
from benchmarks.decentralized.network import Network
from benchmarks.decentralized.placement import place
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
from benchmarks.decentralized.trying import alike, picks, schedule, tuning_seeds, undivided
from benchmarks.harness.loop import Outcome
from benchmarks.harness.resuming import NOWHERE, Kept
from benchmarks.harness.runner import Options

CHECKPOINTS = 20  # √2 apart: the first one after some three iterations, before any target


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
      program: makes the one for every pick, on one device, when it is first needed.
      placed: makes the program of one pick where the agents live on several; None where they do not.
    """

    row: Row
    grid: Sequence[Pick]
    stops: Sequence[int]
    program: Callable[[], Program]
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
    """Prepares a row."""
    graphs, first = row.graphs(topologies), here.first
    topology = graphs.x if graphs.x is graphs.y is graphs.v else graphs
    grid = picks(job.outer_grid, job.inner_grid, row.settings)

    def on(pick: Pick) -> Callable[[Any], bx.problem.Algorithm]:
        return lambda gossip: row.make(first, gossip, pick.steps, **pick.settings)

    def spread(pick: Pick) -> Program:
        placed = place(on(pick), topology, where.devices, where.by)
        return compiled(row, lambda _: placed, first, pick, jit=False)

    program = functools.cache(
        lambda: compiled(row, lambda pick: place(on(pick), topology, 1, where.by), first, grid[0])
    )
    stops = schedule(row, first, job.iterations, here.checkpoints)
    return Turn(row, grid, stops, program, spread if where.devices > 1 else None)


def attempt(turn: Turn, here: Here, seed: int, pick: Pick, enough: float, states: Kept = NOWHERE) -> Try:
    """Runs a pick, and keeps what targets are judged by: from the end back to where F is above `enough`."""
    network, key = here.networks[seed], jax.random.key(seed)
    run = follow(turn.program(), pick, network, network.batch, key, turn.stops, glance, here.budget, states)
    look = functools.partial(here.look, batch=here.undivided[seed])
    curve = run.curve | backward(look, run.curve["point"], enough)
    return tried(pick, kept({**here.starts[seed], "derivatives": float(turn.row.at_start)}, curve, turn.stops))


def tried(pick: Pick, curve: Mapping[str, Any]) -> Try:
    """What was tried, and its curve."""
    return Try(pick.steps._asdict(), dict(pick.settings), curve)


def whole(
    turn: Turn, here: Here, seed: int, pick: Pick, make: Callable[[], Program], states: Kept
) -> tuple[Outcome, Try]:
    """Runs the pick of the table where its agents live, and records all there is; `make` gives its program."""
    program = make()
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
        states,
    )
    outcome, first = run.outcome(program), before(network, exactly, turn.row.at_start)
    curve = {name: [first.get(name), *values] for name, values in outcome.curve.items()}
    return outcome._replace(curve=curve), tried(pick, kept(first, run.curve, turn.stops))

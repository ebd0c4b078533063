"""Every choice of step sizes runs on seeds of its own; for each target one is chosen, and is judged on other seeds."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import bilevax as bx
from benchmarks.decentralized.levels import GRADIENTS, LOSS, LOSSES, Curve, Level, Try, best, choose, wanted
from benchmarks.decentralized.methods import Row, pace
from benchmarks.decentralized.network import Network, by_weight
from benchmarks.decentralized.running import Pick
from benchmarks.harness.grid import choice

BASE = "sldbo"  # sets the targets
TUNING = 3  # seeds that steps are chosen on, at most
LONGER = 3  # a row that skips has so many times the iterations, since it needs more of them
RATIO = math.sqrt(2)  # of the iterations of one checkpoint to those of the one before


class Base(NamedTuple):
    """What SLDBO sets.

    Attributes:
      curves: of its best pair on each tuning seed: their ends make the targets.
      steps: that it has for some target, or at its end; rows that skip are judged with them too.
    """

    curves: Sequence[Curve]
    steps: Sequence[bx.Levels]


class Chosen(NamedTuple):
    """The picks of a row that are judged.

    Attributes:
      places: of all of them.
      main: place of the one of the table: the cheapest to 99 % of SLDBO's decrease of F, or that which ends lowest.
      reached: on how many tuning seeds it comes there.
    """

    places: Sequence[int]
    main: int
    reached: int


def tuning_seeds(judged: range) -> range:
    """Seeds that are not judged, three at most and no more than those that are: those behind the last."""
    return range(judged.stop, judged.stop + min(TUNING, len(judged)))


def picks(outer: Sequence[float], inner: Sequence[float], settings: Sequence[Mapping[str, float]]) -> list[Pick]:
    """Every outer step with every inner one, which serves v too, and with every setting."""
    return [
        Pick(bx.Levels(float(x), float(y), float(y)), dict(setting))
        for setting, y, x in itertools.product(settings, inner, outer)
    ]


def schedule(row: Row, network: Network, iterations: int, number: int) -> list[int]:
    """The iterations of at most so many checkpoints, √2 apart, where SLDBO would take so many in all."""
    last = max(1, math.floor(iterations * pace(row, network) * (LONGER if row.at_start else 1)))
    return sorted({max(1, round(last / RATIO**place)) for place in range(number)})


def aimed(gradients: bool) -> tuple[Level, ...]:
    """The levels of a task: of F, and of ‖∇F‖² where that is judged."""
    return (*LOSSES, *GRADIENTS) if gradients else LOSSES


def chosen(
    row: Row, grid: Sequence[Pick], tries: Sequence[Sequence[Try]], base: Base | None, levels: Sequence[Level]
) -> Chosen:
    """What is judged: the picks that some level chooses, SLDBO's own of a row that skips, and the one of the table.

    Args:
      row: of the table.
      grid: its picks.
      tries: of each tuning seed, in the order of the grid.
      base: what SLDBO sets; None where it does not run: then the pick that ends lowest is all.
      levels: of the task.
    """
    lowest = best(tries)
    if base is None:
        return Chosen([lowest], lowest, 0)
    places = {*wanted(tries, base.curves, levels), *([lowest] if row.name == BASE else [])}
    if row.at_start:
        places |= {place for place, pick in enumerate(grid) if pick.steps in base.steps}
    targets = [LOSSES[-1].target(curve) for curve in base.curves]
    main, reached = (lowest, 0) if any(map(math.isnan, targets)) else choose(tries, LOSS, "derivatives", targets)
    main = main if reached else lowest
    return Chosen(sorted({*places, main}), main, reached)


def base_of(grid: Sequence[Pick], tries: Sequence[Sequence[Try]], levels: Sequence[Level]) -> Base:
    """What SLDBO sets, of its own tries."""
    lowest = best(tries)
    curves = [seed[lowest].curve for seed in tries]
    return Base(curves, [grid[place].steps for place in {lowest, *wanted(tries, curves, levels)}])


def highest(curve: Curve) -> float:
    """The highest target of F that a curve of SLDBO makes: what a try does while it is above that chooses nothing."""
    target = LOSSES[0].target(curve)
    return -math.inf if math.isnan(target) else target


def described(grid: Sequence[Pick], found: Chosen, seeds: Sequence[int]) -> dict[str, Any]:
    """For the configuration of a run: what there was to choose from, and what was chosen for the table."""

    def numbers(pick: Pick) -> dict[str, float]:
        return {"x": pick.steps.x, "y": pick.steps.y, **pick.settings}

    everything = [numbers(pick) for pick in grid]
    values = {name: [each[name] for each in everything] for name in everything[0]}
    pick = grid[found.main]
    return {
        **choice(values, everything[found.main]),  # v has the step of y
        "step_sizes": pick.steps._asdict(),
        "settings": dict(pick.settings),
        "tuning_seeds": list(seeds),
        "reached": found.reached,
    }


def alike(networks: Mapping[int, Network]) -> dict[int, Network]:
    """The networks with batches of one shape, so that one program serves all seeds.

    More rows that fill up, whose weights are 0, change no mean once the weights have grown by as much.
    """
    if not all(map(fills_up, networks.values())):
        return dict(networks)
    batches = [network.batch for network in networks.values()]
    longest = [max(np.shape(part[-1])[1] for part in parts) for parts in zip(*batches, strict=True)]
    return {
        seed: network._replace(batch=bx.Batch(*map(_filled, network.batch, longest)))
        for seed, network in networks.items()
    }


def undivided(network: Network) -> bx.Batch:
    """The batch as if it were that of one agent, without rows that fill up: F is the same, and found faster."""
    return bx.Batch(*map(_joined, network.batch)) if fills_up(network) else network.batch


def fills_up(network: Network) -> bool:
    """Whether both parts of the batch are rows [n, L, ...], and end with their weights [n, L]."""
    return network.sample is by_weight


def _filled(part: Any, length: int) -> Any:
    """Rows and their weights, so many of each agent."""
    *rows, weights = (np.asarray(leaf) for leaf in part)
    more = length - weights.shape[1]
    grown = (weights * (length / weights.shape[1])).astype(weights.dtype)
    return tuple(np.pad(leaf, [(0, 0), (0, more), *[(0, 0)] * (leaf.ndim - 2)]) for leaf in (*rows, grown))


def _joined(part: Any) -> Any:
    """All rows that have a weight, and their weights, with an axis of one agent."""
    *rows, weights = (np.asarray(leaf).reshape(-1, *np.shape(leaf)[2:]) for leaf in part)
    kept = weights > 0
    share = (weights[kept] * (kept.sum() / len(kept))).astype(weights.dtype)
    return tuple(leaf[None] for leaf in (*(leaf[kept] for leaf in rows), share))

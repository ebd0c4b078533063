"""What a curve reaches and when: targets, sustained crossings, and the try that is chosen for each target."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

LOSS, GRADIENT = "exact_loss", "exact_gradient"
SHARES = (0.5, 0.9, 0.99)  # of SLDBO's decrease of F
EPSILONS = (0.3, 0.1, 0.03, 0.01)  # of the first ‖∇F‖²
COSTS = ("derivatives", "megabytes", "rounds")
LASTING = 4.0  # a curve has come to a target if it stays there until so many times the cost are spent, or to its end
LAST = 0.25  # part of a run whose pace tells what a longer one could do at best

Curve = Mapping[str, Sequence[float | None]]


class Try(NamedTuple):
    """One choice of step sizes on one seed.

    Attributes:
      step_sizes: of x, y and v.
      settings: what else was chosen, such as a momentum.
      curve: lists of one length, an entry for each checkpoint, the start first; None for what was not finite.
    """

    step_sizes: Mapping[str, float]
    settings: Mapping[str, Any]
    curve: Curve

    @property
    def choice(self) -> tuple[Mapping[str, float], Mapping[str, Any]]:
        """What was chosen: two tries of it differ by their seeds alone."""
        return self.step_sizes, self.settings


class Level(NamedTuple):
    """How far down a curve has to come.

    Attributes:
      metric: of the curve.
      share: of SLDBO's decrease of F since the start; of ‖∇F‖², what is left of the first.
    """

    metric: str
    share: float

    def target(self, base: Curve) -> float:
        """The value to reach on a seed.

        Args:
          base: SLDBO's own best curve there.

        Returns:
          The value; NaN where F does not fall, or the first ‖∇F‖² is not finite.
        """
        values = along(base, self.metric)
        if not len(values):
            return math.nan
        first, last = float(values[0]), float(values[-1])
        if self.metric == GRADIENT:
            return self.share * first if math.isfinite(first) else math.nan
        return first - self.share * (first - last) if last < first else math.nan


LOSSES = tuple(Level(LOSS, share) for share in SHARES)
GRADIENTS = tuple(Level(GRADIENT, share) for share in EPSILONS)


class Spent(NamedTuple):
    """What was spent until a target was reached, or in all if it was not.

    Attributes:
      amount: spent; inf by a run that diverges.
      reached: whether the curve is at or below the target from there on, for long enough.
      least: what a longer run would spend if it kept the pace of its last quarter, which falling curves seldom do: a
        lower bound. inf where the curve no longer falls. Where the target was reached, `amount`; but a target that was
        reached before the first checkpoint may have cost one iteration, or all of them.
      most: all of these, in that case; else `amount`.
    """

    amount: float
    reached: bool
    least: float
    most: float = math.inf

    @property
    def short(self) -> bool:
        """Whether a longer run might have reached the target."""
        return not self.reached and math.isfinite(self.least)


class Choice(NamedTuple):
    """The try that is taken for a target.

    Attributes:
      place: among the tries.
      reached: on how many of the seeds it reaches the target. Less than all: no try does on all of them, and this is
        the best of those that reach it on most.
    """

    place: int
    reached: int


def along(curve: Curve, name: str) -> np.ndarray:
    """A curve, with NaN for what was not finite."""
    values = np.array([np.nan if value is None else value for value in curve.get(name, ())], float)
    return np.where(np.isfinite(values), values, np.nan)


def spent_until(curve: Curve, cost: str, metric: str, target: float, lasting: float = LASTING) -> Spent:
    """What a run had spent when the metric came to the target to stay.

    That is between two checkpoints, linear in the metric's logarithm: the last one above the target, and the next, from
    which on all are at most the target. What is not finite is above. A start at the target has cost what it cost.

    Args:
      curve: of the run.
      cost: name of the curve of what is spent.
      metric: name of the curve that falls.
      target: the value to reach.
      lasting: it has to stay until so many times the cost are spent; what becomes of it later, where a run for this
        target would have ended, does not count. inf for the whole run.

    Returns:
      What was spent, and whether that was enough.
    """
    costs, values = along(curve, cost), along(curve, metric)
    if not len(values):
        return Spent(0.0, False, math.inf)
    below = values <= target
    at = next((place for place in range(len(values)) if below[place] and _stays(costs, below, place, lasting)), None)
    if at is None and math.isnan(values[-1]):
        return Spent(math.inf, False, math.inf)
    if at is None:
        return Spent(float(costs[-1]), False, _at_best(costs, values, target))
    if at == 0 or math.isnan(values[at - 1]):
        return _arrived(costs[at])
    scale = np.log if values[at] > 0 else np.asarray
    before, now, wanted = scale([values[at - 1], values[at], target])
    part = (before - wanted) / (before - now)
    amount = float(costs[at - 1] + part * (costs[at] - costs[at - 1]))
    steps = along(curve, "outer_step")[at]
    if at == 1 and steps > 1:
        return Spent(amount, True, min(amount, float(costs[0] + (costs[1] - costs[0]) / steps)), float(costs[1]))
    return _arrived(amount)


def _stays(costs: np.ndarray, below: np.ndarray, at: int, lasting: float) -> bool:
    """Whether it is below from there on, for so long."""
    return bool(below[at:][costs[at:] / lasting <= costs[at]].all())


def _arrived(cost: float) -> Spent:
    return Spent(float(cost), True, float(cost), float(cost))


def _at_best(costs: np.ndarray, values: np.ndarray, target: float) -> float:
    """What it would cost to arrive at the pace of the last quarter."""
    finite, quarter = np.isfinite(values), LAST * (costs[-1] - costs[0])
    fallen = float(np.interp(costs[-1] - quarter, costs[finite], values[finite]) - values[-1])
    return float(costs[-1] + quarter * (values[-1] - target) / fallen) if fallen > 0 else math.inf


def steady(tries: Sequence[Sequence[Try]]) -> list[int]:
    """The tries with a margin: with the next larger inner step of the grid the method diverges on no tuning seed.

    Steps at the edge of stability are the fastest there, and diverge on other seeds.

    Args:
      tries: of each tuning seed, in the same order.

    Returns:
      Their places; all places if no try has a margin, as where one inner step is all there is.
    """
    inner = [one.step_sizes["y"] for one in tries[0]]
    alike: dict[Any, list[int]] = {}  # all but the inner step, from the smallest of these to the largest
    for place in sorted(range(len(inner)), key=inner.__getitem__):
        one = tries[0][place]
        alike.setdefault((one.step_sizes["x"], *sorted(one.settings.items())), []).append(place)
    kept = [
        place
        for places in alike.values()
        for place, larger in itertools.pairwise(places)
        if inner[larger] > inner[place] and all(math.isfinite(_end(seed[larger].curve)) for seed in tries)
    ]
    return sorted(kept) or [*range(len(inner))]


def best(tries: Sequence[Sequence[Try]]) -> int:
    """The steady try that ends lowest in F, on the worst of the seeds.

    Of a run the higher of its last two checkpoints counts, so that no lucky swing does; the last one where the other is
    not known.

    Args:
      tries: of each seed, in the same order.

    Returns:
      Its place.
    """
    return min(steady(tries), key=lambda place: max(_end(seed[place].curve) for seed in tries))


def _end(curve: Curve) -> float:
    """The higher of the last two F; inf where the last one is not finite."""
    before, last = [None, None, *curve.get(LOSS, ())][-2:]
    if last is None or not math.isfinite(last):
        return math.inf
    return last if before is None or not math.isfinite(before) else max(before, last)


def choose(tries: Sequence[Sequence[Try]], metric: str, cost: str, targets: Sequence[float]) -> Choice:
    """The steady try with the least cost on the worst seed, of those that reach the target on all seeds.

    If none does, that which reaches it on most seeds, and of those the one that ends nearest to it on the worst seed.
    Here it has to stay to the end of the run, so that steps which are good for a while are no choice.

    Args:
      tries: of each tuning seed, in the same order.
      metric: that has to come to the target.
      cost: that counts.
      targets: of the seeds, none of them NaN.

    Returns:
      The choice.

    Raises:
      ValueError: if there is no try, or a target is missing.
    """
    if not tries or not tries[0] or len(tries) != len(targets) or any(map(math.isnan, targets)):
        raise ValueError(
            f"targets must be one number for each of the seeds, with a try at least; got {list(targets)} for tries "
            f"{[len(seed) for seed in tries]}. Leave out seeds without a target."
        )
    ranks = []
    for place in steady(tries):
        each = [seed[place] for seed in tries]
        spent = [
            spent_until(one.curve, cost, metric, target, lasting=math.inf)
            for one, target in zip(each, targets, strict=True)
        ]
        reached = sum(one.reached for one in spent)
        if reached == len(spent):
            worst = max(one.amount for one in spent)
        else:
            worst = max(_missed(one.curve, metric, target) for one, target in zip(each, targets, strict=True))
        ranks.append((-reached, worst, place))
    reached, _, place = min(ranks)
    return Choice(place, -reached)


def _missed(curve: Curve, metric: str, target: float) -> float:
    """By how much a curve ends above the target, of the way from its start."""
    values = along(curve, metric)
    if not len(values) or not values[0] > target:
        return math.inf
    return _infinite((values[-1] - target) / (values[0] - target))


def _infinite(value: float) -> float:
    """NaN is worse than any number."""
    return math.inf if math.isnan(value) else float(value)


def wanted(tries: Sequence[Sequence[Try]], bases: Sequence[Curve], levels: Iterable[Level]) -> list[int]:
    """The tries that are chosen for some level, counted by some cost: those that have to run on judged seeds too.

    Args:
      tries: of each tuning seed, in the same order.
      bases: SLDBO's own best curve on each tuning seed.
      levels: to reach.

    Returns:
      Their places, each once, in order. Levels that have no target on some of the seeds choose none.
    """
    found = set()
    for level in levels:
        targets = [level.target(base) for base in bases]
        if not any(map(math.isnan, targets)):
            found |= {choose(tries, level.metric, cost, targets).place for cost in COSTS}
    return sorted(found)


def find(tries: Iterable[Try], like: Try) -> Try | None:
    """The try of the same choice on another seed; None if it did not run there."""
    return next((one for one in tries if one.choice == like.choice), None)

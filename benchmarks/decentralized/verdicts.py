"""The arithmetic of verdicts: what a target cost, how two methods compare, and whether that is what was claimed."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.decentralized.records import Record
from benchmarks.harness.report import mean_and_error

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"
ROUNDING = 1e-12
SHARE = 0.01  # of a decrease of F: what counts as the same loss


class Spent(NamedTuple):
    """What was spent until a target was reached, or in all if it was not."""

    amount: float
    reached: bool


class Interval(NamedTuple):
    """Where a number of one seed lies: `least == most` if it is known, wider if a target was not reached."""

    least: float
    most: float

    @property
    def known(self) -> bool:
        """Whether it is one finite number."""
        return self.least == self.most and math.isfinite(self.least)

    @property
    def words(self) -> str:
        """For a table."""
        if self.known:
            return f"{self.least:.3g}"
        if self.least == math.inf:
            return "diverged"
        if self.most == -math.inf:
            return "the other diverged"
        if self.most < math.inf:
            return f"< {self.most:.3g}"
        return f"> {self.least:.3g}" if self.least > 0 else "unknown"


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error, which is zero where rounding alone makes one."""
    mean, error = (float(number) for number in mean_and_error(values))
    return mean, error if error > ROUNDING * abs(mean) else 0.0


UNKNOWN = Interval(0.0, math.inf)


def spent_until(record: Record, cost: str, metric: str, target: float) -> Spent:
    """What a run had spent when the metric first was at most the target: between checkpoints, linear in its logarithm.

    A target that the first checkpoint is below counts as reached there. A run that diverges before never reaches it, at
    any cost.

    Args:
      record: the run.
      cost: name of the curve of what is spent.
      metric: name of the curve that falls.
      target: the value to reach.

    Returns:
      What was spent, and whether that was enough.
    """
    costs, values = record.along(cost), record.along(metric)
    if not len(values):
        return Spent(0.0, False)
    below = np.flatnonzero(values <= target)
    if not len(below):
        return Spent(float(costs[-1]) if np.isfinite(values[-1]) else math.inf, False)
    at = int(below[0])
    if at == 0 or not np.isfinite(values[at - 1]):
        return Spent(float(costs[at]), True)
    scale = np.log if values[at] > 0 else np.asarray
    before, now, wanted = scale([values[at - 1], values[at], target])
    part = (before - wanted) / (before - now)
    return Spent(float(costs[at - 1] + part * (costs[at] - costs[at - 1])), True)


def ratio(method: Spent, base: Spent) -> Interval:
    """What a method spent for each unit of another one; bounds where a target was not reached."""
    if not (method.reached or base.reached):
        return UNKNOWN
    if not base.reached:
        return Interval(-math.inf, method.amount / base.amount if base.amount else math.inf)
    quotient = method.amount / base.amount if base.amount else math.inf
    return Interval(quotient, quotient if method.reached else math.inf)


def close_to_the_end(record: Record, metric: str = "exact_loss", share: float = SHARE) -> float:
    """The last value and this share of the decrease from the first checkpoint; NaN if it did not decrease."""
    values = record.along(metric)
    if not len(values) or not values[-1] < values[0]:
        return math.nan
    return float(values[-1] + share * (values[0] - values[-1]))


def halfway(record: Record, metric: str) -> float:
    """The geometric mean of the first checkpoint and the last one; NaN if it did not decrease."""
    values = record.along(metric)
    return float(np.sqrt(values[0] * values[-1])) if len(values) and values[-1] < values[0] else math.nan


def behind(method: Record, other: Record, metric: str = "exact_loss", cost: str = "derivatives") -> Interval:
    """What a method lacks after the same cost, the lower of what the two spent, over the larger decrease of the two.

    Negative where the method is ahead. A run that ends without finite numbers lacks everything.
    """
    curves = [(record.along(cost), record.along(metric)) for record in (method, other)]
    if any(not len(values) for _, values in curves):
        return Interval(-math.inf, math.inf)
    finite = [bool(np.isfinite(values[-1])) for _, values in curves]
    if not all(finite):
        return {
            (True, False): Interval(-math.inf, -math.inf),
            (False, True): Interval(math.inf, math.inf),
        }.get((finite[0], finite[1]), Interval(-math.inf, math.inf))
    common = min(costs[-1] for costs, _ in curves)
    one, two = (float(np.interp(common, *curve)) for curve in curves)
    decrease = float(curves[1][1][0]) - min(one, two)
    if not decrease > 0:
        return Interval(-math.inf, math.inf)
    lack = (one - two) / decrease
    return Interval(lack, lack)


def judge(
    intervals: Sequence[Interval], bound: float, meets: Callable[[float, float], bool] = operator.le
) -> tuple[str, str]:
    """Whether numbers, one for each seed, meet a bound.

    Known numbers are judged by their mean, which is not decided within one standard error of the bound. If some are
    only bounded, all seeds have to agree, each on its own.

    Args:
      intervals: of the seeds.
      bound: the claim is `meets(number, bound)`.
      meets: `operator.le`, or `operator.lt` where a tie does not do.

    Returns:
      The number in words, and the verdict.
    """
    if not intervals:
        return "–", f"{OPEN}: no results"
    if all(interval.known for interval in intervals):
        mean, error = summary([interval.least for interval in intervals])
        words = f"{mean:.3g} ± {error:.1g}" if len(intervals) > 1 else f"{mean:.3g} (one seed)"
        if error and abs(mean - bound) < error:
            return words, f"{OPEN}: within a standard error of {bound:.3g}"
        return words, HOLDS if meets(mean, bound) else FAILS
    words = ", ".join(interval.words for interval in intervals)
    held = [meets(interval.most, bound) for interval in intervals]
    missed = [not meets(interval.least, bound) for interval in intervals]
    if all(held) or all(missed):
        return words, HOLDS if all(held) else FAILS
    if any(held) and any(missed):
        return words, f"{OPEN}: seeds do not agree"
    incomparable = any(interval.least == -math.inf and interval.most == math.inf for interval in intervals)
    return words, f"{OPEN}: {'not comparable' if incomparable else 'target not reached'}"


def averaged(amounts: Sequence[Spent], form: str = ",.4g") -> str:
    """Costs in words: their mean ± standard error, and how many did not reach the target."""
    reached = [spent.amount for spent in amounts if spent.reached]
    missed = len(amounts) - len(reached)
    if not reached:
        spent = max((spent.amount for spent in amounts if math.isfinite(spent.amount)), default=math.nan)
        return "not reached" + (f" ({spent:{form}} spent)" if math.isfinite(spent) else "")
    mean, error = summary(reached)
    text = f"{mean:{form}} ± {error:.1g}" if len(reached) > 1 else f"{mean:{form}}"
    return text + (f" (not reached: {missed} of {len(amounts)} seeds)" if missed else "")


def number(value: float) -> str:
    """Four digits."""
    size = abs(value)
    if not math.isfinite(value):
        return "not finite"
    if size and (size < 1e-3 or size >= 1e7):
        return f"{value:.2e}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def cell(values: Sequence[float | None]) -> str:
    """Mean ± standard error, and how many of the values were not finite."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return "not finite"
    mean, error = summary(finite)
    text = f"{number(mean)} ± {error:.1g}" if error else number(mean)
    return text + f" ({len(values) - len(finite)} not finite)" * (len(finite) < len(values))

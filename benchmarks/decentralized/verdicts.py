"""The arithmetic of verdicts: how two methods compare on each seed, and whether that is what was claimed."""

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.decentralized.levels import LAST, LOSS, Spent
from benchmarks.decentralized.records import Record
from benchmarks.harness.report import mean_and_error

HOLDS, FAILS, SHORT, OPEN = "holds", "does not hold", "too short", "not decided"
VERDICTS = (HOLDS, FAILS, SHORT, OPEN)
EARLY = "before the first checkpoint"
ROUNDING = 1e-12
SHARE = 0.01  # of a decrease of F: what counts as the same loss

Meets = Callable[[float, float], bool]


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
        """What became of a seed without a number."""
        if self == NEVER:
            return "does not arrive"
        if self == OTHER_NEVER:
            return "the other does not arrive"
        if self == NEITHER:
            return "not comparable"
        if self.early:
            return EARLY
        return "the other too short" if math.isfinite(self.most) else "too short"

    @property
    def early(self) -> bool:
        """Whether it lies between two numbers, since a target was reached before the first checkpoint."""
        return not self.known and math.isfinite(self.least) and math.isfinite(self.most)


NEVER, OTHER_NEVER = Interval(math.inf, math.inf), Interval(-math.inf, -math.inf)
NEITHER, UNKNOWN = Interval(-math.inf, math.inf), Interval(0.0, math.inf)


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error, which is zero where rounding alone makes one."""
    mean, error = (float(number) for number in mean_and_error(values))
    return mean, error if error > ROUNDING * abs(mean) else 0.0


def ratio(method: Spent, other: Spent) -> Interval:
    """What a method spent for each unit of another one; bounds where a target was not reached.

    One that can no longer arrive is infinitely dear; of one that a longer run might have brought there the least that
    it would have cost is known.
    """
    if method.reached and other.reached:
        return Interval(over(method.least, other.most), over(method.most, other.least))
    if other.reached:
        return Interval(over(method.least, other.most), math.inf)
    if method.reached:
        return Interval(-math.inf, method.most / other.least) if other.short else OTHER_NEVER
    return UNKNOWN if method.short or other.short else NEITHER


def over(cost: float, other: float) -> float:
    """A quotient of costs; of two that are nothing, 1."""
    return cost / other if other else (math.inf if cost else 1.0)


def behind(method: Record, other: Record, metric: str = LOSS, cost: str = "derivatives") -> Interval:
    """What a method lacks after the same cost, the lower of what the two spent, over the larger decrease of the two.

    Negative where the method is ahead. A run that ends above its start, or without finite numbers, lacks everything.
    """
    curves = [(record.along(cost), record.along(metric)) for record in (method, other)]
    if any(not len(values) for _, values in curves):
        return NEITHER
    fell = [bool(values[-1] <= values[0]) for _, values in curves]
    if not all(fell):
        return {(True, False): OTHER_NEVER, (False, True): NEVER}.get((fell[0], fell[1]), NEITHER)
    common = min(costs[-1] for costs, _ in curves)
    one, two = (float(np.interp(common, *curve)) for curve in curves)
    decrease = float(curves[1][1][0]) - min(one, two)
    if not decrease > 0:
        return NEITHER
    lack = (one - two) / decrease
    return Interval(lack, lack)


def last_quarter(record: Record) -> float:
    """Share of its decrease of F that a run makes in its last quarter; NaN where F does not decrease."""
    steps, losses = record.along("outer_step"), record.along(LOSS)
    if not len(losses) or not losses[-1] < losses[0]:
        return math.nan
    finite = np.isfinite(losses)
    earlier = np.interp((1 - LAST) * steps[-1], steps[finite], losses[finite])
    return float((earlier - losses[-1]) / (losses[0] - losses[-1]))


def judge(intervals: Sequence[Interval], bound: float, meets: Meets = operator.le) -> tuple[str, str]:
    """Whether numbers, one for each seed, meet a bound.

    Known numbers are judged by their mean, which is not decided within one standard error of the bound. Seeds of which
    only bounds are known have to agree, each on its own; where a longer run could still make them, it was too short.

    Args:
      intervals: of the seeds.
      bound: the claim is `meets(number, bound)`.
      meets: `operator.le`, or `operator.lt` where a tie does not do.

    Returns:
      The number in words, and the verdict.
    """
    if not intervals:
        return "–", f"{OPEN}: no results"
    known = [interval.least for interval in intervals if interval.known]
    others = [interval for interval in intervals if not interval.known]
    held = [meets(interval.most, bound) for interval in others]
    missed = [not meets(interval.least, bound) for interval in others]
    mean, error = summary(known) if known else (math.nan, 0.0)
    holds, fails = bool(known) and meets(mean, bound), bool(known) and not meets(mean, bound)
    if error and abs(mean - bound) < error:
        verdict = f"{OPEN}: within a standard error of {bound:.3g}"
    elif all(held) and not fails:
        verdict = HOLDS
    elif all(missed) and not holds:
        verdict = FAILS
    elif (any(held) or holds) and (any(missed) or fails):
        verdict = f"{OPEN}: seeds do not agree"
    else:
        early = any(interval.early for interval in others)
        verdict = f"{OPEN}: not comparable" if NEITHER in others else f"{OPEN}: {EARLY}" if early else SHORT
    return in_words(intervals), verdict


def in_words(intervals: Sequence[Interval]) -> str:
    """The mean ± standard error of the numbers that are known, and what became of the other seeds."""
    known = [interval.least for interval in intervals if interval.known]
    others = [interval for interval in intervals if not interval.known]
    if len(intervals) == 1:
        return (f"{known[0]:.3g}" if known else others[0].words) + " (one seed)" + bounded(others)
    counts = Counter(interval.words for interval in others)
    parts = [f"{words} on {count}" for words, count in counts.items()]
    if known:
        mean, error = summary(known)
        text = f"{mean:.3g} ± {rough(error)}" if len(known) > 1 else f"{mean:.3g}"
        if not others:
            return text
        parts.insert(0, f"{text} on {len(known)}")
    return f"{'; '.join(parts)} of {len(intervals)} seeds{bounded(others)}"


def bounded(others: Sequence[Interval]) -> str:
    """What is known of seeds without a number: the least that a longer run could come to, or the most."""
    lower = [interval.least for interval in others if interval.words == "too short" and interval.least > 0]
    upper = [interval.most for interval in others if interval.words == "the other too short"]
    bounds = [f"≥ {min(lower):.3g}"] if lower else []
    bounds += [f"≤ {max(upper):.3g}"] if upper else []
    return f" ({', '.join(bounds)})" if bounds else ""


def averaged(amounts: Sequence[Spent]) -> str:
    """Costs in words: their mean ± standard error over the seeds that reached the target; a dash where none did."""
    reached = [spent.amount for spent in amounts if spent.reached]
    return cell(reached) if reached else "–"


def arrivals(amounts: Sequence[Spent]) -> str:
    """On how many seeds the target was reached, in brackets, where not on all."""
    reached, short = (sum(side) for side in zip(*((one.reached, one.short) for one in amounts), strict=True))
    return (
        "" if reached == len(amounts) else f" ({reached} of {len(amounts)} seeds{f', {short} too short' * (short > 0)})"
    )


def rough(error: float) -> str:
    """One digit."""
    text = f"{error:.1g}"
    return f"{float(text):,.0f}" if "e+" in text else text


def number(value: float) -> str:
    """Three digits, or four from 1 to 10,000."""
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
    text = f"{number(mean)} ± {rough(error)}" if error else number(mean)
    return text + f" ({len(values) - len(finite)} not finite)" * (len(finite) < len(values))


def counted(verdicts: Sequence[str]) -> tuple[int, int, int]:
    """How many hold, do not hold, and are open: too short or not decided."""
    counts = Counter(verdict.partition(":")[0] for verdict in verdicts)
    return counts[HOLDS], counts[FAILS], counts[SHORT] + counts[OPEN]


def overall(verdicts: Sequence[str]) -> str:
    """Several verdicts in one word, by those that are decided; open where most are not."""
    holds, fails, undecided = counted(verdicts)
    if not holds + fails or undecided > 2 * (holds + fails):
        return "open"
    share = holds / (holds + fails)
    words = {1.0: HOLDS, 0.75: "mostly holds", 0.25: "mixed", 0.0: "mostly does not"}
    return next(word for least, word in words.items() if share >= least) if share else FAILS

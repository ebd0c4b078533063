"""What a claim is on the page, and the words that all of them use."""

import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.decentralized.levels import GRADIENT, Level, Spent
from benchmarks.decentralized.measured import Measured, pairs
from benchmarks.decentralized.verdicts import OPEN, Interval, Meets, judge, ratio, summary

OWN = "beyond the papers"  # source of a claim of our own
MARK = " †"  # no steps of the grid reach the target on all tuning seeds


class Claim(NamedTuple):
    """A claim beside what was measured.

    Attributes:
      title: in a few words.
      source: paper and arXiv id.
      words: the claim, in a sentence.
      numbers: the one number or two that sum it up.
      verdicts: of all comparisons.
      measure: how the numbers are defined.
      details: tables in Markdown.
    """

    title: str
    source: str
    words: str
    numbers: str
    verdicts: Sequence[str]
    measure: str
    details: str


class Finding(NamedTuple):
    """One comparison.

    Attributes:
      words: its number.
      verdict: what that means.
      intervals: the number of each seed.
    """

    words: str
    verdict: str
    intervals: Sequence[Interval] = ()

    @property
    def mean(self) -> float | None:
        """The mean over the seeds whose number is known; None where that is not most of them."""
        known = [interval.least for interval in self.intervals if interval.known]
        return summary(known)[0] if 2 * len(known) > len(self.intervals) else None


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [headers, ["---"] * len(headers), *([text.replace("|", "\\|") for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def bold(verdict: str) -> str:
    """A verdict without its reason in bold."""
    name, colon, reason = verdict.partition(":")
    return f"**{name}**{colon}{reason}"


def missing(job: str) -> Finding:
    """Where results are not there."""
    return Finding("–", f"{OPEN}: no results of {job}")


def compared(pairs: Sequence[tuple[Spent, Spent]], bound: float, meets: Meets, job: str, mark: str = "") -> Finding:
    """The cost of the first of each pair over that of the second."""
    if not pairs:
        return missing(job)
    intervals = [ratio(*both) for both in pairs]
    words, verdict = judge(intervals, bound, meets)
    return Finding(words + mark, verdict, intervals)


def against(
    runs: Measured,
    one: str,
    two: str,
    level: Level,
    cost: str,
    bound: float,
    meets: Meets,
    job: str,
) -> Finding:
    """The cost of a method to a level over that of another one, each with its own best steps."""
    own, other = (runs.spent(method, level, cost) for method in (one, two))
    return compared(pairs(own, other), bound, meets, job, marked(runs, one, level, cost))


def fewer(runs: Measured, one: str, two: str, levels: Iterable[Level], cost: str, job: str) -> list[Finding]:
    """Whether a method needs less of a cost than another one, to each of some levels."""
    return [against(runs, one, two, level, cost, 1.0, operator.lt, job) for level in levels]


def told(found: Iterable[Finding]) -> list[str]:
    """Numbers and verdicts in cells of a table."""
    return [f"{one.words}: {bold(one.verdict)}" for one in found]


def marked(runs: Measured, method: str, level: Level, cost: str) -> str:
    """The mark of a choice that does not reach the target on all tuning seeds."""
    found = runs.chosen(method, level, cost)
    return MARK * (found is not None and found[1].reached < len(runs.tuning[method]))


def named(level: Level) -> str:
    """A level in a table."""
    return f"ε = {level.share:g}" if level.metric == GRADIENT else f"{level.share:.0%}"


def span(values: Iterable[float | None]) -> str:
    """The range of the numbers that are known, and how many are."""
    every = [*values]
    known = [value for value in every if value is not None]
    if not known:
        return "unknown"
    low, high = (f"{value:.2g}" for value in (min(known), max(known)))
    count = f" ({len(known)} of {len(every)})" * (len(known) < len(every))
    return (low if low == high else f"{low} to {high}") + count

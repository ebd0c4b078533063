"""SPARKLE: which correction, and which graph."""

from collections.abc import Sequence

from benchmarks.decentralized.claims.claim import Claim, Finding, bold, missing, span, table
from benchmarks.decentralized.records import Record, Results, by_seed, matched
from benchmarks.decentralized.verdicts import FAILS, HOLDS, OPEN, SHARE, SHORT, behind, judge, last_quarter, summary

SOURCE = "SPARKLE, arXiv 2411.14166"
CHAIN = (("sparkle-ed", "sparkle-gt"), ("sparkle-extra", "sparkle-gt"), ("sparkle-gt", "d-soba"))
SPARSE = (("sparse-policy", "policy evaluation"), ("sparse-cleaning", "hyper-cleaning, two classes each"))
HEADERS = ("of", "behind by", "verdict")
LACK = (
    "F(x̄) of the first method minus that of the second after the same derivative evaluations, over the larger "
    "decrease of the two since the start"
)
TOO_SHORT = (
    "It is too short where it does not hold, but the first method makes more than what it lacks in the last quarter "
    "of its run."
)


def lacking(pairs: Sequence[tuple[Record, Record]], bound: float) -> Finding:
    """What the first of each pair lacks of the second; too short where it makes as much in its last quarter."""
    intervals = [behind(one, two) for one, two in pairs]
    words, verdict = judge(intervals, bound)
    falls = [last_quarter(one) for one, _ in pairs]
    if verdict == FAILS and all(interval.known for interval in intervals):
        mean = summary([interval.least - fall for interval, fall in zip(intervals, falls, strict=True)])[0]
        verdict = SHORT if mean <= bound else FAILS
    return Finding(words, verdict, intervals)


def ahead(pairs: Sequence[tuple[Record, Record]]) -> Finding:
    """The same, where the first is ahead, behind, or neither by SHARE."""
    found = lacking(pairs, -SHARE)
    if found.verdict in (FAILS, SHORT) and judge([behind(two, one) for one, two in pairs], -SHARE)[1] != HOLDS:
        return found._replace(verdict=f"{OPEN}: no difference above {SHARE:.0%}")
    return found


def corrections(results: Results) -> Claim:
    """SPARKLE's corrections on a sparse graph."""
    rows, found = [], []
    for job, words in SPARSE:
        for one, two in CHAIN:
            pairs = [(a, b) for a, b in matched(results.get(job, ()), one, two)]
            found.append(lacking(pairs, SHARE) if pairs else missing(job))
            rows.append([f"{words}: {one} ≥ {two}", found[-1].words, bold(found[-1].verdict)])
    return Claim(
        title="Exact diffusion and EXTRA before tracking, tracking before nothing",
        source=SOURCE,
        words="On sparse graphs with severe heterogeneity SPARKLE-ED and SPARKLE-EXTRA are at least as good as "
        "SPARKLE-GT, which is at least as good as D-SOBA.",
        numbers=f"behind by {span(one.mean for one in found)} of the decrease; negative is ahead",
        verdicts=[one.verdict for one in found],
        measure=f"Ring of 20 agents. Number: {LACK}; at least as good is at most {SHARE:g}. {TOO_SHORT}",
        details=table(HEADERS, rows),
    )


def levels(results: Results) -> Claim:
    """A complete graph below against one above."""
    rows, found = [], []
    for method in ("sparkle-ed", "sparkle-gt"):
        below, above = (by_seed(results.get(f"{which}-complete", ()), method) for which in ("lower", "upper"))
        pairs = [(below[seed], above[seed]) for seed in sorted(set(below) & set(above))]
        found.append(ahead(pairs) if pairs else missing("lower-complete, upper-complete"))
        rows.append([method, found[-1].words, bold(found[-1].verdict)])
    return Claim(
        title="The graph of the lower level matters more",
        source=SOURCE,
        words="The topology of the lower level and of v matters more than that of the upper level.",
        numbers=f"the complete graph below is behind by {span(one.mean for one in found)} of the decrease",
        verdicts=[one.verdict for one in found],
        measure="Hyper-cleaning, 20 agents of two classes each. First: x on a ring, y and v on a complete graph; "
        f"second: x on a complete graph, y and v on a ring. Number: {LACK}; it holds if that is at most {-SHARE:g}. "
        f"{TOO_SHORT}",
        details=table(HEADERS, rows),
    )

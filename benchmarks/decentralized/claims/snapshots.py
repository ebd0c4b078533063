"""S3LDBO against SLDBO."""

import operator
from typing import NamedTuple

from benchmarks.decentralized.claims.claim import Claim, Finding, bold, compared, marked, named, span, table
from benchmarks.decentralized.levels import LOSSES, Level
from benchmarks.decentralized.measured import BASE, Measured, measured, pairs
from benchmarks.decentralized.records import Results
from benchmarks.decentralized.verdicts import Meets

PROBABILITIES = (0.5, 0.2, 0.1, 0.05)
SHOWN = 0.1  # the p of the table of all claims
TASKS = {
    "synthetic": "penalties, synthetic",
    "mnist": "penalties, MNIST",
    "cleaning": "hyper-cleaning",
    "meta": "meta-learning",
}
ALL_TASKS = {**TASKS, "policy": "policy evaluation"}
HEADERS = (
    *("task", "p", "decrease of F", "evaluations, own steps", "evaluations, SLDBO's steps", "bytes"),
    "verdict on evaluations, own steps",
)


class Ratios(NamedTuple):
    """A method to SLDBO, until a level.

    Attributes:
      own: evaluations, each with the steps that are best for the level.
      same: evaluations, both with the steps of SLDBO that end lowest.
      sent: bytes, with the steps of `own`.
    """

    own: Finding
    same: Finding
    sent: Finding


def ratios(
    runs: Measured,
    method: str,
    level: Level,
    job: str,
    bounds: tuple[float, float] = (1.0, 1.0),
    meets: Meets = operator.lt,
) -> Ratios:
    """The three ratios; bounds of evaluations and of bytes, that they are judged by."""

    def over(cost: str, bound: float, mark: str = "") -> Finding:
        both = (runs.spent(name, level, cost, by="derivatives") for name in (method, BASE))
        return compared(pairs(*both), bound, meets, job, mark)

    like = runs.base
    same = [runs.spent(name, level, "derivatives", like) if like else {} for name in (method, BASE)]
    return Ratios(
        over("derivatives", bounds[0], marked(runs, method, level, "derivatives")),
        compared(pairs(*same), bounds[0], meets, job),
        over("megabytes", bounds[1]),
    )


def shortly(found: Ratios) -> str:
    """Evaluations and bytes in a word, or why there are none."""
    if found.own.mean is None or found.sent.mean is None:
        return found.own.verdict.partition(":")[0]
    return f"{found.own.mean:.2g} / {found.sent.mean:.2g}"


def tasks(results: Results) -> dict[str, tuple[str, Measured]]:
    """The four tasks of the paper: job -> its words and runs."""
    return {job: (words, measured(results, job)) for job, words in TASKS.items()}


def snapshots(results: Results) -> Claim:
    """The claim of S3LDBO's abstract, on the four tasks of its paper."""
    rows, verdicts, shown = [], [], []
    short: dict[float, list[str]] = {p: [f"{p:g}"] for p in PROBABILITIES}
    for job, (words, runs) in tasks(results).items():
        for p in PROBABILITIES:
            for level in LOSSES:
                found = ratios(runs, f"s3ldbo-{p:g}", level, job)
                rows.append(
                    [words, f"{p:g}", named(level), *(one.words for one in found), bold(found.own.verdict)],
                )
                verdicts.append(found.own.verdict)
                if level == LOSSES[-1]:
                    short[p].append(shortly(found))
                    shown += [found] * (p == SHOWN)
    own, sent = (span(one.mean for one in column) for column in list(zip(*shown, strict=True))[::2])
    return Claim(
        title="Snapshots save derivatives",
        source="S3LDBO, arXiv 2605.31311",
        words="S3LDBO reaches the quality of SLDBO with fewer derivative evaluations.",
        numbers=f"p = {SHOWN:g}, 99%: {own} of SLDBO's evaluations, {sent} of its bytes",
        verdicts=verdicts,
        measure="The abstract names no factor: the claim holds where the ratio of evaluations, each method with the "
        "steps that are best for the target, is below 1. p is the probability of a refresh, what the ratio would be if "
        "old directions were as good as new ones. At SLDBO's steps: both methods with the steps that end lowest for "
        "SLDBO. Bytes: with each method's own best steps. S3LDBO has three times SLDBO's iterations. Meta-learning "
        "has a lower level of each agent's own, so that SLDBO tracks x alone.",
        details="Evaluations / bytes to 99%, over those of SLDBO:\n\n"
        + table(["p", *TASKS.values()], short.values())
        + "\nAll levels:\n\n"
        + table(HEADERS, rows),
    )

"""Suggested step sizes against the best of the grid."""

import math
import operator

from benchmarks.decentralized.claims.claim import Claim, Finding, bold, compared, named, span, table
from benchmarks.decentralized.levels import LOSSES, Spent
from benchmarks.decentralized.records import Record, Results
from benchmarks.decentralized.verdicts import arrivals, averaged, cell

JOB = "step-sizes"
MOST = 2.0  # times the evaluations of the best of the grid
LEVELS = LOSSES[1:]
HEADERS = ("task and method", "decrease of F", "search", "search and run", "best of the grid", "ratio", "verdict")


def needed(run: Record, name: str) -> Spent:
    """The evaluations of a run; inf where it does not arrive."""
    found = run.metrics[name]
    return Spent(math.inf, False, math.inf) if found is None else Spent(found, True, found, found)


def step_sizes(results: Results) -> Claim:
    """What `suggest_step_sizes` costs, and how far its steps are from the best."""
    groups: dict[str, list[Record]] = {}
    for record in results.get(JOB, ()):
        groups.setdefault(record.method, []).append(record)
    rows, found = [], list[Finding]()
    for name, records in groups.items():
        for level in LEVELS:
            own, best = ([needed(run, f"{who}_{level.share:g}") for run in records] for who in ("suggested", "tuned"))
            found.append(compared([*zip(own, best, strict=True)], MOST, operator.le, JOB))
            search = cell([run.metrics["search"] for run in records])
            cells = [averaged(side) + arrivals(side) for side in (own, best)]
            rows.append([name, named(level), search, *cells, found[-1].words, bold(found[-1].verdict)])
    found = found or [compared((), MOST, operator.le, JOB)]
    return Claim(
        title="Step sizes that nobody has to guess",
        source="beyond the papers",
        words=f"With the steps of `bx.single_loop.suggest_step_sizes` a method needs at most {MOST:g} times the "
        "evaluations that it needs with the best of the grid, the search for them included.",
        numbers=f"{span(one.mean for one in found)} times the best of the grid",
        verdicts=[one.verdict for one in found],
        measure="Number: derivative evaluations of an agent until a share of SLDBO's decrease of F, those of the "
        "search included, over those with the pair of the grid that is best for it, whose tuning does not count.",
        details=table(HEADERS, rows) if rows else "No results.\n",
    )

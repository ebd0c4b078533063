"""Suggested step sizes against the best of the grid."""

import math
import operator

from benchmarks.decentralized.claims.claim import Claim, bold, compared, span, table
from benchmarks.decentralized.levels import Spent
from benchmarks.decentralized.records import Record, Results
from benchmarks.decentralized.verdicts import cell

JOB = "step-sizes"
MOST = 2.0  # times the evaluations of the best of the grid
HEADERS = ("task and method", "of the suggestion", "evaluations in all", "best of the grid", "ratio", "verdict")


def needed(run: Record, name: str) -> Spent:
    """The evaluations of a run; inf where it does not arrive."""
    found = run.metrics[name]
    return Spent(math.inf, False, math.inf) if found is None else Spent(found, True, found, found)


def step_sizes(results: Results) -> Claim:
    """What `suggest_step_sizes` costs, and how far its steps are from the best."""
    groups: dict[str, list[Record]] = {}
    for record in results.get(JOB, ()):
        groups.setdefault(record.method, []).append(record)
    rows, found = [], []
    for name, records in groups.items():
        pairs = [(needed(run, "evaluations"), needed(run, "grid_evaluations")) for run in records]
        found.append(compared(pairs, MOST, operator.le, JOB))
        columns = ("suggestion_evaluations", "evaluations", "grid_evaluations")
        cells = [cell([run.metrics[column] for run in records]) for column in columns]
        rows.append([name, *cells, found[-1].words, bold(found[-1].verdict)])
    found = found or [compared((), MOST, operator.le, JOB)]
    return Claim(
        title="Step sizes that nobody has to guess",
        source="beyond the papers",
        words=f"With the steps of `bx.single_loop.suggest_step_sizes` a method needs at most {MOST:g} times the "
        "evaluations that it needs with the best of the grid, its suggestion included.",
        numbers=f"{span(one.mean for one in found)} times the best of the grid",
        verdicts=[one.verdict for one in found],
        measure="Number: derivative evaluations until 99% of SLDBO's decrease of F, those of the suggestion included, "
        "over those with the steps of the grid that are best for that, which cost nothing here.",
        details=table(HEADERS, rows) if rows else "No results.\n",
    )

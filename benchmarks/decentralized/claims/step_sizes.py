"""Suggested step sizes against the best of the grid."""

import math
import operator
from typing import Any

from benchmarks.decentralized.claims.claim import MARK, OWN, Claim, Finding, bold, compared, named, span, table
from benchmarks.decentralized.levels import LOSSES, Level, Spent
from benchmarks.decentralized.records import Record, Results
from benchmarks.decentralized.verdicts import FAILS, HOLDS, OPEN, arrivals, averaged, cell

JOB = "step-sizes-"  # and the name of a task
MOST = 2.0  # times the evaluations of the best of the grid
LEVELS = LOSSES[1:]
HEADERS = (
    "task and method",
    "decrease of F",
    "warm-up",
    "search",
    "search and run",
    "best of the grid",
    "ratio",
    "verdict",
)


def needed(run: Record, level: Level) -> tuple[Spent, Spent, bool] | None:
    """The evaluations with suggested steps and with tuned ones, and whether the latter arrive on all tuning seeds."""
    target = run.configuration["targets"].get(f"{level.share:g}")
    if target is None:
        return None
    both = target["derivatives"]
    own, best = (
        Spent(**{name: _infinite(value) for name, value in both[who].items()}) for who in ("suggested", "tuned")
    )
    return own, best, both["everywhere"]


def _infinite(number: Any) -> Any:
    """Files have null for what is not finite."""
    return math.inf if number is None else number


def step_sizes(results: Results) -> Claim:
    """What `suggest_step_sizes` costs, and how far its steps are from the best."""
    groups: dict[str, list[Record]] = {}
    for record in (record for job, each in results.items() if job.startswith(JOB) for record in each):
        groups.setdefault(record.method, []).append(record)
    runs = [record for records in groups.values() for record in records]
    lost = [f"{run.method}, seed {run.seed}" for run in runs if run.metrics["diverged"]]
    never = (FAILS if lost else HOLDS) if runs else f"{OPEN}: no results of {JOB}"
    rows, found = [], dict[Level, list[Finding]]()
    for name, records in groups.items():
        for level in LEVELS:
            every = [both for run in records if (both := needed(run, level))]
            if not every:
                continue  # SLDBO has no target on the tuning seeds
            own, best, everywhere = zip(*every, strict=True)
            mark = MARK * (not all(everywhere))
            one = compared([*zip(own, best, strict=True)], MOST, operator.le, JOB, mark)
            found.setdefault(level, []).append(one)
            warm_up = cell([run.configuration["warm_up"] for run in records])
            search = cell([run.metrics["search"] for run in records])
            cells = [averaged(side) + arrivals(side) for side in (own, best)]
            rows.append([name, named(level), warm_up, search, *cells, one.words, bold(one.verdict)])
    found = found or {LEVELS[-1]: [compared((), MOST, operator.le, JOB)]}
    return Claim(
        title="Step sizes that nobody has to guess",
        source=OWN,
        words=f"With the steps of `bx.single_loop.suggest_step_sizes` a method needs at most {MOST:g} times the "
        "evaluations that it needs with the best of the grid, the search for them included, and it never diverges.",
        numbers="; ".join(f"{named(level)}: {span(one.mean for one in each)}" for level, each in sorted(found.items()))
        + f" times the best of the grid; {len(lost)} of {len(runs)} runs diverge",
        verdicts=[*(one.verdict for each in found.values() for one in each), never],
        measure="Number: derivative evaluations of an agent until a share of SLDBO's decrease of F, those of the "
        "search included, over those with the pair of the grid that the tuning seeds choose for it, whose tuning does "
        "not count. On penalties of synthetic data and of MNIST, hyper-cleaning of digits, meta-learning, and policy "
        "evaluation. Warm-up: ∇f before the first pilot, more than 10 where y converges slowly. f and g, which the "
        "search reads after about every evaluation, forward only, do not count; a momentum is that of the grid's pair "
        "for 99 %. A run diverges where F at its end is not finite, or above where "
        f"it was at the start: {'; '.join(lost) or 'none does'}.",
        details=table(HEADERS, rows) if rows else "No results.\n",
    )

"""Kronecker factors as preconditioners, beyond the papers."""

import math
import operator

from benchmarks.decentralized.claims.claim import OWN, Claim, Finding, bold, compared, table
from benchmarks.decentralized.levels import Spent
from benchmarks.decentralized.records import Record, Results, matched
from benchmarks.decentralized.verdicts import arrivals, averaged, cell

METHODS = ("kfac-v", "kfac", "ekfac")


def iterations(run: Record) -> Spent:
    """Until the accuracy that is asked for."""
    found, every = run.metrics["iterations"], float(run.configuration["outer_steps"])
    return Spent(every, False, every) if found is None else Spent(found, True, found, found)


def most(found: Finding) -> str:
    """The largest ratio of a seed."""
    largest = max((interval.most for interval in found.intervals), default=math.inf)
    return f"at most {largest:.2g}" if math.isfinite(largest) else found.verdict.partition(":")[0]


def curvature(results: Results) -> Claim:
    """Iterations with factors over those without."""
    rows, found = [], []
    for method in METHODS:
        pairs = matched(results.get("curvature", ()), method, "plain")
        own, other = ([iterations(pair[place]) for pair in pairs] for place in (0, 1))
        found.append(compared([*zip(own, other, strict=True)], 1.0, operator.lt, "curvature"))
        penalties = cell([run.metrics["penalty"] for run, _ in pairs]) if pairs else "–"
        costs = [averaged(side) + arrivals(side) if side else "–" for side in (own, other)]
        rows.append([method, found[-1].words, *costs, penalties, bold(found[-1].verdict)])
    return Claim(
        title="Curvature of each agent's own saves iterations",
        source=OWN,
        words="SLDBO reaches the same x* in fewer iterations if y and v, or v alone, move along directions that the "
        "Kronecker factors of each agent's own loss have rescaled after they were tracked.",
        numbers="; ".join(f"{method}: {most(one)}" for method, one in zip(METHODS, found, strict=True))
        + " of the iterations without",
        verdicts=[one.verdict for one in found],
        measure="One penalty of a softmax regression. Number: iterations until all three mean directions at the mean "
        "iterate are at 1e-6 of their first values, over those without factors. As many pairs of steps are tried for "
        "each; with factors a step is a share of Newton's, without them it is a length, so that their grids differ.",
        details=table(["of", "ratio", "iterations", "without factors", "learnt penalty", "verdict"], rows),
    )

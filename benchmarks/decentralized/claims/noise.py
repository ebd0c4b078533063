"""The noise floor of stochastic methods against the number of agents."""

import math
from collections.abc import Sequence

import numpy as np

from benchmarks.decentralized.claims.claim import Claim, Finding, bold, missing, span, table
from benchmarks.decentralized.records import Record, Results, matched
from benchmarks.decentralized.speed_up import SIZES
from benchmarks.decentralized.verdicts import NEITHER, Interval, cell, judge

STEEP = -0.75  # a slope that counts as linear speed-up, which is −1
METHODS = ("d-soba", "dsvrbgd")


def slope(runs: Sequence[Record]) -> float:
    """Of log floor against log n, least squares; NaN where a floor is not finite and positive."""
    floors = np.array([run.metrics["floor"] or math.nan for run in runs], float)
    sizes = np.array([run.configuration["agents"] for run in runs], float)
    if not (np.isfinite(floors) & (floors > 0)).all():
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(floors), 1)[0])


def speed_up(results: Results) -> Claim:
    """The noise floor against n."""
    rows, found = [], []
    for method in METHODS:
        groups = matched(results.get("speed-up", ()), *(f"{method}-n{n}" for n in SIZES))
        slopes = [slope(group) for group in groups]
        intervals = [NEITHER if math.isnan(one) else Interval(one, one) for one in slopes]
        found.append(Finding(*judge(intervals, STEEP), intervals) if groups else missing("speed-up"))
        floors = [cell([run.metrics["floor"] for run in runs]) for runs in zip(*groups, strict=True)]
        rows.append([method, *(floors or ["–"] * len(SIZES)), found[-1].words, bold(found[-1].verdict)])
    return Claim(
        title="Linear speed-up",
        source="D-SOBA, arXiv 2402.03167; DSVRBGD, arXiv 2311.11342",
        words="The noise of stochastic methods falls like 1/n with the number n of agents.",
        numbers=f"slopes {span(one.mean for one in found)}, where 1/n is −1",
        verdicts=[one.verdict for one in found],
        measure="Quadratic problem with known x*, ring, rows divided at random, the same constant steps and size of a "
        "minibatch for all n. Number: slope of log floor against log n, by least squares for each seed, where the "
        "floor is the mean of ‖x̄ − x*‖² over the second half of a run; it holds if the slope is at most "
        f"{STEEP:g}.",
        details=table(["of", *(f"floor, n = {n}" for n in SIZES), "slope", "verdict"], rows),
    )

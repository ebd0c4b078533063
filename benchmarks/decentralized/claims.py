"""What the papers claim of the decentralized methods, and how each claim is measured."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.decentralized.records import Record, Results, by_seed, matched
from benchmarks.decentralized.speed_up import SIZES
from benchmarks.decentralized.verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    SHARE,
    Interval,
    Spent,
    averaged,
    behind,
    cell,
    close_to_the_end,
    halfway,
    judge,
    ratio,
    spent_until,
)

SLACK = 1.5  # S3LDBO may take so many times p of SLDBO's evaluations
STEEP = -0.75  # a slope that counts as linear speed-up, which is −1
PROBABILITIES = (0.5, 0.2, 0.1)
ADAPTIVE = (0.25, 0.125)
LEAST_TASKS = 3  # on which a new choice of agents has to win
SHARES_SENT = (0.3, 0.1)
SKIPPING_JOBS = {
    "synthetic": "penalties, synthetic",
    "mnist": "penalties, MNIST",
    "cleaning": "hyper-cleaning",
    "meta": "meta-learning (a lower level of each agent's own; sldbo tracks x alone)",
}


class Finding(NamedTuple):
    """One comparison: of what, its numbers and its verdict."""

    what: str
    numbers: str
    verdict: str


class Claim(NamedTuple):
    """A claim beside its findings.

    Attributes:
      title: in a few words.
      source: paper and arXiv id.
      words: the claim.
      measure: the definition of the number.
      findings: what was measured.
    """

    title: str
    source: str
    words: str
    measure: str
    findings: Sequence[Finding]


def missing(what: str, job: str) -> Finding:
    """Where results are not there."""
    return Finding(what, "–", f"{OPEN}: no results of {job}")


Costs = Callable[[Record, Record], tuple[Spent, Spent] | None]  # None where there is no target


def against(
    what: str,
    job: str,
    pairs: Sequence[tuple[Record, Record]],
    costs: Costs,
    setter: str,
    unit: str,
    bound: float,
    meets: Callable[[float, float], bool] = operator.lt,
) -> Finding:
    """The cost of the first of each pair over that of the second, with both costs beside it.

    Args:
      what: for the table.
      job: where the runs are from.
      pairs: one for each seed.
      costs: of both until the target; seeds without one are left out, and counted.
      setter: name of the method whose curve sets the target.
      unit: of the costs.
      bound: of the ratio.
      meets: how the ratio has to compare with it.

    Returns:
      The finding.
    """
    if not pairs:
        return missing(what, job)
    spent = [both for pair in pairs if (both := costs(*pair))]
    if not spent:
        return Finding(what, "no target", f"{OPEN}: {setter} does not descend")
    words, verdict = judge([ratio(*both) for both in spent], bound, meets)
    own, other = (averaged(side) for side in zip(*spent, strict=True))
    without = len(pairs) - len(spent)
    note = f"; no target with {without} of {len(pairs)} seeds, where {setter} does not descend" * bool(without)
    return Finding(what, f"ratio {words}; {own} against {other} {unit}{note}", verdict)


def until(metric: str, cost: str, target: float, method: Record, other: Record) -> tuple[Spent, Spent] | None:
    """Costs of both until the metric is at the target."""
    if math.isnan(target):
        return None
    return spent_until(method, cost, metric, target), spent_until(other, cost, metric, target)


def until_the_loss(cost: str) -> Costs:
    """Costs of both until F is close to where the second one ends."""
    return lambda method, base: until("exact_loss", cost, close_to_the_end(base), method, base)


def until_halfway(cost: str) -> Costs:
    """Costs of both until ‖∇F‖² is halfway down the first one's descent, on a scale of logarithms."""
    return lambda method, other: until("exact_gradient", cost, halfway(method, "exact_gradient"), method, other)


def snapshots(results: Results) -> Claim:
    """S3LDBO against SLDBO, on the four tasks of its paper."""
    findings = []
    for job, words in SKIPPING_JOBS.items():
        bases, lazy = by_seed(results.get(job, ()), "sldbo"), results.get(f"{job}-skipping", ())
        for p in PROBABILITIES:
            runs = by_seed(lazy, f"s3ldbo-{p:g}")
            pairs = [(runs[seed], bases[seed]) for seed in sorted(set(runs) & set(bases))]
            costs = until_the_loss("derivatives")
            what = f"{words}, p = {p:g} (at most {SLACK * p:g})"
            findings.append(
                against(what, f"{job}, {job}-skipping", pairs, costs, "sldbo", "evaluations", SLACK * p, operator.le)
            )
    return Claim(
        "Snapshots save derivatives",
        "S3LDBO, arXiv 2605.31311",
        "S3LDBO reaches the quality of SLDBO with fewer derivative evaluations. (Its abstract names no factor; what "
        f"is asked here is at most {SLACK:g} · p of them, for a refresh probability p.)",
        f"Target: SLDBO's last F(x̄) and {SHARE:.0%} of its decrease since the start. Number: derivative evaluations "
        "of an agent until F(x̄) is first at the target, interpolated between checkpoints, over those of SLDBO until "
        "the same target. S3LDBO takes twice as many iterations, and the steps that are best at their end.",
        findings,
    )


def communication(results: Results) -> Claim:
    """DSVRBGD against the stochastic methods before it."""
    others = ("mdbo", "vrdbo", "ma-dsbo-sampled", "ma-dsbo")
    rows = [(other, "megabytes", "MB") for other in others]
    rows += [(other, "rounds", "rounds") for other in ("d-soba-sampled", "d-soba")]
    findings = []
    for other, cost, unit in rows:
        pairs = [(one, two) for one, two in matched(results.get("cleaning", ()), "dsvrbgd", other)]
        findings.append(
            against(f"dsvrbgd / {other}, {unit}", "cleaning", pairs, until_halfway(cost), "dsvrbgd", unit, 1.0)
        )
    return Claim(
        "Variance reduction saves communication",
        "DSVRBGD, arXiv 2311.11342",
        "DSVRBGD reaches a stationary point with fewer bytes than MDBO, VRDBO and MA-DSBO where agents differ, and "
        "with fewer rounds than D-SOBA.",
        "Hyper-cleaning. Target: the geometric mean of DSVRBGD's first and last ‖∇F(x̄)‖², the same for all. "
        "Number: MB that an agent sent, or rounds, until ‖∇F(x̄)‖² is first at the target, over those of the other "
        "method. DSVRBGD reaches this target by definition, if it descends at all. All read minibatches of one size, "
        "but for MA-DSBO and D-SOBA without the word sampled, which read all examples.",
        findings,
    )


def order(what: str, job: str, pairs: Sequence[tuple[Record, Record]]) -> Finding:
    """Whether the first of each pair is at least as good as the second."""
    if not pairs:
        return missing(what, job)
    words, verdict = judge([behind(*pair) for pair in pairs], SHARE)
    return Finding(what, f"lacks {words} of the decrease; {gradients(pairs)}", verdict)


def gradients(pairs: Sequence[tuple[Record, Record]]) -> str:
    """The last ‖∇F‖² of both."""
    one, two = (cell([run.metrics["exact_gradient"] for run in side]) for side in zip(*pairs, strict=True))
    return f"last ‖∇F‖² {one} against {two}"


def corrections(results: Results) -> Claim:
    """SPARKLE's corrections on a sparse graph."""
    chain = (("sparkle-ed", "sparkle-gt"), ("sparkle-extra", "sparkle-gt"), ("sparkle-gt", "d-soba"))
    findings = []
    for job, words in (("sparse-policy", "policy evaluation"), ("sparse-cleaning", "hyper-cleaning, two classes each")):
        for one, two in chain:
            pairs = [(a, b) for a, b in matched(results.get(job, ()), one, two)]
            findings.append(order(f"{words}: {one} ≥ {two}", job, pairs))
    return Claim(
        "Exact diffusion and EXTRA before tracking, tracking before nothing",
        "SPARKLE, arXiv 2411.14166",
        "On sparse graphs with severe heterogeneity SPARKLE-ED and SPARKLE-EXTRA are at least as good as SPARKLE-GT, "
        "which is at least as good as D-SOBA.",
        "Ring of 20 agents. Number: F(x̄) of the first method minus that of the second after the same derivative "
        f"evaluations, over the larger decrease of the two since the start; at least as good is at most {SHARE:g}.",
        findings,
    )


def ahead(pairs: Sequence[tuple[Record, Record]]) -> tuple[str, str]:
    """What the first of each pair lacks, in words, and whether it is ahead, behind, or neither by SHARE."""
    words, verdict = judge([behind(one, two) for one, two in pairs], -SHARE)
    if verdict == FAILS and judge([behind(two, one) for one, two in pairs], -SHARE)[1] != HOLDS:
        verdict = f"{OPEN}: no difference above {SHARE:.0%}"
    return words, verdict


def levels(results: Results) -> Claim:
    """A complete graph below against one above."""
    lower, upper = results.get("lower-complete", ()), results.get("upper-complete", ())
    findings = []
    for method in ("sparkle-ed", "sparkle-gt"):
        below, above = by_seed(lower, method), by_seed(upper, method)
        seeds = sorted(set(below) & set(above))
        if not seeds:
            findings.append(missing(method, "lower-complete, upper-complete"))
            continue
        pairs = [(below[seed], above[seed]) for seed in seeds]
        words, verdict = ahead(pairs)
        findings.append(Finding(method, f"lower complete lacks {words} of the decrease; {gradients(pairs)}", verdict))
    return Claim(
        "The graph of the lower level matters more",
        "SPARKLE, arXiv 2411.14166",
        "The topology of the lower level and of v matters more than that of the upper level.",
        "Hyper-cleaning, 20 agents of two classes each. Number: F(x̄) with x on a ring, y and v on a complete graph, "
        "minus F(x̄) with x on a complete graph, y and v on a ring, after the same derivative evaluations, over the "
        f"larger decrease of the two since the start; it holds if that is at most {-SHARE:g}.",
        findings,
    )


def slope(runs: Sequence[Record]) -> float:
    """Of log floor against log n, least squares; NaN where a floor is not finite and positive."""
    floors = np.array([run.metrics["floor"] or math.nan for run in runs], float)
    sizes = np.array([run.configuration["agents"] for run in runs], float)
    if not (np.isfinite(floors) & (floors > 0)).all():
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(floors), 1)[0])


def speed_up(results: Results) -> Claim:
    """The noise floor against n."""
    findings = []
    for method in ("d-soba", "dsvrbgd"):
        groups = matched(results.get("speed-up", ()), *(f"{method}-n{n}" for n in SIZES))
        if not groups:
            findings.append(missing(method, "speed-up"))
            continue
        found = [slope(group) for group in groups]
        everything = Interval(-math.inf, math.inf)
        words, verdict = judge([everything if math.isnan(one) else Interval(one, one) for one in found], STEEP)
        columns = zip(SIZES, zip(*groups, strict=True), strict=True)
        floors = [f"n = {n}: {cell([run.metrics['floor'] for run in runs])}" for n, runs in columns]
        findings.append(Finding(method, f"slope {words}; " + ", ".join(floors), verdict))
    return Claim(
        "Linear speed-up",
        "D-SOBA, arXiv 2402.03167; DSVRBGD, arXiv 2311.11342",
        "The noise of stochastic methods falls like 1/n with the number n of agents.",
        f"Quadratic problem with known x*, ring, rows divided at random, the same constant steps and size of a "
        f"minibatch for n = {', '.join(map(str, SIZES))}. Number: slope of log floor against log n, by least "
        f"squares for each seed, where the floor is the mean of ‖x̄ − x*‖² over the second half of a run; it holds if "
        f"the slope is at most {STEEP:g}, where 1/n is −1.",
        findings,
    )


def compression(results: Results) -> Claim:
    """Compressed messages, beyond the papers."""
    findings = []
    for base in ("sldbo", "dsvrbgd"):
        for share in SHARES_SENT:
            name = f"{base}-top{share:g}"
            pairs = [(one, two) for one, two in matched(results.get("cleaning", ()), name, base)]
            costs = until_the_loss("megabytes")
            findings.append(against(f"{name} / {base}", "cleaning", pairs, costs, base, "MB", 1.0))
    return Claim(
        "Compression saves bytes",
        "beyond the papers",
        "With compressed differences (CHOCO, the largest entries) SLDBO and DSVRBGD reach the same loss with fewer "
        "bytes.",
        f"Hyper-cleaning. Target: the uncompressed method's last F(x̄) and {SHARE:.0%} of its decrease since the "
        "start. Number: MB that an agent sent until F(x̄) is first at the target, over those of the uncompressed "
        "method; the share of entries that is sent is behind the word top, and each takes an index with it.",
        findings,
    )


def refresh(results: Results) -> Claim:
    """Agents that moved against agents at random, beyond the papers."""
    findings = []
    for job, words in SKIPPING_JOBS.items():
        for p in ADAPTIVE:
            what = f"{words}, p = {p:g}"
            runs = results.get(f"{job}-skipping", ())
            pairs = [(one, two) for one, two in matched(runs, f"s3ldbo-adaptive-{p:g}", f"s3ldbo-subset-{p:g}")]
            if not pairs:
                findings.append(missing(what, f"{job}-skipping"))
                continue
            lack, verdict = ahead(pairs)
            findings.append(Finding(what, f"lacks {lack} of the decrease", verdict))
    tasks = [{one.verdict for one in pair} for pair in zip(findings[::2], findings[1::2], strict=True)]
    won = sum(HOLDS in task and FAILS not in task for task in tasks)
    words = f"wins on {won} of {len(tasks)} tasks: with one p at least, and without a loss"
    without = sum(any(verdict.startswith(f"{OPEN}: no results") for verdict in task) for task in tasks)
    verdict = FAILS if won + without < LEAST_TASKS else f"{OPEN}: no results of {without} tasks"
    whole = Finding("all tasks", words, HOLDS if won >= LEAST_TASKS else verdict)
    return Claim(
        "Agents that moved should refresh",
        "beyond the papers",
        "S3LDBO ends lower if those agents evaluate who have moved farthest since they last did, in place of as many "
        "at random. (An experiment of the benchmarks; the library would offer it if it won.)",
        "Number: F(x̄) with the agents that moved farthest minus F(x̄) with as many at random, after the same derivative "
        f"evaluations, over the larger decrease of the two since the start; it holds if that is at most {-SHARE:g}. "
        f"All tasks: it holds if that wins on {LEAST_TASKS} of them.",
        [*findings, whole],
    )


def curvature(results: Results) -> Claim:
    """Kronecker factors as preconditioners, beyond the papers."""

    def iterations(run: Record) -> Spent:
        found = run.metrics["iterations"]
        return Spent(run.configuration["outer_steps"] if found is None else found, found is not None)

    findings = []
    for method in ("kfac-v", "kfac", "ekfac"):
        pairs = matched(results.get("curvature", ()), method, "plain")
        if not pairs:
            findings.append(missing(method, "curvature"))
            continue
        own, other = ([iterations(run) for run in side] for side in zip(*pairs, strict=True))
        words, verdict = judge([ratio(*both) for both in zip(own, other, strict=True)], 1.0, operator.lt)
        penalties = cell([run.metrics["penalty"] for run, _ in pairs])
        numbers = f"ratio {words}; {averaged(own)} against {averaged(other)} iterations; learnt penalty {penalties}"
        findings.append(Finding(method, numbers, verdict))
    return Claim(
        "Curvature of each agent's own saves iterations",
        "beyond the papers",
        "SLDBO reaches the same x* in fewer iterations if y and v, or v alone, move along directions that the "
        "Kronecker factors of each agent's own loss have rescaled after they were tracked.",
        "One penalty of a softmax regression. Number: iterations until all three mean directions at the mean iterate "
        "are at 1e-6 of their first values, over those without factors. As many pairs of steps are tried for each; "
        "with factors a step is a share of Newton's, without them it is a length, so that their grids differ.",
        findings,
    )


CLAIMS: tuple[Callable[[Results], Claim], ...] = (
    snapshots,
    communication,
    corrections,
    levels,
    speed_up,
    compression,
    refresh,
    curvature,
)  # another claim is another function

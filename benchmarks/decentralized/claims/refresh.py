"""Who refreshes, and how much of a message is sent: beyond the papers."""

from benchmarks.decentralized.claims.claim import OWN, Claim, bold, fewer, missing, named, span, table, told
from benchmarks.decentralized.claims.snapshots import ALL_TASKS, tasks
from benchmarks.decentralized.claims.sparkle import LACK, TOO_SHORT, ahead
from benchmarks.decentralized.levels import LOSSES
from benchmarks.decentralized.measured import measured
from benchmarks.decentralized.records import Results, matched
from benchmarks.decentralized.verdicts import FAILS, HOLDS, OPEN, SHARE
from benchmarks.decentralized.worst_first import PATIENCE

SHARES_SENT = (0.3, 0.1)
WHOLE_AGENTS = (0.25, 0.125)
LEAST_TASKS = 3  # on which a new choice of agents has to win
TRIED = ("synthetic", "cleaning", "policy")  # with agents whose predictions err most


def compression(results: Results) -> Claim:
    """Compressed messages."""
    rows, found = [], []
    for base, job in (("sldbo", "cleaning"), ("dsvrbgd", "stochastic-cleaning")):
        runs = measured(results, job)
        for share in SHARES_SENT:
            name = f"{base}-top{share:g}"
            row = fewer(runs, name, base, LOSSES, "megabytes", job)
            found += row
            rows.append([f"{name} / {base}", *told(row)])
    return Claim(
        title="Compression saves bytes",
        source=OWN,
        words="With compressed differences (CHOCO, the largest entries) SLDBO and DSVRBGD reach the same loss with "
        "fewer bytes.",
        numbers=f"{span(one.mean for one in found)} of the bytes without",
        verdicts=[one.verdict for one in found],
        measure="Hyper-cleaning. Number: MB that an agent sends until F(x̄) is at the target, over those of the "
        "uncompressed method; the share of entries that is sent is behind the word top, and each takes an index with "
        "it.",
        details=table(["ratio of bytes", *map(named, LOSSES)], rows),
    )


def refresh(results: Results) -> Claim:
    """Agents that moved against agents at random."""
    rows, wins, found = [], [], []
    for job, (words, _) in tasks(results).items():
        runs = results.get(job, ())
        verdicts = set()
        for p in WHOLE_AGENTS:
            pairs = [(a, b) for a, b in matched(runs, f"s3ldbo-adaptive-{p:g}", f"s3ldbo-subset-{p:g}")]
            found.append(ahead(pairs) if pairs else missing(job))
            rows.append([f"{words}, p = {p:g}", found[-1].words, bold(found[-1].verdict)])
            verdicts.add(found[-1].verdict)
        wins.append(HOLDS in verdicts and FAILS not in verdicts)
    absent = sum(one.verdict.startswith(f"{OPEN}: no results") for one in found[::2])
    verdict = FAILS if sum(wins) + absent < LEAST_TASKS else f"{OPEN}: no results of {absent} tasks"
    if sum(wins) >= LEAST_TASKS:
        verdict = HOLDS
    return Claim(
        title="Agents that moved should refresh",
        source=OWN,
        words="S3LDBO ends lower if those agents evaluate who have moved farthest since they last did, in place of as "
        "many at random.",
        numbers=f"wins on {sum(wins)} of {len(wins)} tasks; behind by {span(one.mean for one in found)} of the "
        "decrease, where negative is ahead",
        verdicts=[verdict],
        measure="An experiment of the benchmarks; the library would offer it if it won. First: those that moved "
        f"farthest; second: as many at random. Number: {LACK}; it wins where that is at most {-SHARE:g}, and on a task "
        f"if it wins with one p at least and loses with none. The claim holds if it wins on {LEAST_TASKS} tasks. "
        f"{TOO_SHORT}",
        details=table(["of", "behind by", "verdict"], rows),
    )


def worst(results: Results) -> Claim:
    """Agents whose predictions err most against turns."""
    rows, found = [], []
    for job in TRIED:
        row = fewer(measured(results, job), "s3ldbo-worst-0.1", "s3ldbo-predicted-0.1", LOSSES, "derivatives", job)
        found += row
        rows.append([ALL_TASKS[job], *told(row)])
    return Claim(
        title="Agents whose predictions err most should refresh",
        source=OWN,
        words="Where directions are predicted between refreshes, S3LDBO with p = 0.1 needs fewer derivative "
        "evaluations if those agents refresh whose prediction is expected to err most, in place of taking turns.",
        numbers=f"{span(one.mean for one in found)} of the evaluations in turn",
        verdicts=[one.verdict for one in found],
        measure="An experiment of the benchmarks; the library would offer it if it won. Number: derivative evaluations "
        "of an agent until a share of SLDBO's decrease of F, over those of agents in turn, each with its own best "
        "steps. What is expected to err: how far the prediction was out at the agent's last refresh, relative to the "
        "change that it said, times the change that it says now, over the length of the mean direction, which the "
        f"trackers come to; who has waited for {PATIENCE:g} turns goes before the others. The mean and the choice are "
        "exact, and need messages that do not count. With tracking; exact diffusion was not tried.",
        details=table(["ratio of evaluations", *map(named, LOSSES)], rows),
    )

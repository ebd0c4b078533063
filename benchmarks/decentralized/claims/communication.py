"""DSVRBGD against the stochastic methods before it."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.decentralized.claims.claim import Claim, fewer, marked, named, span, table, told
from benchmarks.decentralized.levels import GRADIENTS, LOSSES, Level
from benchmarks.decentralized.measured import Measured, measured
from benchmarks.decentralized.records import Results
from benchmarks.decentralized.verdicts import arrivals, averaged


class Setting(NamedTuple):
    """Where stochastic methods are compared.

    Attributes:
      job: whose runs they are.
      words: for the page.
      levels: to reach.
    """

    job: str
    words: str
    levels: Sequence[Level]


SETTINGS = (
    Setting("stochastic-cleaning", "hyper-cleaning, minibatches of 32", LOSSES),
    Setting("stochastic-4", "penalties, minibatches of 4", (*LOSSES, *GRADIENTS)),
    Setting("stochastic-32", "penalties, minibatches of 32", (*LOSSES, *GRADIENTS)),
)
METHOD = "dsvrbgd"
RIVALS = {  # of the paper, and what is compared
    "mdbo": "megabytes",
    "vrdbo": "megabytes",
    "ma-dsbo-sampled": "megabytes",
    "d-soba-sampled": "rounds",
}
OTHERS = ("gt-sgd", "sparkle-ed-sampled")  # not of the paper
OWN = ("dsvrbgd-alternating", "dsvrbgd-ed", "dsvrbgd-alternating-ed")
UNITS = {"megabytes": "MB", "rounds": "rounds"}


def target(level: Level) -> str:
    """A level, where there are two kinds of them."""
    return f"F, {named(level)}" if level in LOSSES else f"‖∇F‖², {named(level)}"


def amounts(runs: Measured, method: str, level: Level) -> str:
    """MB and rounds of a method until a level, and on how many seeds it arrives."""
    sent, rounds = ([*runs.spent(method, level, cost, by="megabytes").values()] for cost in UNITS)
    if not sent:
        return "–"
    mark = marked(runs, method, level, "megabytes")
    if not any(one.reached for one in sent):
        return f"–{arrivals(sent)}{mark}"
    return f"{averaged(sent)} MB; {averaged(rounds)} rounds{arrivals(sent)}{mark}"


def spending(setting: Setting, runs: Measured) -> str:
    """What every method needs to each level."""
    every = [method for method in (METHOD, *OWN, *RIVALS, *OTHERS) if method in runs.judged]
    rows = [[method, *(amounts(runs, method, level) for level in setting.levels)] for method in every]
    return table(["method", *map(target, setting.levels)], rows) if rows else "No results.\n"


def communication(results: Results) -> Claim:
    """The claim of DSVRBGD's paper, and what it costs without variance reduction."""
    parts, verdicts, shown = [], [], []
    for setting in SETTINGS:
        runs, rows = measured(results, setting.job), []
        for other, cost in {**RIVALS, **dict.fromkeys(OTHERS, "megabytes")}.items():
            found = fewer(runs, METHOD, other, setting.levels, cost, setting.job)
            name = f"{METHOD} / {other}, {UNITS[cost]}" + " (not of the paper)" * (other in OTHERS)
            rows.append([name, *told(found)])
            if other in RIVALS:
                verdicts += [one.verdict for one in found]
                shown += [one.mean for one in found]
        headers = ["ratio", *map(target, setting.levels)]
        parts.append(f"On {setting.words}:\n\n{spending(setting, runs)}\n{table(headers, rows)}")
    return Claim(
        title="Variance reduction saves communication",
        source="DSVRBGD, arXiv 2311.11342",
        words="DSVRBGD reaches a stationary point with fewer bytes than MDBO, VRDBO and MA-DSBO where agents differ, "
        "and with fewer rounds than D-SOBA.",
        numbers=f"{span(shown)} times their bytes or rounds",
        verdicts=verdicts,
        measure="Number: MB that an agent sends, or rounds, until the target, over those of the other method; the "
        "claim holds where that is below 1, or where the other method does not arrive. All read minibatches of one "
        "size. STORM's momentum is tried beside the steps (0.03, 0.1, 0.3); MDBO and VRDBO take their inverse from "
        "minibatches. The paper's measure is ‖∇F‖². It vanishes where the sigmoid of hyper-cleaning saturates, and "
        "falls where steps have made the logarithm of a penalty very small, at bad points too: F is judged beside it, "
        "and alone on hyper-cleaning.",
        details="\n".join(parts),
    )

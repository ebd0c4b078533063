"""What Kronecker factors are better for: to predict directions, or to rescale steps."""

from benchmarks.decentralized.claims.claim import OWN, Claim, fewer, named, span, table, told
from benchmarks.decentralized.claims.snapshots import ALL_TASKS, TASKS, ratios, shortly
from benchmarks.decentralized.levels import LOSSES
from benchmarks.decentralized.measured import BASE, measured
from benchmarks.decentralized.records import Results
from benchmarks.decentralized.verdicts import cell

JOB = "cleaning"
PREDICTED = ("s3ldbo-predicted-0.1", "s3ldbo-predicted-ed-0.1")
RESCALED = ("s3ldbo-kfac-0.1", "sldbo-kfac")
TURNS = ("s3ldbo-cyclic-0.1", "s3ldbo-0.1")  # what turns bring without factors, beside that


def milliseconds(results: Results, job: str, method: str) -> str:
    """CPU milliseconds of an iteration of all agents, where they are known."""
    runs = [run.metrics for run in results.get(job, ()) if run.judged and run.method == method]
    spent = [(one.get("cpu_seconds"), one.get("outer_steps")) for one in runs]
    known = [1e3 * seconds / steps for seconds, steps in spent if seconds and steps]
    return cell(known) if known else "–"


def factors(results: Results) -> Claim:
    """Predictions against preconditioned steps, both of Kronecker factors."""
    runs = measured(results, JOB)
    rows, found = [], []
    for one, two in (*((one, two) for one in PREDICTED for two in RESCALED), (PREDICTED[0], TURNS[0]), TURNS):
        compared = fewer(runs, one, two, LOSSES, "derivatives", JOB)
        found += compared if two in RESCALED else []
        rows.append([f"{one} / {two}", *told(compared)])
    return Claim(
        title="Factors predict better than they rescale",
        source=OWN,
        words="On hyper-cleaning with p = 0.1, S3LDBO whose directions follow Kronecker factors between refreshes "
        "needs fewer derivative evaluations than S3LDBO and SLDBO whose steps of y and v such factors rescale.",
        numbers=f"{span(one.mean for one in found)} of the evaluations with rescaled steps",
        verdicts=[one.verdict for one in found],
        measure=f"{TASKS[JOB].capitalize()}. Number: derivative evaluations of an agent until a share of SLDBO's "
        "decrease of F, over those of the other method, each with its own best steps. -kfac finds its factors anew in "
        "each iteration, which does not count as evaluations; predictions have those of the last refresh, weigh an "
        "example by the trace of its curvature, and know beside that how the weights in x change the directions, and, "
        "as far as it was right, what y changes in ∇f. The last two rows are not judged: what predictions bring "
        "where agents refresh in turn, and what turns bring.",
        details=table(["ratio of evaluations", *map(named, LOSSES)], rows)
        + "\nEvaluations / bytes to 99% on hyper-cleaning, over those of SLDBO; and CPU milliseconds of an iteration "
        "of all agents on this machine, factors and predictions included:\n\n"
        + table(
            ["method", "evaluations / bytes", *ALL_TASKS.values()],
            [
                [method, both, *(milliseconds(results, job, method) for job in ALL_TASKS)]
                for method, both in {
                    BASE: "1 / 1",
                    **{
                        name: shortly(ratios(runs, name, LOSSES[-1], JOB))
                        for name in (*reversed(TURNS), *PREDICTED, *RESCALED)
                    },
                }.items()
            ],
        ),
    )

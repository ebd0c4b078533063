"""RESULTS.md: claims beside what was measured, and the numbers of every job, made of the JSON files alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.decentralized.claims import CLAIMS
from benchmarks.decentralized.claims.claim import OWN, Claim, table
from benchmarks.decentralized.paper_jobs import Job
from benchmarks.decentralized.records import Record, Results
from benchmarks.decentralized.verdicts import FAILS, HOLDS, OPEN, SHORT, cell, counted, last_quarter, overall, summary
from benchmarks.harness.grid import at_ends

COLUMNS = {
    "exact_loss": "F(x)",
    "exact_gradient": "‖∇F(x)‖²",
    "derivatives": "derivative evaluations",
    "megabytes": "MB sent",
    "rounds": "rounds",
    "seconds": "seconds",
    "cpu_seconds": "CPU seconds",
}
COUNTS = frozenset(
    (
        *("outer_loss", "gradient_norm", "exact_residual", "exact_product_residual", "consensus", "outer_steps"),
        *("compile_seconds", "compile_cpu_seconds", "temp_bytes", "breakdowns"),
        *("inner_gradients", "outer_gradients", "hessian_products", "cross_products"),
    )
)
PICTURE = "profiles.png"  # beside the page
TEMPLATE = """\
# Decentralized methods: what the papers claim, and what was measured

{overview}
The numbers of verdicts count comparisons: tasks, targets and methods. "{holds}": the mean over seeds meets the bound by
more than its standard error, or every seed does. "{fails}": the opposite. Open is "{short}": a target was not reached,
and at the pace of its last quarter a longer run might have met the bound; and "{open}": within a standard error of the
bound, or seeds that do not agree. The word is that of the comparisons that are decided: all hold, three in four, more
than one in four, fewer, none; "open" where more than twice as many are not decided. Ranges are of means over the seeds
where both methods arrive, if most do, and what is in brackets says for how many comparisons that is so. A verdict is
about these runs, not about the papers.

This file is made by the command below, of the JSON files of its runs. Do not edit it: run the command again, with
`--report-only` to write it from files that are there.

    {command}

- Setting: {setting}
- Seeds: {seeds}
- Device: {devices}
- Versions: {versions}
- Missing: {missing}

## How it is measured

Every method tries the same grid of steps on the tuning seeds, and keeps about twenty checkpoints of each run, where
F(x̄) and its gradient are of the accurately solved inner problem. For each target the steps with the least cost on the
worst of these seeds are chosen, and run on other seeds, which are judged; steps whose next larger inner step
diverges on a tuning seed are left out, since the edge of stability is elsewhere on other seeds: the largest inner step
of a grid serves for that alone. Targets of F are shares of its decrease from the start to the end of SLDBO's best run
on the same seed; targets of ‖∇F‖² are ε times the first one. A target counts as reached where the curve comes to it,
between two checkpoints, and stays there until four times as much is spent, or to the end of the run. Numbers are mean ±
standard error over seeds, and † marks steps that do not reach the target on all tuning seeds. Derivative evaluations,
MB and rounds are of one agent; an evaluation is ∇f, ∇_y g, a Hessian and a cross product on all its examples, a quarter
each; what predictions read beside that is in the seconds alone. The methods are written from what is public of the
papers, and their docstrings say where that left a choice. Noise floors are of given steps, and the study of
curvature has nine pairs of the first seed.

![Performance profiles]({picture})

Performance profiles (Dolan and Moré, 2002) over the tasks with three methods or more: on how many of all tasks, targets
of F and judged seeds a method is within so many times the cost of the cheapest method of that task; grey are the
methods without a name here. A method that ran on few tasks, of which the label tells the number, is counted on these,
among their methods.

## Claims

{claims}
## Numbers

F(x) and its gradient are at the mean x, at the end of the runs whose steps were chosen for the highest target; the rows
are in the order of F(x). Where a sigmoid saturates, as on hyper-cleaning, a small gradient says nothing. Seconds are
run time on this machine, and depend on what else it does; CPU seconds, of all its threads, less so. Last quarter: the
share of its decrease of F since the start that a method makes in the last quarter of its run; where that is much, it
was short. Steps: of x and of y, where v has that of y; * at an end of the grid, where a better one may lie outside. A
run that ended early is named below its table.

{numbers}"""
SETTINGS = {
    True: "quick: short runs on small data (MNIST: 14 × 14 pixels), some of them too short to decide; nothing here is "
    "about the full setting.",
    False: "full.",
}


class Log(NamedTuple):
    """What is known of a job that was started.

    Attributes:
      command: as it was run.
      code: its exit code.
      seconds: that it took.
      cpu_seconds: of all its threads; None in older files.
    """

    command: str
    code: int
    seconds: float
    cpu_seconds: float | None = None


def mean_loss(records: Sequence[Record]) -> float:
    """For the order of rows; those without a finite loss come last."""
    losses = [record.metrics.get("exact_loss") for record in records]
    return sum(math.inf if loss is None else loss for loss in losses) / len(losses)


def still_falling(records: Sequence[Record]) -> str:
    """Share of its decrease that F brings in the last quarter of a run."""
    known = [share for share in map(last_quarter, records) if not math.isnan(share)]
    return f"{summary(known)[0]:.1%}" if known else "–"


def numbers(records: Sequence[Record]) -> str:
    """The table of a job: scores of the task, and the columns of all tasks that it has."""
    known = {name for record in records for name in record.metrics}
    columns = {
        **{name: header for name, header in COLUMNS.items() if name in known},
        **{name: name.replace("_", " ") for name in sorted(known - set(COLUMNS) - COUNTS)},
    }
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.method, []).append(record)
    ordered = sorted(
        groups.items(), key=lambda item: (mean_loss(item[1]), item[1][0].configuration.get("agents", 0), item[0])
    )
    rows = [
        [
            method,
            *(cell([record.metrics.get(name) for record in group]) for name in columns),
            still_falling(group),
            steps(group[0]),
        ]
        for method, group in ordered
    ]
    return table(["method", *columns.values(), "last quarter", "steps"], rows)


def steps(record: Record) -> str:
    """The chosen steps of x and y, with * at an end of the grid, and what else was chosen."""
    grid, chosen = record.configuration.get("grid"), record.configuration.get("step_sizes")
    if not grid or not chosen:
        return "–"
    ends = at_ends(grid, chosen)
    texts = [f"{chosen[name]:.3g}{'*' * (name in ends)}" for name in grid if name in chosen and name != "v"]
    others = record.configuration.get("settings") or {}
    return ", ".join([*texts, *(f"{name} {value:g}" for name, value in others.items())])


def words(records: Sequence[Record]) -> str:
    """Agents, graphs, division and iterations, as the files have them."""
    chosen = [record.configuration for record in records]

    def each(name: str) -> str:
        return ", ".join(map(str, sorted({one[name] for one in chosen if one.get(name) is not None})))

    named = {
        "data": each("data"),
        "n": each("agents"),
        "topology": each("topology"),
        "topology of y and v": each("lower_topology"),
        "partition": each("partition"),
        "heterogeneity": each("heterogeneity"),
        "iterations": each("outer_steps"),
        "seeds": ", ".join(map(str, sorted({record.seed for record in records}))),
    }
    return "; ".join(f"{name}: {value}" for name, value in named.items() if value)


def section(job: Job, records: Sequence[Record], log: Log | None) -> str:
    """One job: the runs that are judged."""
    parts = [f"### {job.title}\n"]
    if log is not None:
        ended = "" if log.code == 0 else f", ended with code {log.code}"
        cpu = "" if log.cpu_seconds is None else f", {log.cpu_seconds:,.0f} CPU s"
        parts.append(f"`{log.command}`, {log.seconds:,.0f} s{cpu} in all{ended}.\n")
    judged = [record for record in records if record.judged]
    parts.append(f"{words(judged)}.\n\n{numbers(judged)}" if judged else "No results.\n")
    parts += [
        f"{one.method}, seed {one.seed}: ended after {last} of {one.configuration.get('outer_steps')} iterations.\n"
        for one in judged
        if (last := one.metrics.get("outer_steps")) not in (None, one.configuration.get("outer_steps"))
    ]
    return "\n".join(parts)


def overview(claims: Sequence[Claim]) -> str:
    """A table of the papers' claims and one of our own, each claim in a line."""
    sides: dict[bool, list[list[str]]] = {False: [], True: []}
    for place, claim in enumerate(claims, 1):
        name = f"{place}. {claim.title}" + f" ({claim.source})" * (claim.source != OWN)
        counts = " / ".join(map(str, counted(claim.verdicts)))
        sides[claim.source == OWN].append([name, f"**{overall(claim.verdicts)}**", counts, claim.numbers])
    titles = {False: "claim of a paper", True: "claim beyond the papers"}
    headers = "verdict", "holds / does not / open", "measured"
    return "\n".join(table([titles[side], *headers], lines) for side, lines in sides.items())


def described(place: int, claim: Claim) -> str:
    """A claim, its measure and its findings."""
    title = f"### {place}. {claim.title} ({claim.source})"
    return f"{title}\n\nClaim: {claim.words}\n\nMeasured: {claim.measure}\n\n{claim.details}"


def distinct(values: Iterator[str]) -> str:
    """Each once, in order."""
    return "; ".join(sorted(set(values))) or "–"


def seeds(records: Sequence[Record]) -> str:
    """Those that are judged, and those that steps were chosen on."""
    judged, tuning = (
        ", ".join(map(str, sorted({record.seed for record in records if record.judged == side})))
        for side in (True, False)
    )
    return (judged or "–") + f" judged; {tuning} to choose steps on" * bool(tuning)


def render(
    command: str,
    quick: bool,
    jobs: Sequence[Job],
    results: Results,
    logs: Mapping[str, Log],
    troubles: Sequence[str] = (),
) -> str:
    """The text of RESULTS.md; the same for the same files.

    Args:
      command: what makes it.
      quick: the setting.
      jobs: of the plan.
      results: job -> runs.
      logs: job -> how it went, where it was started.
      troubles: files that were left out, and what else a reader must know of them.

    Returns:
      Markdown.
    """
    everything = [record for records in results.values() for record in records]
    claims = [make(results) for make in CLAIMS]
    absent = [job.name for job in jobs if not results.get(job.name)]
    failed = [f"{name} (code {log.code})" for name, log in logs.items() if log.code and results.get(name)]
    return TEMPLATE.format(
        command=command,
        setting=SETTINGS[quick],
        seeds=seeds(everything),
        devices=distinct(record.device for record in everything),
        versions=distinct(
            ", ".join(f"{name} {version}" for name, version in record.versions.items()) for record in everything
        ),
        missing="; ".join(
            [f"no results of {', '.join(absent)}"] * bool(absent)
            + [f"not complete: {', '.join(failed)}"] * bool(failed)
            + [*troubles]
        )
        or "nothing",
        holds=HOLDS,
        fails=FAILS,
        short=SHORT,
        open=OPEN,
        picture=PICTURE,
        overview=overview(claims),
        claims="\n".join(described(place, claim) for place, claim in enumerate(claims, 1)),
        numbers="\n".join(section(job, results.get(job.name, ()), logs.get(job.name)) for job in jobs),
    )

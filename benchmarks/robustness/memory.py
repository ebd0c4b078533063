"""What the quick run of every job needs: memory and processor seconds of a process of its own."""

import dataclasses
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from benchmarks.harness.errors import DataError
from benchmarks.robustness.page import markdown, show

TASK = "memory"
QUICK = ("hyper-cleaning",)
FOLDERS = {"tasks": "", "studies": "", "decentralized": "decentralized-"}  # and how the names of their jobs begin
UNIT = {"darwin": 1}.get(sys.platform, 1024)  # of the largest memory of a process


class Row(NamedTuple):
    """What a job took: bytes at its peak, processor seconds, and the last line of its errors where it failed."""

    job: str
    memory: int
    cpu_seconds: float
    failure: str = ""


def known() -> list[str]:
    """Jobs that may be asked for: all but those that are about robustness, and the one that runs others."""
    return [
        prefix + file.stem.replace("_", "-")
        for folder, prefix in FOLDERS.items()
        for file in sorted((Path(__file__).parents[1] / folder).glob("*.py"))
        if "\nclass Config:" in file.read_text() and prefix + file.stem != "decentralized-papers"
    ]


def measured(job: str, seconds: float) -> Row:
    """The quick run of a job, in a process of its own, with its results in a folder that is removed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MPLBACKEND": "Agg"}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "benchmarks", job, "--quick", "--results", folder]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        end = threading.Timer(seconds, process.kill)
        end.start()
        _, status, used = os.wait4(process.pid, 0)
        end.cancel()
        process.returncode = code = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = (errors.read().strip().splitlines() or [""])[-1]
    failure = f"ended with {code}: {said}" if code else ""
    return Row(job, UNIT * used.ru_maxrss, used.ru_utime + used.ru_stime, failure)


def table(rows: list[Row]) -> str:
    """Every job, in the order of the command line."""
    return markdown(
        ["job, with --quick", "memory (MiB)", "CPU seconds"],
        [[row.job, row.failure or f"{row.memory / 2**20:,.0f}", f"{row.cpu_seconds:.0f}"] for row in rows],
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs the quick setting of every job in a process of its own: its largest memory, and its processor seconds."""

    jobs: tuple[str, ...] | None = None
    """Names of jobs; by default all but those that are about robustness, and decentralized-papers."""
    seconds: float = 1800.0
    """A job that takes longer is ended."""
    quick: bool = False
    """One job, unless some are named."""
    results: Path = Path("results")
    """Folder of the results; the table goes to its subfolder memory, or memory-quick, as JSON."""
    page: Path | None = None
    """A page of docs with a place for the table."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if not 0 < self.seconds < threading.TIMEOUT_MAX:
            raise ValueError(f"seconds must be a number > 0; got {self.seconds}. Pass, say, --seconds 1800.")

    def run(self) -> int:
        """Runs the jobs and prints the table; returns 1 if one failed."""
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        jobs = self.jobs or (QUICK if self.quick else tuple(known()))
        if unknown := [job for job in jobs if job not in known()]:
            raise DataError(f"jobs must be some of {', '.join(known())}; got {', '.join(unknown)}.")
        rows = []
        for job in jobs:
            console.print(f"[dim]{job} …", soft_wrap=True)
            rows.append(measured(job, self.seconds))
        text = table(rows)
        show(console, TASK, text, rows, self.results / (TASK + "-quick" * self.quick), self.page)
        return int(any(row.failure for row in rows))

"""All decentralized tasks, one after the other, and a page that puts each paper's claim beside what was measured."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.decentralized.paper_jobs import Job, planned
from benchmarks.decentralized.profiles import draw
from benchmarks.decentralized.records import Results, read
from benchmarks.decentralized.results import PICTURE, Log, render
from benchmarks.harness import files
from benchmarks.harness.errors import DataError
from benchmarks.harness.stopping import CODES, INTERRUPTED

TASK = "decentralized_papers"
LOG = "job.json"
Start = Callable[[Sequence[str]], int]


def started(arguments: Sequence[str]) -> int:
    """Runs `python -m benchmarks` in a process of its own, so that no job takes another one down.

    Where this process is stopped, it stops the other one too, and waits until that one has said what it keeps.
    """
    with subprocess.Popen([sys.executable, "-m", "benchmarks", *arguments]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def read_log(folder: Path, tell: Callable[[str], None] = lambda text: None) -> Log | None:
    """How a job went, if it was started; None if that is not to be read, which `tell` is told."""
    path = folder / LOG
    try:
        return Log(**files.record(path)) if path.exists() else None
    except (DataError, TypeError) as error:
        tell(f"{path} does not say how the job went: {error}")
        return None


def of_children() -> float:
    """Processor seconds of the processes that were started, and have ended."""
    times = os.times()
    return times.children_user + times.children_system


def perform(command: Sequence[str], folder: Path, more: Sequence[str], start: Start) -> Log:
    """Runs a job, with more options that change no result, in place of what its folder holds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin, cpu_begin = time.perf_counter(), of_children()
    code = start([*command, "--results", str(folder), *more])
    seconds = (round(end, 1) for end in (time.perf_counter() - begin, of_children() - cpu_begin))
    log = Log(f"python -m benchmarks {' '.join(command)}", code, *seconds)
    files.write(folder / LOG, json.dumps(log._asdict(), indent=1) + "\n")
    return log


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs all decentralized tasks, and writes what was measured beside what the papers claim."""

    quick: bool = False
    """Short runs on small data, of the jobs that the claims need: two to four hours of processor time."""
    seeds: int = 3
    """How many seeds of each job, besides those that steps are chosen on: as many, at most three."""
    results: Path = Path("results")
    """Folder of the results; each job has a subfolder of decentralized_papers, or decentralized_papers-quick."""
    output: Path | None = None
    """The page that is written; by default RESULTS.md, of quick runs in benchmarks/decentralized if that is there, else
    beside the results."""
    report_only: bool = False
    """Run nothing: write the page from the files that are there."""
    resume: bool = False
    """Skip jobs that have ended well with the same command."""
    checkpoint: Path | None = None
    """Folder in which each job keeps what is done, so that the same command goes on where it was
    killed. Jobs that have ended well with it are skipped."""
    jobs: tuple[str, ...] = ()
    """Run these jobs alone; the page is about all that are there."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if self.seeds < 1:
            raise ValueError(f"seeds must be an int >= 1; got {self.seeds}. Pass --seeds 1 or more.")
        names = [job.name for job in self.plan]
        if not {*self.jobs} <= {*names}:
            raise ValueError(
                f"jobs must be some of {', '.join(names)}; got {' '.join(self.jobs)}. Pass, say, --jobs {names[0]}."
            )

    @property
    def plan(self) -> tuple[Job, ...]:
        """All jobs of this setting."""
        return planned(self.quick)

    @property
    def folder(self) -> Path:
        """Of the results of this setting."""
        return self.results / (TASK + "-quick" * self.quick)

    @property
    def page(self) -> Path:
        """That is written: the one of a checkout, where the command is run in one, for it is about quick runs."""
        checkout = Path("benchmarks/decentralized/RESULTS.md")
        return self.output or (checkout if self.quick and checkout.exists() else self.folder / checkout.name)

    def command(self, results: Results) -> str:
        """What makes such a page, with as many seeds as there are."""
        seeds = len({record.seed for records in results.values() for record in records if record.judged}) or self.seeds
        return f"python -m benchmarks decentralized-papers{' --quick' * self.quick} --seeds {seeds}"

    def run_all(self, console: Console, start: Start = started) -> int:
        """Runs one job after the other, whatever becomes of each; the exit code is that of the last one that failed."""
        chosen = [job for job in self.plan if job.name in self.jobs or not self.jobs]
        code = 0
        for place, job in enumerate(chosen, 1):
            command, folder = job.command(self.quick, self.seeds), self.folder / job.name
            log = read_log(folder, lambda text: console.print(text, markup=False, soft_wrap=True))
            console.print(f"[{place}/{len(chosen)}] {job.name}", markup=False)
            kept = self.checkpoint and self.checkpoint / job.name
            more = ["--checkpoint", str(kept)] if kept else []
            resume = self.resume or (kept and kept.exists())  # else the log is of another run
            if resume and log and not log.code and log.command == f"python -m benchmarks {' '.join(command)}":
                continue
            try:
                log = perform(command, folder, more, start)
            except KeyboardInterrupt:
                return INTERRUPTED
            code = log.code or code
            console.print(f"{job.name}: {log.seconds:,.0f} s, exit code {log.code}", markup=False)
            if log.code in CODES.values():
                return INTERRUPTED
        return code

    def write(self, tell: Callable[[str], None] = lambda text: None) -> None:
        """Writes the page, and its picture beside it; `tell` is told of what cannot be read."""
        names, troubles = [job.name for job in self.plan], list[str]()
        results = {name: read(self.folder / name, troubles.append) for name in names}
        logs = {name: log for name in names if (log := read_log(self.folder / name, troubles.append))}
        files.write(self.page, render(self.command(results), self.quick, self.plan, results, logs, troubles))
        if (figure := draw(results)) is not None:
            files.save(figure, self.page.with_name(PICTURE), metadata={"Software": None})
        for trouble in troubles:
            tell(trouble)

    def run(self) -> int:
        """Runs everything and writes the page; returns the exit code."""
        console = Console(highlight=False)
        code = 0 if self.report_only else self.run_all(console)
        self.write(lambda text: console.print(text, markup=False, soft_wrap=True))
        console.print(f"Page: {self.page}", markup=False, soft_wrap=True)
        return code

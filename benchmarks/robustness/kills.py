"""Commands that are killed at random moments and go on, beside the same commands that nobody kills.

Each run is a process, or two that share their agents, with a folder of its own. It gets one to three times a SIGKILL,
which no program can heed, at moments that are drawn over the whole time that the command takes; then it is left to end.
Its files must be those of the unkilled run: the same names, and the same numbers to the last bit, but for seconds and
the ids of the commands.
"""

import dataclasses
import functools
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.harness import files
from benchmarks.harness.errors import DataError
from benchmarks.harness.resuming import kept
from benchmarks.robustness import page

TASK = "kills"
MOST = 3  # kills of one run
HEADER = ["command", "processes", "runs", "kills", "of them within a run", "equal to the last bit"]
COMMON = ("--budget", "600", "--checkpoint-every", "0.1")


class Case(NamedTuple):
    """A command.

    Attributes:
      arguments: of `python -m benchmarks`.
      share: of the killed runs, in parts of all shares.
      processes: that share it.
    """

    arguments: Sequence[str]
    share: int = 1
    processes: int = 1

    @property
    def title(self) -> str:
        """As one types it, without what all have."""
        return " ".join(self.arguments)


ONE = ("hyper-cleaning", "--methods", "identity", "--outer-steps", "150")
AGENTS = ("decentralized-regularization", "--quick", "--methods", "sldbo", "--outer-steps", "1000")
HOSTS = ("decentralized-hyper-cleaning", "--quick", "--methods", "d-soba", "--outer-steps", "40", "--agents", "4")
CASES = (Case(ONE, 9), Case(AGENTS, 9), Case(HOSTS, 2, 2))


class Killed(NamedTuple):
    """What became of a run.

    Attributes:
      kills: how many it got.
      within: how many of them fell into a run of which a state was kept.
      differing: what is not as in the unkilled run; nothing if all is well.
    """

    kills: int
    within: int
    differing: list[str]


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def started(case: Case, folder: Path) -> list[subprocess.Popen[bytes]]:
    """The processes of a command, which goes on with what is in the folder."""
    where = ("--results", str(folder / "results"), "--checkpoint", str(folder / "kept"))
    shared = ("--distributed", "--coordinator", f"localhost:{free_port()}", "--processes", str(case.processes))
    with (folder / "output").open("ab") as output:
        return [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "benchmarks", *case.arguments, *COMMON, *where),
                    *((*shared, "--process", str(number)) if case.processes > 1 else ()),
                ],
                stdout=output,
                stderr=output,
            )
            for number in range(case.processes)
        ]


def ended(processes: Sequence[subprocess.Popen[bytes]], seconds: float | None = None) -> bool:
    """Whether all end within so many seconds; else they are killed, and so they are if this one is stopped."""
    try:
        begin = time.monotonic()
        for process in processes:
            process.wait(None if seconds is None else max(0.0, begin + seconds - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
    return True


def finish(case: Case, folder: Path) -> None:
    """Lets a command end.

    Raises:
      DataError: if it fails.
    """
    processes = started(case, folder)
    ended(processes)
    if any(process.returncode for process in processes):
        said = (folder / "output").read_text(errors="replace")
        raise DataError(f"{case.title} ended with code {processes[0].returncode} in {folder}. It said:\n{said[-2000:]}")


def unkilled(case: Case, folder: Path) -> float:
    """Lets a command run from its begin to its end; returns the seconds that it takes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.monotonic()
    finish(case, folder)
    return time.monotonic() - begin


def untimed(value: Any) -> Any:
    """A record without seconds and ids."""
    if isinstance(value, dict):
        return {name: untimed(part) for name, part in value.items() if "seconds" not in name and name != "run"}
    return [untimed(part) for part in value] if isinstance(value, list) else value


def differing(found: Path, expected: Path) -> list[str]:
    """What is in one folder and not in the other, or has other numbers."""
    names, others = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (found, expected)
    )
    told = [f"{name} is in one of both" for name in sorted(names ^ others)]
    for name in sorted(names & others):
        if name.endswith(".json"):
            one, other = (untimed(files.record(folder / name)) for folder in (found, expected))
            told += [
                f"{name}: {key}" for key in {**one, **other} if json.dumps(one.get(key)) != json.dumps(other.get(key))
            ]
    return told


def killed(case: Case, folder: Path, expected: Path, seconds: float, draw: random.Random) -> Killed:
    """Kills a command at drawn moments of its time, lets it end, and compares; another draw where it ended before."""
    kills = within = 0
    wanted = draw.randint(1, MOST)
    while not kills:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        while kills < wanted and not ended(started(case, folder), draw.uniform(0, seconds)):
            kills += 1
            within += any((folder / "kept").rglob("states/[0-9]*"))
    finish(case, folder)
    return Killed(kills, within, differing(folder / "results", expected))


@dataclasses.dataclass(frozen=True)
class Config:
    """Kills commands at random moments, lets them go on, and compares what they come to with unkilled ones."""

    runs: int = 20
    """How many runs are killed, each one to three times: nine of twenty of one command, as many of one over a graph,
    and the others of one whose agents live in two processes."""
    seed: int = 0
    """Of the moments."""
    quick: bool = False
    """One killed run of each of the first two commands."""
    page: Path | None = None
    """Page that gets the table, in place of the one that is there."""
    results: Path = Path("results")
    """Folder of the killed runs and their files, which go to its subfolder kills."""
    checkpoint: Path | None = None
    """Folder in which the command keeps what is done, so that the same command goes on where it was killed;
    the killed runs are there too."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if self.runs < 1:
            raise ValueError(f"runs must be an int >= 1; got {self.runs}. Pass --runs 1 or more.")

    def run(self) -> int:
        """Kills and compares, prints the table; returns the exit code, 1 where something differs."""
        console = Console(highlight=False)
        found: dict[Case, list[Killed]] = {}
        for case, one in self.all_runs((self.checkpoint or self.results) / TASK):
            found.setdefault(case, []).append(one)
            words = "; ".join(one.differing) or "equal to the last bit"
            console.print(f"{case.title}: {one.kills} kills: {words}", markup=False, soft_wrap=True)
        rows = [row(case, runs) for case, runs in found.items()]
        text = page.markdown(HEADER, rows)
        print(text)
        everything = [one for runs in found.values() for one in runs]
        equal = sum(not one.differing for one in everything)
        console.print(f"{equal} of {len(everything)} runs came to the numbers of those that nobody killed.")
        if self.page is not None:
            page.put(self.page, TASK, text)
        return 0 if equal == len(everything) else 1

    def all_runs(self, scratch: Path) -> Iterator[tuple[Case, Killed]]:
        """Each command unkilled, and then its killed runs."""
        cases = CASES[:2] if self.quick else CASES
        shares, work = sum(case.share for case in cases), kept(self)
        for number, case in enumerate(cases):
            own = scratch / f"{number}"
            seconds = work.once(f"{number}-unkilled", functools.partial(unkilled, case, own / "unkilled"))
            for place in range(1 if self.quick else max(1, round(self.runs * case.share / shares))):
                draw = random.Random(f"{self.seed} {number} {place}")
                one = functools.partial(killed, case, own / f"{place}", own / "unkilled" / "results", seconds, draw)
                yield case, work.once(f"{number}-killed-{place}", one, Killed)


def row(case: Case, runs: Sequence[Killed]) -> list[str]:
    """Of the table."""
    numbers = len(runs), sum(one.kills for one in runs), sum(one.within for one in runs)
    equal = sum(not one.differing for one in runs)
    return [f"`{case.title}`", f"{case.processes}", *map(str, numbers), f"{equal} of {len(runs)}"]

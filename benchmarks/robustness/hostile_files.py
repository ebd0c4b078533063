"""Readers of files from outside, against files that are cut off, have flipped bits, or are hostile in their form.

Each reader has a process of its own, which may take 2 GiB more than it had before the first file, and 10 processor
seconds for a file; both are enforced by the system, and a process that ends so is a failure. A reader may read a file,
or refuse it with an error of ours that names it; all else is a raw error.
"""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from benchmarks.data.download import FOLDER
from benchmarks.harness.errors import DataError
from benchmarks.robustness.hostile import arrays, photographs, texts
from benchmarks.robustness.hostile.making import KINDS, Case
from benchmarks.robustness.page import markdown, show

TASK = "hostile-files"
CASES = {case.name: case for case in (*arrays.CASES, *photographs.CASES, *texts.CASES)}
MEMORY = 2**31  # bytes
SECONDS = 10  # of the processor, for a file
WAIT = 120  # seconds on the wall, for one that waits and computes nothing
UNIT = {"darwin": 1}.get(sys.platform, 1024)  # of the largest memory of a process


class Row(NamedTuple):
    """What became of the files of a reader.

    Attributes:
      reader: its name.
      files: of each kind.
      refused: of each kind, those with an error of ours that names the file.
      raw: what else was raised, by kind and number of the file.
      memory: largest of the process, in bytes.
      seconds: of the processor, longest of a file.
      strays: files that were written elsewhere than in the folder of data.
    """

    reader: str
    files: dict[str, int]
    refused: dict[str, int]
    raw: list[str]
    memory: int
    seconds: float
    strays: int = 0


def tried(case: Case, path: Path) -> str | None:
    """What a reader raises that it must not; "" where it refuses the file as it should, None where it reads it."""
    try:
        return None if case.read(path) else "read, but what it read cannot be right"
    except DataError as error:
        return "" if path.name.partition(".")[0] in str(error) else f"an error without the name of the file: {error}"
    except BaseException as error:  # a panic is no Exception
        return f"{type(error).__name__}: {error}"[:300]


def measured(case: Case, number: int, seed: int, folder: Path) -> Row:
    """Tries a reader on so many files of each kind."""
    path = folder / case.file
    path.parent.mkdir(parents=True, exist_ok=True)
    files, refused = dict.fromkeys(KINDS, number), dict.fromkeys(KINDS, 0)
    raw, longest = [], 0.0
    for kind, make in KINDS.items():
        for index in range(number):
            path.write_bytes(make(case, np.random.default_rng([seed, index, len(kind)])))
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(WAIT)
            start = time.process_time()
            found = tried(case, path)
            longest = max(longest, time.process_time() - start)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            refused[kind] += found == ""
            if found:
                raw.append(f"{kind} {index}: {found}")
    return Row(case.name, files, refused, raw, UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, longest)


def limit_memory() -> None:
    """This process may take so much more memory than it has by now; where the system tells how much that is."""
    status = Path("/proc/self/statm")
    if status.exists():
        now = int(status.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def _child(name: str, number: str, seed: str, folder: str) -> None:
    case = CASES[name]
    case.hostile(np.random.default_rng(0))
    limit_memory()
    print(json.dumps(measured(case, int(number), int(seed), Path(folder))._asdict()))


def apart(name: str, number: int, seed: int) -> Row:
    """Tries a reader in a process of its own, in an empty folder with a folder of data in it."""
    with tempfile.TemporaryDirectory() as folder:
        data, work = Path(folder) / "data", Path(folder) / "work"
        data.mkdir()
        work.mkdir()
        environment = os.environ | {
            FOLDER: str(data),
            "TMPDIR": str(work),
            "HOME": str(work),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-m", "benchmarks.robustness.hostile_files", name, str(number), str(seed), str(data)]
        ended = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        strays = sum(file.is_file() and file != data / CASES[name].file for file in Path(folder).rglob("*"))
        if ended.returncode:
            said = (ended.stderr.strip().splitlines() or [""])[-1]
            none = dict.fromkeys(KINDS, 0)
            return Row(name, none, none, [f"the process ended with {ended.returncode}: {said}"], 0, 0.0, strays)
        return Row(**json.loads(ended.stdout.splitlines()[-1]))._replace(strays=strays)


def table(rows: list[Row]) -> str:
    """The rows, and their sum."""

    def cells(row: Row) -> list[str]:
        files, refused = sum(row.files.values()), sum(row.refused.values())
        kinds = [f"{row.refused[kind]} of {row.files[kind]}" for kind in KINDS]
        read = max(0, files - refused - len(row.raw))
        return [
            row.reader,
            *kinds,
            str(read),
            str(len(row.raw)),
            str(row.strays),
            f"{row.memory / 2**20:.0f} MiB",
            f"{row.seconds:.2f} s",
        ]

    both = [row.files for row in rows], [row.refused for row in rows]
    files, refused = ({kind: sum(part[kind] for part in parts) for kind in KINDS} for parts in both)
    raw = [one for row in rows for one in row.raw]
    memory, seconds = max(row.memory for row in rows), max(row.seconds for row in rows)
    total = Row("all", files, refused, raw, memory, seconds, sum(row.strays for row in rows))
    header = [
        "reader",
        *(f"{kind}: refused" for kind in KINDS),
        "read",
        "raw errors",
        "strays",
        "memory",
        "longest",
    ]
    return markdown(header, [cells(row) for row in [*rows, total]])


@dataclasses.dataclass(frozen=True)
class Config:
    """Tries every reader of files from outside on files that are cut off, have flipped bits, or are hostile."""

    files: int = 250
    """Of each kind for each reader: 10,500 in all."""
    seed: int = 0
    """Of the files."""
    quick: bool = False
    """A tenth of the files."""
    results: Path = Path("results")
    """Folder of the results; the table goes to its subfolder hostile-files, or hostile-files-quick, as JSON."""
    page: Path | None = None
    """A page of docs with a place for the table."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if self.files < 1:
            raise ValueError(f"files must be an int >= 1; got {self.files}. Pass --files 250.")

    def run(self) -> int:
        """Tries all readers and prints the table; returns 1 if there was a raw error, or a file elsewhere."""
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        number = max(1, self.files // 10) if self.quick else self.files
        rows = []
        for name in CASES:
            console.print(f"[dim]{name} …", soft_wrap=True)
            rows.append(apart(name, number, self.seed))
            for one in rows[-1].raw[:5]:
                console.print(f"{name}, {one}", style="red", markup=False, soft_wrap=True)
        text = table(rows)
        show(console, TASK, text, rows, self.results / (TASK + "-quick" * self.quick), self.page)
        return int(any(row.raw or row.strays for row in rows))


if __name__ == "__main__":
    _child(*sys.argv[1:])

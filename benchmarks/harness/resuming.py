"""What a command with --checkpoint keeps, so that the same command goes on where it was killed.

The folder holds `run.json`, which says whose it is, and for each piece of work that is done a JSON file with what came
out; of a long piece that is not, the state after some chunk, and beside it what was noted of it until then.
"""

import contextlib
import functools
import importlib.util
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jaxlib
import numpy as np
from jax.experimental import multihost_utils

import bilevax as bx
from benchmarks.harness import files
from benchmarks.harness.encoding import decoded, encoded
from benchmarks.harness.errors import DataError
from benchmarks.harness.options import options_of

RUN, WORK, STATES = "run.json", "work", "states"  # names in the folder
NOTES = 4  # kept beside the last states, of which there are fewer
T = TypeVar("T")
S = TypeVar("S", bound=tuple)

# Options that may be others when a command goes on: where things lie, how often they are kept, which devices there are.
FREE = (
    *("checkpoint", "checkpoint_every", "results", "output", "page", "report_only", "resume", "kind"),
    *("devices", "placement", "distributed", "coordinator", "processes", "process"),
)


class Kept(NamedTuple):
    """Where a piece of work is kept.

    Attributes:
      path: of its files, without an ending; None where nothing is kept.
      every: seconds from one kept state to the next, at least.
    """

    path: Path | None = None
    every: float = math.inf

    def within(self, name: str) -> "Kept":
        """Of a part of the work."""
        return self if self.path is None else self._replace(path=self.path / name)

    def once(self, name: str, make: Callable[[], T], *classes: type) -> T:
        """What a part of the work comes to: made now, unless it is kept.

        Args:
          name: of the part.
          make: the work.
          classes: of the named tuples and dataclasses in what it returns, which `encoding` says how to keep.
        """
        return self.by_steps(name, lambda states: make(), *classes)

    def by_steps(self, name: str, make: Callable[["Kept"], T], *classes: type) -> T:
        """The same of a long part, of which states are kept too.

        Args:
          name: of the part.
          make: the work, which is handed the place of its states.
          classes: of the named tuples and dataclasses in what it returns, which `encoding` says how to keep.
        """
        part = self.within(name.replace("/", "-"))
        if part.path is None:
            return make(part)
        file = part.path.with_name(f"{part.path.name}.json")
        if _agreed(file.exists()):
            try:
                value: T = _told(file, "came", *classes)
                part.drop()  # if a kill came before that
                return value
            except (DataError, ValueError) as error:
                _say(f"{error} It is made again.")
        value = make(part)
        if jax.process_index() == 0:
            files.write(file, json.dumps({"came": encoded(value)}) + "\n")
        part.drop()
        return value

    def drop(self) -> None:
        """Deletes the states."""
        if self.path is None or not self.path.exists():
            return
        _settle(self.path)
        if jax.process_index() == 0:
            shutil.rmtree(self.path, ignore_errors=True)

    def restored(self, state: Any, notes: S, *classes: type) -> tuple[Any, S]:
        """The last state that was kept, with its notes; what is handed in if there is none.

        Args:
          state: the first one, whose shapes, types and places the last one has.
          notes: of the first one.
          classes: of the named tuples in the notes.
        """
        if self.path is None:
            return state, notes
        _settle(self.path)
        if (number := _agreed(_latest(self.path))) < 0:
            return state, notes
        try:
            told = _told(_notes(self.path, number), "notes", type(notes), *classes)
            return bx.checkpoint.restore(self.path / STATES, state, step=number).state, told
        except (DataError, ValueError) as error:
            _say(f"{self.path} cannot be gone on with: {error} It starts again.")
            self.drop()
            return state, notes

    def keeper(self) -> Callable[[int, Any, Any], None]:
        """`keep(number, state, notes)` after each chunk, which keeps them if it is time."""
        last, written = time.monotonic(), list[int]()

        def keep(number: int, state: Any, notes: Any) -> None:
            nonlocal last
            if self.path is None or not _agreed(time.monotonic() - last >= self.every):
                return
            if jax.process_index() == 0:
                files.write(_notes(self.path, number), json.dumps({"notes": encoded(notes)}) + "\n")
                written.append(number)
                for old in written[:-NOTES]:
                    _notes(self.path, old).unlink(missing_ok=True)
            try:
                bx.checkpoint.save(self.path / STATES, number, state)  # the notes are there when the state is
            except OSError as error:  # of the one before
                raise DataError(f"--checkpoint: {error}") from error
            last = time.monotonic()

        return keep


NOWHERE = Kept()


def _notes(path: Path, number: int) -> Path:
    return path / f"notes-{number}.json"


def _told(path: Path, name: str, *classes: type) -> Any:
    """What is kept in a file under a name."""
    found = files.record(path)
    if name not in found:
        raise DataError(f"{path} is damaged: it has no {name}.")
    return decoded(found[name], *classes)


def _agreed(value: int) -> int:
    """The same at all hosts: what the first one says."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value


def _settle(path: Path) -> None:
    """Waits for the state that this process writes, if any; one that cannot be written is not there."""
    if path.exists():
        with contextlib.suppress(OSError):
            bx.checkpoint.wait(path / STATES)


def _latest(path: Path) -> int:
    """The number of the last state that is there; -1 for none."""
    number = bx.checkpoint.latest(path / STATES) if (path / STATES).exists() else None
    return -1 if number is None else number


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def kept(config: Any) -> Kept:
    """Where the work of a job is kept; `config` may be the part of its options that all tasks share."""
    common = getattr(config, "common", config)
    folder = getattr(common, "checkpoint", None)
    every = getattr(common, "checkpoint_every", math.inf)  # a job without the option has no states
    return Kept() if folder is None else Kept(folder / WORK, every)


@functools.cache
def new_identity() -> str:
    """The id of this command: when it began, and a draw."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def identity(config: Any) -> str:
    """The id of a run, for its files: that of this command, or of the one whose --checkpoint it goes on with.

    Raises:
      DataError: if that was another job, had other options, or versions of packages; it names what differs.
    """
    common = getattr(config, "common", config)
    folder = getattr(common, "checkpoint", None)
    if folder is None:
        return new_identity()
    versions = {module.__name__: module.__version__ for module in (jax, jaxlib, bx, np)}
    own = {"job": type(config).__module__, **options_of(config, FREE), **versions}
    file = folder / RUN
    if not file.exists():
        if (folder / WORK).exists():
            raise DataError(f"{file} is missing, and with it what {folder / WORK} is of. Pass another --checkpoint.")
        files.write(file, json.dumps({"run": new_identity(), "options": own}, indent=1) + "\n")
        return new_identity()
    told = files.record(file)
    before, run = told.get("options"), told.get("run")
    if not isinstance(before, dict) or not isinstance(run, str):
        raise DataError(f"{file} must hold run and options; it does not. Pass another --checkpoint.")
    if differing := [name for name in {**own, **before} if own.get(name) != before.get(name)]:
        words = "; ".join(f"{name} was {before.get(name)}, and is {own.get(name)}" for name in differing)
        raise DataError(
            f"{folder} is of a run with other options: {words}. Pass the same ones to go on with it, or another "
            f"--checkpoint to begin anew."
        )
    return run


@functools.cache
def _lock(folder: Path) -> int | None:
    """Keeps other commands away until this process ends, however it does.

    Raises:
      DataError: if there is one.
    """
    if os.name != "posix":
        return None
    import fcntl

    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise DataError(f"{folder} is in use by another command. Wait for it, or pass another --checkpoint.") from error
    return file


def check_ready(config: Any) -> None:
    """Refuses, before anything is computed, folders that cannot be written, and to go on with another run.

    Raises:
      DataError: if so.
    """
    common = getattr(config, "common", config)
    if (results := getattr(common, "results", None)) is not None:
        files.check_writable(results, "--results")
    if (folder := getattr(common, "checkpoint", None)) is not None:
        if importlib.util.find_spec("orbax") is None:  # which is imported when the first state is kept
            raise ModuleNotFoundError("--checkpoint needs orbax", name="orbax")
        files.check_writable(folder, "--checkpoint")
        _lock(folder)
        identity(config)

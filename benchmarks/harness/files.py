"""Files are written whole or not at all: into a temporary one beside them, which then takes their place."""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.errors import DataError

ENDING = ".tmp"  # of temporary files: no reader takes it, whatever the file is called
PROBE = b"\0" * 65536
REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO),
)


def _alive(process: int) -> bool:
    """Whether a process of this machine runs, as far as is known."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def _leftovers(path: Path) -> Iterator[Path]:
    """Temporary files for a path whose writers, of this machine, were killed."""
    front = f".{path.name}.{socket.gethostname()}-"
    for name in os.listdir(path.parent):
        process = name.removeprefix(front).removesuffix(ENDING)
        if name == f"{front}{process}{ENDING}" and process.isdigit() and not _alive(int(process)):
            yield path.with_name(name)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`, which takes its place where the block ends without an exception.

    A process that is killed in the block leaves what was there before; its temporary file goes away when the same path
    is written again. The temporary file ends in .tmp: say the format to writers that go by the ending.

    Raises:
      DataError: if the machine lets nobody write there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in _leftovers(path):
            old.unlink(missing_ok=True)
        temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{ENDING}")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # or a machine that dies might keep the new name without what is in it
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in REFUSALS:  # it may be one of the block, of a network for instance
            raise
        said = f"{error.strerror}. Make room there, or name another folder."
        raise DataError(f"{path} cannot be written: {said}") from error


def write(path: Path, text: str) -> None:
    """Writes a text."""
    with replacing(path) as file:
        file.write_text(text)


def save(figure: Any, path: Path, **options: Any) -> None:
    """Draws a figure of matplotlib, in the format of the ending."""
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], **options)


def check_writable(folder: Path, option: str) -> None:
    """Makes a folder and writes into it, to see before anything is computed that results can be kept.

    Raises:
      DataError: if that cannot be done: it names the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{socket.gethostname()}-{os.getpid()}{ENDING}"
        try:
            with probe.open("wb") as file:
                file.write(PROBE)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a name with a null byte is no OSError
        said = getattr(error, "strerror", None) or error
        fix = f"Make room there, or name another folder with {option}."
        raise DataError(f"{folder} cannot be written: {said}. {fix}") from error


def record(path: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
      DataError: if it is damaged: not to be read, cut off, no text, no JSON, or no object.
    """
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}. Make it again, or delete it.") from error
    if not isinstance(told, dict):
        raise DataError(f"{path} is damaged: it holds no object of JSON. Make it again, or delete it.")
    return told

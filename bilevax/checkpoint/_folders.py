"""The folder of a run: a folder for each step that is complete, with the checksums of its files."""

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax

PARTIAL = ".orbax-checkpoint-tmp"  # in the name of a step that is not complete
_OURS = "bilevax.json"  # what is known of the leaves, and the checksums of all other files; written last
ORBAX_CHANGES = ("_CHECKPOINT_METADATA", "commit_success.txt")  # after that, and we read neither


def place_of(folder: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(folder):
        raise ValueError(f"folder must be in a file system; got {folder}. Mount it, and pass the path.")
    place = Path(folder).expanduser().absolute()
    if place.exists() and not place.is_dir():
        raise ValueError(f"folder must be a folder; got {place}, which is a file. Pass another name.")
    return place


def steps_in(place: Path) -> list[int]:
    """Those that are complete, the newest last."""
    if not place.exists():
        return []
    return sorted(int(one.name) for one in place.iterdir() if one.name.isdecimal() and one.is_dir())


def clean(place: Path) -> None:
    """Takes away what a killed run has left."""
    for partial in place.glob(f"*{PARTIAL}*"):
        shutil.rmtree(partial)


def delete(place: Path, steps: list[int]) -> None:
    """By way of another name, so that a kill leaves no half of a step that looks like one."""
    for step in steps:
        shutil.rmtree((place / str(step)).rename(place / f"{step}{PARTIAL}-old"))


def seal(place: Path, step: int, stored: dict[str, Any]) -> None:
    """Writes our own file when all others are there, before the folder gets the name of a step."""
    partial = next(place.glob(f"{step}{PARTIAL}*"))
    files = (file for file in partial.rglob("*") if file.is_file())
    sums = {str(file.relative_to(partial)): _checksum(file) for file in files if file.name not in ORBAX_CHANGES}
    text = json.dumps(stored | {"files": sums})
    (partial / _OURS).write_text(f"{zlib.crc32(text.encode())}\n{text}")


def sound(at: Path) -> Any:
    """What our own file says; raises ValueError where a file is not as it was written."""
    try:
        checksum, _, text = (at / _OURS).read_text().partition("\n")
        damaged = [_OURS] if checksum != str(zlib.crc32(text.encode())) else []
        stored = {} if damaged else json.loads(text)
        files = sorted(stored.get("files", {}).items())[jax.process_index() :: jax.process_count()]  # all, together
        damaged += [file for file, checksum in files if _checksum(at / file) != checksum]
    except (OSError, UnicodeDecodeError) as error:
        damaged = [str(error)]
    if damaged:
        others = [step for step in steps_in(at.parent) if step != int(at.name)]
        fix = f"delete it and resume from step {max(others)}" if others else "delete it and start afresh"
        raise ValueError(
            f"folder must hold what bx.checkpoint.save has written; got {at}, which is damaged: {damaged[0]}. Restore "
            f"it from a copy, or {fix}."
        )
    return stored


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
    return checksum

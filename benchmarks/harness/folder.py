"""Where results go: one folder holds runs of one choice of options, and quick runs have a folder of their own."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

# Options that say which runs there are, and not what a run is: runs that differ in them lie side by side.
SELECTING = ("methods", "plugin", "kind", "seeds", "seed", "nets", "problems", "end_to_end", "results")
OLD = "old"  # the subfolder of the results to which runs of other options move


class Folder(NamedTuple):
    """A folder, and the options of all runs in it."""

    path: Path
    options: dict[str, Any]

    def within(self, name: str) -> "Folder":
        """A subfolder."""
        return self._replace(path=self.path / name)


def _plain(value: Any) -> Any:
    """An option as a JSON file holds it."""
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    exact = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if exact else str(value)


def options_of(config: Any) -> dict[str, Any]:
    """What a job's options say about each run, as a JSON file holds it."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= options_of(value)
        elif field.name not in SELECTING:
            found[field.name] = _plain(value)
    return found


def _told(file: Path) -> Any:
    """The options in a JSON file; None where it is of an older or another kind, or was cut off as it was written."""
    try:
        told = json.loads(file.read_text())
    except ValueError:  # no JSON, or no text
        return None
    return told.get("options") if isinstance(told, dict) else None


def prepared(config: Any, name: str, console: Console, **resulted: Any) -> Folder:
    """The folder for the runs of a job; what lies there from other options is moved away first.

    Args:
      config: the options of the job.
      name: of the folder; that of a quick run ends in -quick.
      console: told if something is moved.
      resulted: numbers of steps that came out of the options and of what the job takes by default; they are among the
        options of its runs, where one of the same name said less.

    Returns:
      The folder, which need not exist.
    """
    common = getattr(config, "common", config)
    options = options_of(config) | {option: _plain(value) for option, value in resulted.items()}
    path = common.results / (name + "-quick" * common.quick)
    if any(_told(file) != options for file in path.rglob("*.json")):
        number = 1
        while (aside := common.results / OLD / f"{path.name}-{number}").exists():
            number += 1
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.rename(aside)
        console.print(f"{path} held runs of other options, which are now in {aside}", markup=False, soft_wrap=True)
    return Folder(path, options)

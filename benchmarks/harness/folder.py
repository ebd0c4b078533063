"""Where results go: one folder holds runs of one choice of options, and quick runs have a folder of their own."""

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.harness import files
from benchmarks.harness.errors import DataError
from benchmarks.harness.options import options_of, plain
from benchmarks.harness.resuming import identity

OLD = "old"  # the subfolder of the results to which runs of other options move
DAMAGED = ".damaged"  # ending that takes a file out of the sight of every reader


class Folder(NamedTuple):
    """A folder, the options of all runs in it, and the id of the command that writes there now."""

    path: Path
    options: dict[str, Any]
    run: str = ""

    def within(self, name: str) -> "Folder":
        """A subfolder."""
        return self._replace(path=self.path / name)

    @property
    def words(self) -> str:
        """Where the files are, and whether some of them are not of this command."""
        others = [file for file in self.path.rglob("*.json") if _told(file, "run") != self.run]
        more = f"; {len(others)} more there are of earlier runs, which are not shown here" if others else ""
        return f"{self.path} (run {self.run}{more})"


def _told(file: Path, name: str) -> Any:
    """What a JSON file says; None where it says nothing of it, or is damaged."""
    try:
        return files.record(file).get(name)
    except DataError:
        return None


def _set_aside(path: Path, console: Console) -> None:
    """Takes damaged files out of the sight of readers."""
    for file in sorted(path.rglob("*.json")):
        try:
            files.record(file)
        except DataError as error:
            aside = file.with_name(file.name + DAMAGED)
            file.replace(aside)
            console.print(f"{error} It is now {aside}.", markup=False, soft_wrap=True)


def prepared(config: Any, name: str, console: Console, **resulted: Any) -> Folder:
    """The folder for the runs of a job; what lies there from other options is moved away first.

    Args:
      config: the options of the job.
      name: of the folder; that of a quick run ends in -quick.
      console: told if something is moved.
      resulted: numbers of steps that came out of the options and of what the job takes by default; they are among the
        options of its runs, where one of the same name said less.

    Returns:
      The folder.

    Raises:
      DataError: if nothing can be written there, or it is to hold what --checkpoint keeps as well.
    """
    common = getattr(config, "common", config)
    options = options_of(config) | {option: plain(value) for option, value in resulted.items()}
    path = common.results / (name + "-quick" * common.quick)
    files.check_writable(common.results, "--results")
    checkpoint = getattr(common, "checkpoint", None)
    if checkpoint is not None and checkpoint.resolve().is_relative_to(path.resolve()):
        raise DataError(f"--checkpoint must not lie within {path}, which is for results; got {checkpoint}.")
    _set_aside(path, console)
    if any(_told(file, "options") != options for file in path.rglob("*.json")):
        number = 1
        while (aside := common.results / OLD / f"{path.name}-{number}").exists():
            number += 1
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.rename(aside)
        console.print(f"{path} held runs of other options, which are now in {aside}", markup=False, soft_wrap=True)
    files.check_writable(path, "--results")
    return Folder(path, options, identity(config))

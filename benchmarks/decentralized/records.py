"""The JSON files of finished runs, read back."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.decentralized.levels import Try, along
from benchmarks.harness import files
from benchmarks.harness.errors import DataError


class Record(NamedTuple):
    """One finished run, as `report.Run` wrote it.

    Attributes:
      task: name in the file.
      method: name of the row.
      seed: of the data and the key.
      configuration: what was chosen.
      versions: of the packages.
      device: in words.
      metrics: the last numbers; None for what was not finite or has no meaning.
      curve: lists of one length, an entry for each checkpoint.
      options: of the job; none in older files.
      tries: every choice of steps that ran, as a `Try` has it; none where nothing was chosen.
      run: id of the command that made it; none in older files.
    """

    task: str
    method: str
    seed: int
    configuration: dict[str, Any]
    versions: dict[str, str]
    device: str
    metrics: dict[str, Any]
    curve: dict[str, list[Any]]
    options: dict[str, Any] | None = None
    tries: Sequence[dict[str, Any]] | None = None
    run: str | None = None

    def along(self, name: str) -> np.ndarray:
        """A curve, with NaN for what was not finite."""
        return along(self.curve, name)

    @property
    def judged(self) -> bool:
        """Whether steps were chosen on other seeds, or not at all."""
        return self.configuration.get("role") != "tuning"

    @property
    def attempts(self) -> list[Try]:
        """Every choice that ran."""
        return [Try(**one) for one in self.tries or ()]


Results = Mapping[str, Sequence[Record]]  # job -> its runs


KINDS: Mapping[str, Any] = {
    **{"task": str, "method": str, "seed": int, "configuration": dict, "versions": dict, "device": str},
    **{"metrics": dict, "curve": dict, "options": dict | None, "tries": list | None, "run": str | None},
}


def _number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def checked(told: Mapping[str, Any]) -> Record:
    """A record of what a file says.

    Raises:
      ValueError: if something is missing, unknown, or of another kind.
    """
    try:
        record = Record(**told)
    except TypeError as error:
        raise ValueError(f"it is of no run: {error}") from error
    for name, kind in KINDS.items():
        if not isinstance(value := getattr(record, name), kind):
            raise ValueError(f"{name} must be of {kind}; got {value!r}")
    if not all(map(_number, record.metrics.values())):
        raise ValueError(f"metrics must be numbers or null; got {record.metrics!r:.99}")
    curves = {"curve": record.curve}
    for number, one in enumerate(record.tries or ()):
        if not isinstance(one, dict) or {*one} != {*Try._fields} or {*map(type, one.values())} != {dict}:
            raise ValueError(f"tries[{number}] must have {', '.join(Try._fields)}; got {one!r:.99}")
        curves[f"tries[{number}]"] = one["curve"]
    for place, curve in curves.items():
        if not all(isinstance(values, list) and all(map(_number, values)) for values in curve.values()):
            raise ValueError(f"{place} must be of lists of numbers or null")
        if len({*map(len, curve.values())}) > 1:
            raise ValueError(f"{place} must be of lists of one length")
    return record


def read(folder: Path, tell: Callable[[str], None] = lambda text: None) -> list[Record]:
    """All runs in the subfolders of the folder of a job, in the order of method and seed; none if it is not there.

    Args:
      folder: of the job.
      tell: told of each file that is damaged, and thus left out, and of runs of several commands.

    Raises:
      DataError: if they are runs of several options.
    """
    records = []
    for path in sorted(folder.glob("*/*.json")):
        try:
            records.append(checked(files.record(path)))
        except DataError as error:
            tell(f"left out: {error}")
        except ValueError as error:
            tell(f"left out: {path} is damaged: {error}. Make it again, or delete it.")
    if len(runs := {record.run for record in records}) > 1:
        tell(f"{folder} has runs of {len(runs)} commands: {', '.join(sorted(map(str, runs)))}")
    for record in records:
        if record.options != records[0].options:
            raise DataError(
                f"{folder} must hold runs of one choice of options; got {records[0].options} and {record.options}. "
                f"Run the job again."
            )
    return sorted(records, key=lambda record: (record.method, record.seed))


def by_seed(records: Sequence[Record], method: str) -> dict[int, Record]:
    """The judged runs of a method."""
    return {record.seed: record for record in records if record.method == method and record.judged}


def matched(records: Sequence[Record], *methods: str) -> list[tuple[Record, ...]]:
    """One tuple for each judged seed that all of the methods ran with."""
    tables = [by_seed(records, method) for method in methods]
    seeds = sorted(set.intersection(*map(set, tables)))
    return [tuple(table[seed] for table in tables) for seed in seeds]

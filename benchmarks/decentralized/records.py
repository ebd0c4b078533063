"""The JSON files of finished runs, read back."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.decentralized.levels import Try, along
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


def read(folder: Path) -> list[Record]:
    """All runs in the subfolders of the folder of a job, in the order of method and seed; none if it is not there.

    Raises:
      DataError: if they are runs of several options.
    """
    records = [Record(**json.loads(path.read_text())) for path in folder.glob("*/*.json")]
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

"""What a finished run is, its JSON file, and the table of many runs."""

import dataclasses
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np
import optax
from rich import box, filesize
from rich.table import Table

import bilevax as bx
from benchmarks.harness import files
from benchmarks.harness.folder import Folder
from benchmarks.harness.grid import END
from benchmarks.harness.loop import Outcome

Columns = Mapping[str, tuple[str, Callable[[float], str]]]

# The columns that all tasks with an outer loop end with.
COSTS: Columns = {
    "inner_gradients": ("inner\ngrads", "{:,.0f}".format),
    "hessian_products": ("Hessian\nprods", "{:,.0f}".format),
    "cross_products": ("cross\nprods", "{:,.0f}".format),
    "seconds": ("run\n(s)", "{:.2f}".format),
    "cpu_seconds": ("CPU\n(s)", "{:.2f}".format),
    "compile_seconds": ("comp.\n(s)", "{:.1f}".format),
    "temp_bytes": ("temp.\nmemory", lambda number: filesize.decimal(round(number))),
}


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf, record)


def _versions() -> dict[str, str]:
    modules = {module.__name__: module.__version__ for module in (jax, jaxlib, optax, bx, np)}
    return {"python": platform.python_version(), **modules}


def _device() -> str:
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run of one method on one seed.

    Attributes:
      task: name of the task.
      method: name of the method, or of an anchor.
      seed: seed of the data and of the key.
      configuration: everything that was chosen; `outer_steps` and `budget` (seconds) among it, where there is a loop.
      outcome: metrics, curve and the last x.
      tries: of each choice that ran on this seed, a named tuple; none where nothing was chosen.
    """

    task: str
    method: str
    seed: int
    configuration: dict[str, Any]
    outcome: Outcome
    tries: Sequence[Any] = ()

    @property
    def finite(self) -> bool:
        """Whether the last outer loss, if there is one, and x are finite."""
        numbers = [self.outcome.metrics.get("outer_loss", 0.0), *jax.tree.leaves(self.outcome.x)]
        return all(np.isfinite(number).all() for number in numbers)

    @property
    def at_grid_end(self) -> list[str]:
        """Names of the steps that were chosen at an end of their grid."""
        return self.configuration.get(END, [])

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers must know: divergence, an early stop, products that broke down."""
        metrics, notes = self.outcome.metrics, []
        steps, wanted = metrics.get("outer_steps"), self.configuration.get("outer_steps")
        if not self.finite:
            notes.append(f"diverged (numbers not finite) at outer step {steps} of {wanted}")
        elif steps != wanted:
            notes.append(
                f"stopped at outer step {steps} of {wanted}: budget of {self.configuration['budget']:g} s spent"
            )
        if metrics.get("breakdowns"):
            notes.append(f"inverse-Hessian-vector product broke down in {metrics['breakdowns']} of {steps} outer steps")
        return [f"{self.method}, seed {self.seed}: {note}" for note in notes]

    def write(self, folder: Folder) -> None:
        """Writes `<method>-seed<seed>.json`, with null for a number that is not finite or has no meaning."""
        record = {
            "run": folder.run,
            "task": self.task,
            "method": self.method,
            "seed": self.seed,
            "options": folder.options,
            "configuration": _without_nan(self.configuration),
            "versions": _versions(),
            "device": _device(),
            "metrics": _without_nan(self.outcome.metrics),
            "curve": _without_nan(self.outcome.curve),
            **({"tries": [_without_nan(one._asdict()) for one in self.tries]} if self.tries else {}),
        }
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        files.write(folder.path / f"{self.method}-seed{self.seed}.json", text)


def grid_ends(runs: Sequence[Run]) -> str:
    """What the stars of a table mean, where there are any."""
    marked: dict[str, list[str]] = {}
    for run in runs:
        marked.setdefault(run.method, []).extend(run.at_grid_end)
    named = [f"{method} ({', '.join(dict.fromkeys(names))})" for method, names in marked.items() if names]
    ends = f"* a chosen step at an end of its grid, where a better one may lie outside: {', '.join(named)}"
    return ends if named else ""


def mean_and_error(values: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis and its standard error, which is zero for a single value."""
    array = np.asarray(values, float)
    mean = array.mean(axis=0)
    return mean, array.std(axis=0, ddof=1) / np.sqrt(len(array)) if len(array) > 1 else np.zeros_like(mean)


def _cell(values: Sequence[float | None], form: Callable[[float], str]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    mean, error = (number.item() for number in mean_and_error(numbers))
    if not math.isfinite(mean):
        return "[bold red]nan[/]"
    return f"{form(mean)} ± {form(error)}" if error else form(mean)


def table(title: str, runs: Sequence[Run], columns: Columns, anchors: Sequence[str]) -> Table:
    """One row for each method, the anchors in a section of their own; mean ± standard error over its seeds.

    A star follows the names of those with a chosen step at an end of its grid.

    Args:
      title: of the table.
      runs: those that finished.
      columns: metric -> (header, format of a number).
      anchors: names of the methods of the first section.

    Returns:
      A rich table.
    """
    view = Table(title=title, box=box.HORIZONTALS, padding=(0, 1, 0, 0), show_edge=False)
    view.add_column("method", no_wrap=True)
    for header, _ in columns.values():
        view.add_column(header, justify="right", overflow="fold")
    methods = list(dict.fromkeys(run.method for run in runs))
    last_anchor = [method for method in methods if method in anchors][-1:]
    for method in methods:
        rows = [run for run in runs if run.method == method]
        cells = [_cell([run.outcome.metrics[metric] for run in rows], form) for metric, (_, form) in columns.items()]
        mark = "*" * any(run.at_grid_end for run in rows)
        view.add_row(method + mark, *cells, end_section=method in last_anchor)
    return view

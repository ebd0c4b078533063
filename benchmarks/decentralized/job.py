"""What a task hands to the comparison of methods."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.decentralized.exact import Effort
from benchmarks.decentralized.figure import Panel
from benchmarks.decentralized.network import Network
from benchmarks.harness.report import Columns, Run


class Job(NamedTuple):
    """A decentralized task.

    Attributes:
      name: in the JSON files.
      title: of the table.
      folder: subfolder of the results.
      load: `load(seed)`; the same problem and shapes for all seeds save time.
      iterations: of SLDBO.
      outer_grid: step sizes of x.
      inner_grid: step sizes of y and v.
      columns: of the table, the scores of the task in front of those of all tasks.
      panel: what is drawn under F(x): a score, or the gradient.
      configuration: what the task chose, for the JSON files.
      caption: its own lines.
      effort: of the accurate solution.
      finish: `finish(figure, runs)` adds something below the curves, if anything.
      gradients: whether tries keep ‖∇F‖² too, for targets of it; that more than doubles the cost of F.
    """

    name: str
    title: str
    folder: str
    load: Callable[[int], Network]
    iterations: int
    outer_grid: Sequence[float]
    inner_grid: Sequence[float]
    columns: Columns
    panel: Panel
    configuration: Mapping[str, Any]
    caption: str = ""
    effort: Effort = Effort()
    finish: Callable[[Figure, Sequence[Run]], None] | None = None
    gradients: bool = False


class Place(NamedTuple):
    """Where the agents live; see `placement.place`."""

    devices: int = 1
    by: str = "shard_map"
    budget: float | None = None  # seconds in place of the option: several hosts must not stop at different iterations

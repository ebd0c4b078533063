"""The table and the picture of the same hypergradient by several libraries."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.harness.clock import Spent
from benchmarks.harness.style import COLOURS, STYLE
from benchmarks.harness.timing import quartiles, ratios

TOLERANCE = 1e-3

CAPTION = """\
ratio: time / time of plain JAX in the same round, median [quartiles] over rounds; temp.: the compiler's peak of
temporary memory; error: ‖gradient − exact‖ / ‖exact‖, exact in float64 (CG: same y, linear system solved; reverse: the
same steps; outer steps: y and v solved, median over the second half of them).
CG: tolerance 0, all iterations run, v starts at 0; jaxopt and lineax spend one more product on that start.
lineax.CG gives NaN where pᵀHp / rᵀr < 100 · eps · unknowns, often so in float32; "rescaled" multiplies H and b by 1e4.
"with its report" returns the state and info of bilevax as well: one more inner gradient, and more arrays to hand over.
Outer steps: x follows the exact trajectory for all; each library takes the smallest budget of a grid that reaches 1e-3.
y and v stay warm in all: bilevax keeps both by itself; in the others the user carries them, v as option y0 of lineax
and as init of jaxopt's solve_cg (not through custom_root, which hides v).
jaxopt is no longer maintained; what is used here (OptaxSolver, root_vjp, solve_cg) ran with the JAX of this table.
"""


class Row(NamedTuple):
    """A library in a setting.

    Attributes:
      problem, setting, library: their names.
      seconds, cpu_seconds: of each round.
      ratios: time over that of the baseline in the same round.
      compiling, temp_bytes: what its program costs once.
      error: relative, of what it returns.
      note: what it needed, if that differs between libraries.
    """

    problem: str
    setting: str
    library: str
    seconds: list[float]
    cpu_seconds: list[float]
    ratios: list[float]
    compiling: Spent
    temp_bytes: int | None
    error: float
    note: str = ""


def fastest(rows: Sequence[Row]) -> Row:
    """The fastest library other than bilevax whose error is about the smallest, or small enough if that was sought."""
    others = [row for row in rows if not row.library.startswith("bilevax") and np.isfinite(row.error)]
    allowed = max(2 * min(row.error for row in others), TOLERANCE if rows[0].note else 1e-5)
    return min((row for row in others if row.error <= allowed), key=lambda row: float(np.median(row.seconds)))


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints the table, its caption, and bilevax against the fastest other library in each setting."""
    view = Table(title="The same hypergradient", box=box.HORIZONTALS, padding=(0, 1, 0, 0), show_edge=False)
    view.add_column("library", overflow="fold")
    for header in ("ratio [quartiles]", "run\n(ms)", "CPU\n(ms)", "comp.\n(s)", "temp.\n(MiB)", "error"):
        view.add_column(header, justify="right", no_wrap=True)
    settings: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        settings.setdefault((row.problem, row.setting), []).append(row)
    notes = []
    for (problem, setting), group in settings.items():
        view.add_row(f"[bold]{problem}, {setting}")
        for row in group:
            view.add_row(*_cells(row), end_section=row is group[-1])
        own, other = [row for row in group if row.library == "bilevax"], fastest(group)
        if own:
            low, median, high = quartiles(ratios(own[0].seconds, other.seconds))
            notes.append(f"{problem}, {setting}: bilevax / {other.library} = {median:.2f} [{low:.2f}, {high:.2f}]")
    console.print(view)
    console.print(CAPTION, style="dim", soft_wrap=True, markup=False)
    console.print("bilevax against the fastest other library with the same error:")
    for note in notes:
        console.print(f"  {note}", markup=False, soft_wrap=True)


def draw(rows: Sequence[Row]) -> Figure:
    """The ratios of each setting as bars with quartiles, and the temporary memory beside them."""
    settings = list(dict.fromkeys((row.problem, row.setting) for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2 * len(settings)), dpi=150, layout="constrained")
        for setting, (time_axes, memory_axes) in zip(
            settings, figure.subplots(len(settings), 2, squeeze=False), strict=True
        ):
            group = [row for row in rows if (row.problem, row.setting) == setting and np.isfinite(row.error)][::-1]
            names = [row.library for row in group]
            colours = [COLOURS[0] if name.startswith("bilevax") else "#BBBBBB" for name in names]
            low, median, high = np.array([quartiles(row.ratios) for row in group]).T
            time_axes.barh(names, median, xerr=[median - low, high - median], color=colours)
            time_axes.set_title(", ".join(setting))
            memory_axes.barh(names, [(row.temp_bytes or 0) / 2**20 for row in group], color=colours, tick_label="")
        time_axes.set_xlabel("time / time of plain JAX in the same round")
        memory_axes.set_xlabel("temporary memory (MiB)")
    return figure


def _cells(row: Row) -> list[str]:
    low, median, high = quartiles(row.ratios)
    memory = "–" if row.temp_bytes is None else f"{row.temp_bytes / 2**20:,.1f}"
    wrong = not np.isfinite(row.error)
    error = "[bold red]nan[/]" if wrong else f"{row.error:.1e}"
    ratio = "–" if wrong else f"{median:.2f} \\[{low:.2f}, {high:.2f}]"
    run, cpu = ("–" if wrong else f"{np.median(each) * 1e3:,.1f}" for each in (row.seconds, row.cpu_seconds))
    library = f"  {row.library}" + (f" ({row.note})" if row.note else "")
    return [library, ratio, run, cpu, f"{row.compiling.seconds:.1f}", memory, error]

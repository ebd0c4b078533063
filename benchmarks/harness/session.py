"""A session at the terminal: runs one after the other, shows progress, and keeps what is done on Ctrl-C."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.harness.report import Run


def collect(
    plan: Sequence[tuple[str, int]],
    steps: int,
    runs: Callable[[Callable[[int], None]], Iterator[Run]],
    folder: Path,
    console: Console,
) -> list[Run]:
    """Takes the runs as they finish and writes each to the folder; stops at Ctrl-C and says where.

    Args:
      plan: method and seed of each run, in order.
      steps: outer steps of each run.
      runs: `runs(advance)` makes the runs; it calls `advance(number)` after so many outer steps.
      folder: of the JSON files.
      console: where progress is shown, if it is a terminal.

    Returns:
      The finished runs, fewer than planned after Ctrl-C.
    """
    finished: list[Run] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    names = [f"{method}, seed {seed}" for method, seed in plan]
    bar = progress.add_task(names[0], total=len(plan) * steps)
    try:
        with progress:
            for run in runs(lambda number: progress.advance(bar, number)):
                run.write(folder)
                finished.append(run)
                progress.update(bar, completed=len(finished) * steps, description=[*names, "done"][len(finished)])
    except KeyboardInterrupt:
        step = int(progress.tasks[0].completed) - len(finished) * steps
        console.print(
            f"[yellow]Interrupted in {names[len(finished)]}, after outer step {step} of {steps}; this run is dropped. "
            f"{len(finished)} of {len(plan)} runs are finished and kept.",
            soft_wrap=True,
        )
    return finished

"""What all tasks share: their options, the runs of their methods, and what is printed and written at the end."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import bilevax as bx
from benchmarks.harness import files, plugin
from benchmarks.harness.errors import DataError
from benchmarks.harness.folder import Folder, prepared
from benchmarks.harness.loop import Carry, Outcome, Program, Trace, compiled, drive, outer_steps
from benchmarks.harness.plugin import HYPERGRADIENTS, Function
from benchmarks.harness.report import Columns, Run, grid_ends, table
from benchmarks.harness.resuming import Kept, kept
from bilevax.typing import PyTree

QUICK_STEPS = 20
LARGEST_CHUNK = 10
CHECKPOINT_EVERY = 5.0

Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Common:
    """The options of every task."""

    methods: tuple[str, ...]
    """Methods to compare. Anchors, where a task has them, always run."""
    outer_steps: int | None = None
    """Outer steps of each run; by default as many as suit the data."""
    budget: float = 12.0
    """Seconds for each run, compilation apart. A run that has spent them stops early, and the output says where."""
    seeds: int = 1
    """How many seeds, of the keys and of all that a task draws; from 2 on, numbers are mean ± standard error."""
    seed: int = 0
    """The first seed."""
    quick: bool = False
    """Few outer steps (at most 20, where a task does not say otherwise), to see that everything runs."""
    results: Path = Path("results")
    """Folder of the results; files go to a subfolder with the name of the task, and -quick. What lies there from other
    options is moved to the subfolder old."""
    checkpoint: Path | None = None
    """Folder in which the command keeps what is done, so that the same command, started again, goes on where it was
    killed; it must have the same options. One folder for each command."""
    checkpoint_every: float = CHECKPOINT_EVERY
    """Seconds between states that are kept within a run, at least; 0: one after each chunk of outer steps."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        for name, least in (("seeds", 1), ("seed", 0), ("outer_steps", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                fix = f"--{name.replace('_', '-')} {least}"
                raise ValueError(f"{name} must be an int >= {least}; got {value}. Pass {fix} or more.")
        if not self.checkpoint_every >= 0:
            raise ValueError(
                f"checkpoint_every must be a number of seconds >= 0; got {self.checkpoint_every:g}. Pass, say, "
                f"--checkpoint-every 5."
            )
        if not self.budget > 0:
            raise ValueError(f"budget must be a number of seconds > 0; got {self.budget:g}. Pass, say, --budget 6.")

    def steps(self, default: int) -> int:
        """Outer steps of each run, where the task would take `default` of them."""
        wanted = self.outer_steps or default
        return min(wanted, QUICK_STEPS) if self.quick else wanted

    @property
    def all_seeds(self) -> range:
        """From the first to the last."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def functions(self) -> Mapping[str, Function]:
        """Of a plugin, that make rows of this job, by their names."""
        return {}

    def chosen(self, rows: Iterable[Any], foreign: Callable[[Function], Any] | None = None) -> list[Any]:
        """The rows that are to be compared.

        Args:
          rows: of the job; those whose names are wanted.
          foreign: makes a row of a function of the plugin, of those that are named, or else of all.
        """
        own = [row for row in rows if row.name in self.methods]
        if foreign is None:
            return own
        named = [function for name, function in self.functions.items() if name in self.methods]
        return [*own, *map(foreign, named or self.functions.values())]

    def origin(self, name: str) -> dict[str, str]:
        """For the JSON files: where a row came from, if it is one of the plugin."""
        return {"plugin": self.functions[name].file} if name in self.functions else {}

    def rehearse(self, name: str, program: Callable[..., Any], *arguments: Any) -> None:
        """Traces a program of a row of the plugin: what is wrong with it is said before anything runs."""
        if name in self.functions:
            self.functions[name].traced(program, *arguments)

    def check_methods(self, names: Sequence[str]) -> None:
        """Refuses methods that are not among the names."""
        if not self.methods or not {*self.methods} <= {*names}:
            raise ValueError(
                f"methods must be some of {', '.join(names)}; got {' '.join(self.methods) or 'none'}. "
                f"Pass, say, --methods {names[0]}."
            )


@dataclasses.dataclass(frozen=True)
class Options(Common):
    """The options of a task with rows that a plugin can add to."""

    plugin: str | None = None
    """A Python file of yours, which is executed, or an importable module: its rows are compared as well, all of them
    unless --methods names some. They are functions, in dicts HYPERGRADIENTS, ALGORITHMS (of one machine) and
    DECENTRALIZED; see docs/testing.md."""
    kind: tyro.conf.Suppress[str] = HYPERGRADIENTS
    """Of the rows that the plugin adds: the name of their dict. The job says it, not the command line."""

    @property
    def functions(self) -> Mapping[str, Function]:
        """Of the plugin, that make rows of this job, by their names."""
        return plugin.functions(self.plugin, self.kind)

    def check_methods(self, names: Sequence[str]) -> None:
        """Refuses methods that are not among the names and those of the plugin, and a plugin without rows for this."""
        super().check_methods([*names, *plugin.checked(self.plugin, self.kind, names)])


class Task(NamedTuple):
    """What one call of the program does.

    Attributes:
      title: of the table.
      folder: subfolder of the results; that of quick runs ends in -quick; also the name of the plot.
      outer_steps: of each run, and in its configuration.
      methods: names of the rows, in order.
      anchors: those among them that are references, in a section of their own.
      runs: `runs(advance)` makes the runs, each method in order with all its seeds; it calls `advance(number)` after
        so many outer steps.
      columns: of the table.
      caption: explains the columns.
      draw: `draw(finished runs)`, asked if a method that is no anchor ended with finite numbers.
      settle: `settle(finished runs)`, the same with what only all of them together tell.
      tuning: seeds of runs that come before the others of a method and only choose for it: they have files, but no part
        in the table and the plot.
    """

    title: str
    folder: str
    outer_steps: int
    methods: Sequence[str]
    anchors: Sequence[str]
    runs: Callable[[Advance], Iterator[Run]]
    columns: Columns
    caption: str
    draw: Callable[[Sequence[Run]], Figure]
    settle: Callable[[Sequence[Run]], Sequence[Run]] = lambda runs: runs
    tuning: Sequence[int] = ()


def collect(task: Task, options: Common, folder: Folder, console: Console) -> list[Run]:
    """Takes the runs as they finish and writes each to the folder; Ctrl-C drops the one that it hits."""
    names = [f"{method}, seed {seed}" for method in task.methods for seed in (*task.tuning, *options.all_seeds)]
    finished: list[Run] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    bar, steps = progress.add_task(names[0], total=len(names) * task.outer_steps), task.outer_steps
    try:
        with progress:
            for run in task.runs(lambda number: progress.advance(bar, number)):
                run.write(folder)
                finished.append(run)
                progress.update(bar, completed=len(finished) * steps, description=[*names, "done"][len(finished)])
    except KeyboardInterrupt:
        step = int(progress.tasks[0].completed) - len(finished) * steps
        dropped = "this run is dropped. " * (options.checkpoint is None)
        console.print(
            f"[yellow]Interrupted in {names[len(finished)]}, after outer step {step} of {steps}; {dropped}"
            f"{len(finished)} of {len(names)} runs are finished and kept.",
            soft_wrap=True,
        )
    return finished


def settled(task: Task, runs: Sequence[Run], folder: Folder) -> list[Run]:
    """The finished runs with what only all of them together tell, which their files are told too."""
    before, after = {id(run) for run in runs}, [*task.settle(runs)]
    for run in after:
        if id(run) not in before:
            run.write(folder)
    return after


def perform(task: Task, options: Common, config: Any) -> int:
    """Runs everything, prints the table and writes the files; returns the exit code.

    Args:
      task: what to run.
      options: methods and seeds.
      config: all options of the job, of which `options` are a part: runs of others are not in the same folder.
    """
    if taken := [name for name in task.anchors if [*task.methods].count(name) > 1]:
        file = options.functions[taken[0]].file
        raise DataError(f"{file} has a row {taken[0]}, and so has this job, as an anchor. Rename yours.")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    seeds = options.all_seeds
    folder = prepared(config, task.folder, console, outer_steps=task.outer_steps)
    collected = collect(task, options, folder, console)
    finished = settled(task, [run for run in collected if run.seed not in task.tuning], folder)
    if finished:
        several = f"seeds {seeds[0]} to {seeds[-1]}, mean ± standard error"
        which = several if options.seeds > 1 else f"seed {options.seed}"
        title = f"{task.title}, {task.outer_steps} outer steps, {which}"
        console.print(table(title, finished, task.columns, task.anchors))
        console.print(task.caption, style="dim")
        if ends := grid_ends(finished):
            console.print(ends, style="yellow", markup=False, soft_wrap=True)
        if options.quick:
            console.print("A quick run shows that everything runs, and claims nothing.", style="dim")
        for note in (note for run in finished for note in run.notes):
            console.print(note, style="yellow", soft_wrap=True)
        console.print(f"One JSON file for each run: {folder.words}", markup=False, soft_wrap=True)
    if any(run.method not in task.anchors and run.finite for run in finished):
        path = folder.path / f"{folder.path.name}.png"
        files.save(task.draw(finished), path)
        console.print(f"Plot: {path}", markup=False, soft_wrap=True)
    return 0 if len(finished) == len(task.methods) * len(seeds) else 130


class Method(NamedTuple):
    """A row of a table that takes outer steps with a hypergradient.

    Attributes:
      name: in lower case, also the name of its files.
      hypergradient: builds the hypergradient, when its turn comes.
      optimizer: moves x.
      start: `start(data) -> (x, y)`, the first point.
      batch: `batch(data)`, handed to each outer step.
      evaluate: `evaluate(data, carry)`, more numbers at the end of each chunk of outer steps; its time does not count.
      configuration: what it was built with, for the JSON files.
    """

    name: str
    hypergradient: Callable[[], bx.problem.Hypergradient]
    optimizer: optax.GradientTransformation
    start: Callable[[Any], tuple[PyTree, PyTree]]
    batch: Callable[[Any], Any]
    evaluate: Callable[[Any, Carry], dict[str, float | None]]
    configuration: Mapping[str, Any]


def rehearsal(method: Method, x: PyTree, y: PyTree, batch: Any) -> tuple[Carry, Trace]:
    """One outer step from the start."""
    start, chunk = outer_steps(method.hypergradient(), method.optimizer, batch)
    return chunk(start(x, y), jax.random.split(jax.random.key(0), 1), batch)


def driver(method: Method, steps: int, budget: float, advance: Advance) -> Callable[[int, Any, Kept], Outcome]:
    """`drive_one(seed, data, kept)` runs a method; its program is compiled once, or again where shapes differ."""
    size = max(size for size in range(1, LARGEST_CHUNK + 1) if steps % size == 0)
    programs: dict[Any, Program] = {}

    def drive_one(seed: int, data: Any, kept: Kept) -> Outcome:
        point, batch = method.start(data), method.batch(data)
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves((point, batch)))
        if shapes not in programs:
            programs.clear()
            programs[shapes] = compiled(method.hypergradient(), method.optimizer, *point, batch, size)
        program, evaluate = programs[shapes], functools.partial(method.evaluate, data)
        keys = jax.random.split(jax.random.key(seed), (steps // size, size))
        return drive(program, program.start(*point), keys, batch, evaluate, budget, advance, kept)

    return drive_one


def outer_loops(
    task: str, methods: Sequence[Method], load: Callable[[int], Any], steps: int, options: Common, advance: Advance
) -> Iterator[Run]:
    """Runs each method on the data of each seed; each program is compiled once, or again where shapes differ.

    Args:
      task: its name in the JSON files.
      methods: in order.
      load: seed -> data.
      steps: outer steps of each run.
      options: seeds and budget of them.
      advance: called with the number of outer steps just done.

    Yields:
      The runs as they finish.
    """
    datasets = {seed: load(seed) for seed in options.all_seeds}
    names = [method.configuration.get("estimator", method.name) for method in methods]
    for method, name in zip(methods, names, strict=True):
        data = datasets[options.seed]
        options.rehearse(name, functools.partial(rehearsal, method), *method.start(data), method.batch(data))
    for method, origin in zip(methods, map(options.origin, names), strict=True):
        chosen = {**method.configuration, **origin, "outer_steps": steps, "budget": options.budget}
        drive_one = driver(method, steps, options.budget, advance)
        for seed, data in datasets.items():
            work = functools.partial(drive_one, seed, data)
            outcome = kept(options).within(task).by_steps(f"{method.name}-seed{seed}", work, Outcome)
            yield Run(task, method.name, seed, chosen, outcome)

"""Hypergradients end to end: hyper-cleaning of the digits on minibatches, with one, three and ten inner steps."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevax as bx
from benchmarks.data.images import Data, load
from benchmarks.harness.plugin import Function, finished
from benchmarks.harness.runner import Method, Options, Task, outer_loops, perform
from benchmarks.studies.hypergradients_figure import draw_end_to_end
from benchmarks.studies.hypergradients_methods import ROWS, Inner, Row
from benchmarks.studies.hypergradients_points import feedforward, network
from benchmarks.tasks.hyper_cleaning import COLUMNS, L2, evaluate, inner_loss, numbered, outer_loss
from bilevax.typing import Array, PyTree

TASK = "hypergradients-end-to-end"
NET = network(feedforward, (64, 64), (64, 64), (64, 10))
SPLIT: dict[str, Any] = {"train": 800, "validation": 100, "corruption": 0.5}
OUTER_STEPS = {1: 600, 3: 300, 10: 150}  # inner steps -> outer steps
STEP_SIZE, MINIBATCH, OUTER = 0.5, 200, {"learning_rate": 0.1}
CAPTION = f"""\
A 64-64-64-10 network, {SPLIT["train"]} training images and {SPLIT["validation"]} to validate on; minibatches of
{MINIBATCH} for the inner steps, the inverse and the cross term alike. reverse and tail differentiate all inner steps.
"""


def foreign(function: Function) -> Row:
    """The row of a function of a plugin."""
    return Row(function.name, function.name, lambda inner: function.hypergradient(inner.given))


def method(row: Row, inner_steps: int) -> Method:
    """The row with so many inner steps."""

    def hypergradient() -> bx.problem.Hypergradient:
        inner = Inner(inner_loss(NET), STEP_SIZE, inner_steps, bx.sampling.minibatch(MINIBATCH))
        return finished(functools.partial(outer_loss, NET), row.solver(inner))

    def start(data: Data) -> tuple[Array, PyTree]:
        return jnp.zeros(data.clean.shape), NET.init(jax.random.key(data.seed), data.batch.inner[0].shape[1])

    return Method(
        name=row.name,
        hypergradient=hypergradient,
        optimizer=optax.adam(**OUTER),
        start=start,
        batch=lambda data: numbered(data.batch),
        evaluate=functools.partial(evaluate, NET, True),
        configuration={
            **SPLIT,
            "inner_steps": inner_steps,
            "minibatch": MINIBATCH,
            "l2": L2,
            "inner_optimizer": {"sgd": {"learning_rate": STEP_SIZE}},
            "outer_optimizer": {"adam": OUTER},
        },
    )


def run(numbers: Sequence[int], options: Options, config: Any) -> int:
    """Runs everything for each number of inner steps, prints tables and writes files; returns the exit code.

    Args:
      numbers: of inner steps.
      options: methods and seeds.
      config: all options of the job.
    """
    read = functools.partial(load, "digits", **SPLIT)
    chosen = options.chosen(ROWS, foreign)
    rows = {row.family if row.unrolled else row.name: row for row in chosen}
    for inner_steps in numbers:
        steps = options.steps(OUTER_STEPS[inner_steps])
        methods = [method(row._replace(name=name), inner_steps) for name, row in rows.items()]
        apart = dataclasses.replace(options, checkpoint=options.checkpoint and options.checkpoint / f"T{inner_steps}")
        task = Task(
            title=f"Hyper-cleaning of digits end to end, {inner_steps} inner steps",
            folder=f"{TASK}-{inner_steps}",
            outer_steps=steps,
            methods=list(rows),
            anchors=(),
            runs=functools.partial(outer_loops, TASK, methods, read, steps, apart),
            columns=COLUMNS,
            caption=CAPTION,
            draw=draw_end_to_end,
        )
        if code := perform(task, options, config):
            return code
    return 0

"""What a prediction is: a model of how the directions of one agent change while its point moves."""

from typing import Any, NamedTuple, Protocol

import jax

from bilevax.printing import by_text
from bilevax.problem import Batch, BilevelProblem
from bilevax.single_loop._levels import Levels
from bilevax.typing import Array, PyTree


class PredictionInit(Protocol):
    """The first memory of one agent, which has evaluated its directions d at this point."""

    def __call__(self, problem: BilevelProblem, point: Levels[PyTree], d: Levels[PyTree], batch: Batch, /) -> Any: ...


class PredictionUpdate(Protocol):
    """The memory of one agent after it has evaluated at `end`, where its directions had changed by `change`."""

    def __call__(
        self,
        memory: Any,
        problem: BilevelProblem,
        start: Levels[PyTree],
        end: Levels[PyTree],
        change: Levels[PyTree],
        batch: Batch,
        /,
    ) -> Any: ...


class Change(Protocol):
    """How much the directions of one agent are thought to change from one point to another; 0 if they are one."""

    def __call__(
        self, memory: Any, problem: BilevelProblem, start: Levels[PyTree], end: Levels[PyTree], batch: Batch, /
    ) -> Levels[PyTree]: ...


class Prediction(NamedTuple):
    """How the directions of an agent change while it moves, as pure functions of ONE agent.

        d̂(z) = d(z_r) + change(z_r → z),      z_r where the agent refreshed last

    `bx.single_loop.estimator.lazy_snapshot(coins, predict=...)` maps them over the agents (`jax.vmap`). A point is
    `Levels(x, y, v)` of one agent, v is () in a method without it; directions are like that, with None at levels that
    do not move now (levels that move in turn have a memory for each group).

    Attributes:
      init: `init(problem, point, d, batch) -> memory`, where the agent has evaluated d at this point.
      update: `update(memory, problem, start, end, change, batch) -> memory`, where the agent refreshed at `start`, now
        at `end`, and its directions have changed by `change`; of the last link of a `chain` what the first leaves.
      change: `change(memory, problem, start, end, batch) -> Levels`, the change that is predicted; it must be 0 where
        both points are one. Levels that it does not predict are None; those that do not move are dropped.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx, jax
        >>> def change(memory, problem, start, end, batch):  # of directions d(s) = s
        ...     return bx.Levels(end.x - start.x, end.y - start.y, end.v - start.v)
        >>> model = bx.single_loop.prediction.Prediction(lambda *refreshed: (), lambda memory, *moved: memory, change)
        >>> estimator = bx.single_loop.estimator.lazy_snapshot(bx.coins.subset(0.25), predict=model)
    """

    init: PredictionInit
    update: PredictionUpdate
    change: Change
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


def added(d: Levels[PyTree], change: Levels[PyTree], sign: int = 1) -> Levels[PyTree]:
    """D + sign · change at the levels that d has, in its dtypes; what is not predicted stays what it is."""

    def sum_of(leaf: Array, change: Array) -> Array:
        return (leaf + sign * change).astype(leaf.dtype)

    parts = zip(d, change, strict=True)
    return Levels(*(one if one is None or by is None else jax.tree.map(sum_of, one, by) for one, by in parts))

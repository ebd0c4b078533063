"""The lazy snapshot: agents evaluate their directions when a coin says so."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.printing import as_called
from bilevax.problem import Batch, arrays
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.estimator.estimator_type import Coins, Estimator, Oracle, everybody, where
from bilevax.single_loop.prediction.prediction_type import Prediction, added
from bilevax.typing import Array, Key, PyTree, Scalar


class SnapshotState(NamedTuple):
    """The last refreshes of all agents under a prediction, leaves [n, ...].

    Attributes:
      directions: those of each agent's last refresh, None at levels that do not move.
      point: x, y and v where that was.
      memory: of the prediction.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> gossip, levels = bx.gossip(bx.topology.ring(4)), ("x", "y", "v")
        >>> oracle = bx.single_loop.estimator.Oracle(lambda point, batch: point, gossip, levels)
        >>> point = bx.Levels(jnp.ones((4, 2)), jnp.ones(4), jnp.zeros(4))
        >>> model = bx.single_loop.prediction.secants(3)
        >>> estimator = bx.single_loop.estimator.lazy_snapshot(bx.coins.subset(0.25), predict=model)
        >>> state = estimator.init(oracle, point, bx.Batch(jnp.zeros(4), jnp.zeros(4)))
        >>> state.point.x.shape, state.memory.steps.x.shape
        ((4, 2), (4, 3, 2))
    """

    directions: Levels[PyTree]
    point: Levels[PyTree]
    memory: Any


class Snapshots(NamedTuple):
    """What is kept of the last refreshes, as functions of m stacked agents.

    init: `init(oracle, point, batch) -> state`; refresh: `refresh(oracle, state, point, batch) -> state`; directions:
    `directions(oracle, state, point, batch) -> Levels`, what agents believe now.
    """

    init: Callable[..., Any]
    refresh: Callable[..., Any]
    directions: Callable[..., Levels[PyTree]]


@as_called
def lazy_snapshot(coins: Coins, *, predict: Prediction | None = None) -> Estimator:
    """The directions of the last refresh; a coin says who refreshes now.

        D_i = d_i(s_i), r_i = s_i where the coin chooses agent i,      D_i and r_i as they were otherwise
        u_i = D_i + predict.change(r_i → s_i),                         without a prediction u_i = D_i

    Everybody evaluates at `init`, which needs the batch; coin k acts at iteration k + 1. A coin that returns ids makes
    the program evaluate the chosen agents only (gather, evaluate, scatter), and so does one that chooses all or none
    (`lax.cond`); a mask [n] evaluates every agent held here and keeps the chosen, unless one agent is held.

    A prediction changes nothing at the point of the refresh: where all agents are at rest, u_i = d_i(s_i), whatever the
    model is. What a method converges to stays the same; how fast, and with which steps, does not.

    Args:
      coins: `coins(key, k, gossip)` -> who refreshes: a scalar bool (all or none), a bool [n] of the agents held here,
        or int [m], global ids, of which those of agents held elsewhere, or of nobody, are left out. See `bx.coins`.
      predict: a `Prediction` of how directions change between refreshes, see `bx.single_loop.prediction`; None for
        directions that stay as they are.

    Returns:
      `Estimator` whose state is D; with a prediction `SnapshotState(directions, point, memory)`.

    Raises:
      ValueError: if `coins` is not such a function or `predict` is no `Prediction`; from `init` if there is no batch;
        from `update` if what `predict` returns does not fit.

    Cost: the evaluations of the chosen agents, and one of everybody at `init`. The first iteration finds the point of
    `init`: a choice by ids evaluates there once more. A prediction adds what its own docstring says, for every agent
    and iteration, none of it counted as an evaluation, and one more copy of the point.

    Example:
        >>> import bilevax as bx
        >>> estimator = bx.single_loop.estimator.lazy_snapshot(bx.coins.subset(0.25))
    """
    checks.function("coins", coins, "key", "k", "gossip")
    snapshots = FROZEN if predict is None else _predicted(predict)

    def init(oracle: Oracle, point: Levels[PyTree], batch: Any) -> Any:
        if batch is None:
            raise ValueError(
                "batch is needed at init, where every agent evaluates its first snapshot; got None. Call "
                "algorithm.init(x, y, batch)."
            )
        return snapshots.init(oracle, point, batch)

    def update(
        key: Key | None, state: Any, oracle: Oracle, point: Levels[PyTree], batch: Batch, k: Scalar
    ) -> tuple[Levels[PyTree], Any, Array]:
        chosen = jnp.asarray(coins(key, jnp.maximum(k - 1, 0), oracle.gossip))
        state, evaluations = _refreshed(snapshots, oracle, chosen, state, point, batch, k)
        return snapshots.directions(oracle, state, point, batch), state, evaluations

    return Estimator(init, update)


def _refreshed(
    snapshots: Snapshots, oracle: Oracle, chosen: Array, state: Any, point: Levels[PyTree], batch: Batch, k: Scalar
) -> tuple[Any, Array]:
    """The state after the chosen agents have refreshed, and the evaluations of each agent held here [n]."""
    ones = everybody(oracle)
    if jnp.issubdtype(chosen.dtype, jnp.integer) and chosen.ndim == 1:
        positions = chosen - oracle.gossip.agents()[0]
        positions = jnp.where((positions < 0) | (positions >= ones.size), ones.size, positions)  # held elsewhere

        def refreshed() -> Any:
            there = jax.tree.map(lambda leaf: jnp.asarray(leaf)[positions], (state, point, batch))
            new = snapshots.refresh(oracle, *there)
            return jax.tree.map(lambda old, new: old.at[positions].set(new, mode="drop"), state, new)

        alone = len(positions) == 1  # who may be nobody, in turns
        state = jax.lax.cond(positions[0] < ones.size, refreshed, lambda: state) if alone else refreshed()
        return state, (0 * ones).at[positions].add(1, mode="drop")
    _check_choice(chosen, ones.shape)
    chosen = chosen & (k > 0)
    refresh = partial(snapshots.refresh, oracle, state, point, batch)
    if chosen.size == 1:
        state = jax.lax.cond(chosen.reshape(()), refresh, lambda: state)
    else:
        state = where(chosen, refresh(), state)
    return state, jnp.where(chosen, ones, 0)


FROZEN = Snapshots(  # the state is D itself
    lambda oracle, point, batch: oracle.evaluate(point, batch),
    lambda oracle, state, point, batch: oracle.evaluate(point, batch),
    lambda oracle, state, point, batch: state,
)


def _predicted(predict: Prediction) -> Snapshots:
    """Snapshots with the point where they were taken, and a model of how directions change from there."""
    checks.made_of(
        "predict",
        predict,
        Prediction,
        "Pass, say, bx.single_loop.prediction.secants(4).",
        init=("problem", "point", "d", "batch"),
        update=("memory", "problem", "start", "end", "change", "batch"),
        change=("memory", "problem", "start", "end", "batch"),
    )

    def init(oracle: Oracle, point: Levels[PyTree], batch: Batch) -> SnapshotState:
        d = oracle.evaluate(point, batch)
        return SnapshotState(d, point, arrays(jax.vmap(partial(predict.init, oracle.problem))(point, d, batch)))

    def refresh(oracle: Oracle, state: SnapshotState, point: Levels[PyTree], batch: Batch) -> SnapshotState:
        d = oracle.evaluate(point, batch)

        def one(old: SnapshotState, point: Levels[PyTree], d: Levels[PyTree], batch: Batch) -> Any:
            change = added(d, old.directions, sign=-1)
            memory = predict.update(old.memory, oracle.problem, old.point, point, change, batch)
            checks.same_form("memory after predict.update", memory, old.memory, "Return it in the form of init.")
            return memory

        return SnapshotState(d, point, jax.vmap(one)(state, point, d, batch))

    def directions(oracle: Oracle, state: SnapshotState, point: Levels[PyTree], batch: Batch) -> Levels[PyTree]:
        def one(old: SnapshotState, point: Levels[PyTree], batch: Batch) -> Levels[PyTree]:
            change = predict.change(old.memory, oracle.problem, old.point, point, batch)
            checks.instance("what predict.change returns", change, Levels, "Return bx.Levels, None for no prediction.")
            for name, d, by in zip(Levels._fields, old.directions, change, strict=True):
                if d is not None and by is not None:
                    checks.same_shapes(f"change of {name} of predict.change", by, d, "Return changes like x, y and v.")
            return added(old.directions, change)

        return jax.vmap(one)(state, point, batch)

    return Snapshots(init, refresh, directions)


def _check_choice(chosen: Array, shape: tuple[int, ...]) -> None:
    if chosen.dtype != bool or chosen.shape not in ((), shape):
        raise ValueError(
            f"coins must return a scalar bool, a bool {list(shape)}, one for each agent held here, or int ids [m] of "
            f"such agents; got {chosen.dtype} {list(chosen.shape)}. Of a full mask, take mask[gossip.agents()]."
        )

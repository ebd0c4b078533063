"""An experiment: S3LDBO with predicted directions, whose agents refresh where predictions err most, not in turn.

It is compared here and not offered by the library: RESULTS.md says on how many tasks it wins.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevax as bx
from benchmarks.decentralized.moved_snapshot import distances, positive
from bilevax.single_loop.estimator import Estimator, SnapshotState, lazy_snapshot
from bilevax.single_loop.prediction import Prediction
from bilevax.typing import Array, Scalar

PATIENCE = 2.0  # turns after which an agent goes before the others


class Believed(NamedTuple):
    """What is kept of all agents.

    Attributes:
      snapshots: of the last refreshes.
      error: of a prediction at the last refresh over the change that it said, `Levels` of [n]; 1 before.
      age: iterations since the last refresh [n].
    """

    snapshots: SnapshotState
    error: bx.Levels
    age: Array


def worst_first(probability: float, predict: Prediction) -> Estimator:
    """Predicted directions; those agents refresh whose prediction is expected to err most, as many as in turn.

        e_i = Σ_s ρ_is ‖û_is − D_is‖ / ‖mean_j û_js‖,    ρ_is = ‖d_is − û_is‖ / ‖û_is − D_is‖ at the last refresh of i

    with D_i the direction of that refresh, û_i what is predicted now, and d_i the true one; s = x, y, v. The mean is
    what the trackers come to. Who has waited for two turns goes before all others.

    The mean is exact, and in a network the agents would tell each other e_i in each iteration: nothing counts that.
    Everything is predicted twice: the seconds of the program say nothing.
    """
    turns = bx.coins.cyclic(probability)

    def init(oracle: Any, point: bx.Levels, batch: Any) -> Believed:
        ones = jnp.ones_like(oracle.gossip.agents(), float)
        return Believed(
            lazy_snapshot(turns, predict=predict).init(oracle, point, batch), bx.Levels(ones, ones, ones), 0 * ones
        )

    def update(key: Any, state: Believed, oracle: Any, point: bx.Levels, batch: Any, k: Scalar) -> tuple:
        def where_refresh(ids: Array) -> tuple:
            estimator = lazy_snapshot(lambda key, k, gossip: ids, predict=predict)
            return estimator.update(key, state.snapshots, oracle, point, batch, k)

        nobody, last = oracle.gossip.n, state.snapshots.directions
        guessed, *_ = where_refresh(jnp.full(1, nobody))
        changes = distances(guessed, last)
        sizes = [optax.tree.norm(jax.tree.map(lambda leaf: leaf.mean(0), u)) for u in guessed]
        expected = sum(
            error * change / positive(size) for error, change, size in zip(state.error, changes, sizes, strict=True)
        )
        late = state.age >= PATIENCE / probability
        turn = turns(key, jnp.maximum(k - 1, 0), oracle.gossip)
        _, worst = jax.lax.top_k(jnp.where(late, expected.max() + state.age, expected), len(turn))
        u, snapshots, evaluations = where_refresh(jnp.where(turn < nobody, worst, nobody))

        refreshed = evaluations > 0
        errors = (
            jnp.where(refreshed & (change > 0), wrong / positive(change), error)
            for wrong, change, error in zip(distances(u, guessed), changes, state.error, strict=True)
        )
        return u, Believed(snapshots, bx.Levels(*errors), jnp.where(refreshed, 0, state.age + 1)), evaluations

    return Estimator(init, update)


def s3ldbo_worst_first(
    problem: bx.BilevelProblem, gossip: Any, step_sizes: Any, *, probability: float, predict: Prediction
) -> bx.problem.Algorithm:
    """S3LDBO with tracking and such a choice; its limit is that of `s3ldbo`."""
    correction = bx.single_loop.correction.tracking()
    return bx.single_loop.single_loop(problem, gossip, step_sizes, worst_first(probability, predict), correction)

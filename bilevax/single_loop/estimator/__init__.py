"""Estimators of the local directions of all agents: what a method believes d_x, d_y and d_v to be.

An `Estimator` is handed an `Oracle`, whose `evaluate(point, batch)` gives the exact directions of any stacked agents on
any batch. Which data, which agents and which memory: that is the estimator.
"""

from bilevax.single_loop.estimator._lazy_snapshot import SnapshotState, lazy_snapshot
from bilevax.single_loop.estimator._momentum import momentum
from bilevax.single_loop.estimator._saga import SAGAState, saga
from bilevax.single_loop.estimator._spider import page, spider
from bilevax.single_loop.estimator._storm import storm
from bilevax.single_loop.estimator.estimator_type import Estimator, Oracle, draw
from bilevax.single_loop.estimator.sampled import full, stochastic

__all__ = [
    "Estimator",
    "Oracle",
    "SAGAState",
    "SnapshotState",
    "draw",
    "full",
    "lazy_snapshot",
    "momentum",
    "page",
    "saga",
    "spider",
    "stochastic",
    "storm",
]


def __dir__() -> list[str]:
    return __all__

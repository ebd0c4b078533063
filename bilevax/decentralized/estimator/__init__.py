"""Estimators of the local directions of all agents: what a method believes d_x, d_y and d_v to be.

An `Estimator` is handed an `Oracle`, whose `evaluate(point, batch)` gives the exact directions of any stacked agents on
any batch. Which data, which agents and which memory: that is the estimator.
"""

from bilevax.decentralized.estimator.lazy_snapshot import lazy_snapshot
from bilevax.decentralized.estimator.momentum import momentum
from bilevax.decentralized.estimator.oracle import Estimator, Oracle, draw
from bilevax.decentralized.estimator.saga import SagaState, saga
from bilevax.decentralized.estimator.sampled import full, stochastic
from bilevax.decentralized.estimator.spider import page, spider
from bilevax.decentralized.estimator.storm import storm

__all__ = [
    "Estimator",
    "Oracle",
    "SagaState",
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

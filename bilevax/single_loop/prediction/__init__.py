"""Predictions of directions: what an agent thinks of them between two evaluations.

A `Prediction` is a model of how the directions of one agent change while its point moves. At the point of its last
evaluation it changes nothing, so that a snapshot method ends where it ends without one, whatever the model is:
`bx.single_loop.estimator.lazy_snapshot(coins, predict=...)`.

Where f and g are made of `bx.curvature.ModelLoss`es, all that is known of them is

    inner = chain(data_free(), kronecker())
    predict = bounded(chain(inner, trusted(outer_kronecker(outer_loss))))

With it, `bx.coins.cyclic(0.1)` and exact diffusion, S3LDBO came to 99 % of SLDBO's decrease of F with 0.14 to 0.19 of
its evaluations and 0.7 to 0.9 of its bytes on learnt penalties and hyper-cleaning; frozen directions needed 0.3 to 0.5
and 1.4 to 2.3, and came there on one seed of five on the latter. Where x are the features of a network neither did
(`benchmarks/decentralized/RESULTS.md`).
"""

from bilevax.single_loop.prediction._bounded import bounded
from bilevax.single_loop.prediction._chain import chain
from bilevax.single_loop.prediction._data_free import data_free
from bilevax.single_loop.prediction._kronecker import KroneckerState, kronecker
from bilevax.single_loop.prediction._outer_kronecker import outer_kronecker
from bilevax.single_loop.prediction._secants import SecantsState, secants
from bilevax.single_loop.prediction._trusted import TrustedState, trusted
from bilevax.single_loop.prediction.prediction_type import Prediction

__all__ = [
    "KroneckerState",
    "Prediction",
    "SecantsState",
    "TrustedState",
    "bounded",
    "chain",
    "data_free",
    "kronecker",
    "outer_kronecker",
    "secants",
    "trusted",
]


def __dir__() -> list[str]:
    return __all__

"""Decentralized bilevel optimization: agents are a leading array axis, gossip moves information between them.

An engine (`single_loop`) out of an estimator, a correction for each level and an order; every method is a preset of it.
"""

from bilevax.decentralized.dsoba import dsoba
from bilevax.decentralized.dsvrbgd import dsvrbgd, dsvrbgd_alternating, dsvrbgd_simultaneous
from bilevax.decentralized.engine import GAUSS_SEIDEL, JACOBI, Info, State, single_loop
from bilevax.decentralized.mix_factors import mix_factors
from bilevax.decentralized.s3ldbo import s3ldbo
from bilevax.decentralized.s3ldbo_unbiased import s3ldbo_unbiased
from bilevax.decentralized.sldbo import sldbo
from bilevax.decentralized.sparkle import sparkle

__all__ = [
    "GAUSS_SEIDEL",
    "JACOBI",
    "Info",
    "State",
    "dsoba",
    "dsvrbgd",
    "dsvrbgd_alternating",
    "dsvrbgd_simultaneous",
    "mix_factors",
    "s3ldbo",
    "s3ldbo_unbiased",
    "single_loop",
    "sldbo",
    "sparkle",
]

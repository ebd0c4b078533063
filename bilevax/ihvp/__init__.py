"""Inverse-Hessian-vector products."""

from bilevax.ihvp.cg import cg
from bilevax.ihvp.curved import KFACState
from bilevax.ihvp.diagonal import DiagonalState, diagonal
from bilevax.ihvp.ekfac import ekfac
from bilevax.ihvp.exact import exact
from bilevax.ihvp.identity import identity
from bilevax.ihvp.kfac import kfac
from bilevax.ihvp.linear import linear
from bilevax.ihvp.neumann import neumann
from bilevax.ihvp.nystrom import nystrom
from bilevax.ihvp.random_neumann import random_neumann
from bilevax.ihvp.rescaled import rescaled
from bilevax.ihvp.sgd import sgd

__all__ = [
    "DiagonalState",
    "KFACState",
    "cg",
    "diagonal",
    "ekfac",
    "exact",
    "identity",
    "kfac",
    "linear",
    "neumann",
    "nystrom",
    "random_neumann",
    "rescaled",
    "sgd",
]

"""Inverse-Hessian-vector products."""

from bilevax.ihvp._cg import cg
from bilevax.ihvp._curved import KFACState
from bilevax.ihvp._diagonal import DiagonalState, diagonal
from bilevax.ihvp._ekfac import ekfac
from bilevax.ihvp._exact import exact
from bilevax.ihvp._identity import identity
from bilevax.ihvp._kfac import kfac
from bilevax.ihvp._lineax import lineax
from bilevax.ihvp._neumann import neumann
from bilevax.ihvp._nystrom import nystrom
from bilevax.ihvp._random_neumann import random_neumann
from bilevax.ihvp._rescaled import rescaled
from bilevax.ihvp._sgd import sgd

__all__ = [
    "DiagonalState",
    "KFACState",
    "cg",
    "diagonal",
    "ekfac",
    "exact",
    "identity",
    "kfac",
    "lineax",
    "neumann",
    "nystrom",
    "random_neumann",
    "rescaled",
    "sgd",
]


def __dir__() -> list[str]:
    return __all__

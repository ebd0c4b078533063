"""Inverse-Hessian-vector products."""

from bilevax.ihvp.cg import cg
from bilevax.ihvp.exact import exact
from bilevax.ihvp.identity import identity
from bilevax.ihvp.linear import linear
from bilevax.ihvp.neumann import neumann
from bilevax.ihvp.nystrom import nystrom
from bilevax.ihvp.sgd import sgd

__all__ = ["cg", "exact", "identity", "linear", "neumann", "nystrom", "sgd"]

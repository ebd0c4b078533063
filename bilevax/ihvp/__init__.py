"""Inverse-Hessian-vector products."""

from bilevax.ihvp.cg import cg
from bilevax.ihvp.exact import exact
from bilevax.ihvp.identity import identity
from bilevax.ihvp.neumann import neumann

__all__ = ["cg", "exact", "identity", "neumann"]

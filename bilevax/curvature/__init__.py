"""Products with second derivatives."""

from bilevax.curvature.products import cross, damped, hessian

__all__ = ["cross", "damped", "hessian"]

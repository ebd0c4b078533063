"""bilevax: hypergradients and bilevel optimization as small pure functions for JAX."""

from bilevax import curvature, ihvp, inner
from bilevax.hypergradient import HypergradientInfo, HypergradientState, differentiable, hypergradient
from bilevax.problem import (
    IHVP,
    Batch,
    BilevelProblem,
    Calls,
    Directions,
    Hypergradient,
    IHVPInfo,
    InnerGradient,
    InnerSolver,
    Iterate,
    SolverInfo,
    directions,
    inner_gradient,
)

__version__ = "0.1.0"

__all__ = [
    "IHVP",
    "Batch",
    "BilevelProblem",
    "Calls",
    "Directions",
    "Hypergradient",
    "HypergradientInfo",
    "HypergradientState",
    "IHVPInfo",
    "InnerGradient",
    "InnerSolver",
    "Iterate",
    "SolverInfo",
    "curvature",
    "differentiable",
    "directions",
    "hypergradient",
    "ihvp",
    "inner",
    "inner_gradient",
]

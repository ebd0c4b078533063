"""bilevax: hypergradients and bilevel optimization as small pure functions for JAX."""

from bilevax import curvature, ihvp, inner
from bilevax.doctor import HypergradientReport, check_hypergradient
from bilevax.hypergradient import HypergradientInfo, HypergradientState, differentiable, hypergradient
from bilevax.penalty import PenaltyDetail, PenaltyState, penalty
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
from bilevax.two_phase import TwoPhaseInfo, TwoPhaseState, two_phase

__version__ = "0.1.0"

__all__ = [
    "IHVP",
    "Batch",
    "BilevelProblem",
    "Calls",
    "Directions",
    "Hypergradient",
    "HypergradientInfo",
    "HypergradientReport",
    "HypergradientState",
    "IHVPInfo",
    "InnerGradient",
    "InnerSolver",
    "Iterate",
    "PenaltyDetail",
    "PenaltyState",
    "SolverInfo",
    "TwoPhaseInfo",
    "TwoPhaseState",
    "check_hypergradient",
    "curvature",
    "differentiable",
    "directions",
    "hypergradient",
    "ihvp",
    "inner",
    "inner_gradient",
    "penalty",
    "two_phase",
]

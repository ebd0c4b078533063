"""bilevax: hypergradients and bilevel optimization as small pure functions for JAX."""

from bilevax import algorithms, curvature, decentralized, ihvp, inner, parallel, random_directions
from bilevax.black_box import black_box
from bilevax.decentralized import coins, compression, correction, estimator, local_directions, partition, topology
from bilevax.decentralized.engine import Algorithm
from bilevax.decentralized.gossip import Gossip, gossip, push_sum, replicate
from bilevax.decentralized.levels import Levels
from bilevax.doctor import HypergradientReport, check_hypergradient
from bilevax.full_zeroth_order import full_zeroth_order
from bilevax.hypergradient import HypergradientInfo, HypergradientState, differentiable, hypergradient
from bilevax.inner import guides
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
    "Algorithm",
    "Batch",
    "BilevelProblem",
    "Calls",
    "Directions",
    "Gossip",
    "Hypergradient",
    "HypergradientInfo",
    "HypergradientReport",
    "HypergradientState",
    "IHVPInfo",
    "InnerGradient",
    "InnerSolver",
    "Iterate",
    "Levels",
    "PenaltyDetail",
    "PenaltyState",
    "SolverInfo",
    "TwoPhaseInfo",
    "TwoPhaseState",
    "algorithms",
    "black_box",
    "check_hypergradient",
    "coins",
    "compression",
    "correction",
    "curvature",
    "decentralized",
    "differentiable",
    "directions",
    "estimator",
    "full_zeroth_order",
    "gossip",
    "guides",
    "hypergradient",
    "ihvp",
    "inner",
    "inner_gradient",
    "local_directions",
    "parallel",
    "partition",
    "penalty",
    "push_sum",
    "random_directions",
    "replicate",
    "topology",
    "two_phase",
]

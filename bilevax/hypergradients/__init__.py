"""Hypergradients: estimators of ∇F(x) with a memory, the differentiable solve, and the check of an estimate."""

from bilevax.hypergradients._differentiable import differentiable
from bilevax.hypergradients._full_zeroth_order import full_zeroth_order
from bilevax.hypergradients._hypergradient import HypergradientInfo, HypergradientState, hypergradient
from bilevax.hypergradients._penalty import PenaltyDetail, PenaltyState, penalty
from bilevax.hypergradients._report import HypergradientReport
from bilevax.hypergradients._two_phase import TwoPhaseInfo, TwoPhaseState, two_phase
from bilevax.hypergradients.check import check_hypergradient

__all__ = [
    "HypergradientInfo",
    "HypergradientReport",
    "HypergradientState",
    "PenaltyDetail",
    "PenaltyState",
    "TwoPhaseInfo",
    "TwoPhaseState",
    "check_hypergradient",
    "differentiable",
    "full_zeroth_order",
    "hypergradient",
    "penalty",
    "two_phase",
]


def __dir__() -> list[str]:
    return __all__

"""Contracts that methods keep, for the tests of methods written elsewhere; problems whose solutions are known."""

from bilevax.testing import (
    algorithm,
    correction,
    estimator,
    gossip,
    hypergradient,
    ihvp,
    limits,
    points,
    problems,
    solver,
)
from bilevax.testing._contract import Contract, ContractError, contract
from bilevax.testing.algorithm import AlgorithmSubject, check_algorithm
from bilevax.testing.compiled import Dot, executed_dots, products
from bilevax.testing.correction import CorrectionSubject, check_correction
from bilevax.testing.estimator import EstimatorSubject, check_estimator
from bilevax.testing.gossip import GossipSubject, check_gossip
from bilevax.testing.hypergradient import check_hypergradient
from bilevax.testing.hypergradient_subject import HypergradientSubject
from bilevax.testing.ihvp import IHVPSubject, check_ihvp
from bilevax.testing.limits import check_limit
from bilevax.testing.solver import check_solver, solver_subject

__all__ = [
    "AlgorithmSubject",
    "Contract",
    "ContractError",
    "CorrectionSubject",
    "Dot",
    "EstimatorSubject",
    "GossipSubject",
    "HypergradientSubject",
    "IHVPSubject",
    "algorithm",
    "check_algorithm",
    "check_correction",
    "check_estimator",
    "check_gossip",
    "check_hypergradient",
    "check_ihvp",
    "check_limit",
    "check_solver",
    "contract",
    "correction",
    "estimator",
    "executed_dots",
    "gossip",
    "hypergradient",
    "ihvp",
    "limits",
    "points",
    "problems",
    "products",
    "solver",
    "solver_subject",
]


def __dir__() -> list[str]:
    return __all__

"""Contracts that methods keep, for the tests of methods written elsewhere; problems whose solutions are known."""

from bilevax.testing import algorithm, limits, problems
from bilevax.testing.algorithm import AlgorithmSubject, check_algorithm
from bilevax.testing.compiled import Dot, executed_dots, products
from bilevax.testing.contract import Contract, ContractError, contract
from bilevax.testing.limits import check_limit

__all__ = [
    "AlgorithmSubject",
    "Contract",
    "ContractError",
    "Dot",
    "algorithm",
    "check_algorithm",
    "check_limit",
    "contract",
    "executed_dots",
    "limits",
    "problems",
    "products",
]

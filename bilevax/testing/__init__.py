"""Contracts that methods keep, for the tests of methods written elsewhere; problems whose solutions are known."""

from bilevax.testing import problems
from bilevax.testing.compiled import Dot, executed_dots, products
from bilevax.testing.contract import Contract, ContractError, contract

__all__ = ["Contract", "ContractError", "Dot", "contract", "executed_dots", "problems", "products"]

"""Bilevel problems whose solutions are known in closed form, and small ones that a method meets in its contracts."""

from bilevax.testing.problems._countable import countable
from bilevax.testing.problems._quadratic import Quadratic, four_agents, neumann, quadratic
from bilevax.testing.problems.known import Known, logistic, network, ridge, twice_identity

__all__ = [
    "Known",
    "Quadratic",
    "countable",
    "four_agents",
    "logistic",
    "network",
    "neumann",
    "quadratic",
    "ridge",
    "twice_identity",
]


def __dir__() -> list[str]:
    return __all__

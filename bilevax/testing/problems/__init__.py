"""Bilevel problems whose solutions are known in closed form, and small ones that a method meets in its contracts."""

from bilevax.testing.problems.countable import countable
from bilevax.testing.problems.quadratic import Quadratic, four_agents, neumann, quadratic

__all__ = ["Quadratic", "countable", "four_agents", "neumann", "quadratic"]

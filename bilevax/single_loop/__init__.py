"""The engine of single-loop methods, and the parts that it is given: who estimates what, and how a level moves.

single_loop         local directions, an estimator, a correction for each level and an order make a method
local_directions    what each agent can evaluate
estimator           what each agent believes its directions to be
correction          how a level moves although the directions differ from agent to agent
prediction          how the directions of an agent change between two evaluations, in a snapshot method
coins               who refreshes its derivatives, in a snapshot method
"""

from bilevax.single_loop import coins, correction, estimator, local_directions, prediction
from bilevax.single_loop._levels import Levels
from bilevax.single_loop._preconditioned import Place, preconditioned
from bilevax.single_loop._suggest_step_sizes import StepSizesInfo, suggest_step_sizes
from bilevax.single_loop.engine import GAUSS_SEIDEL, JACOBI, Level, single_loop
from bilevax.single_loop.method import Info, State, moved
from bilevax.single_loop.step_sizes import decay

__all__ = [
    "GAUSS_SEIDEL",
    "JACOBI",
    "Info",
    "Level",
    "Levels",
    "Place",
    "State",
    "StepSizesInfo",
    "coins",
    "correction",
    "decay",
    "estimator",
    "local_directions",
    "moved",
    "preconditioned",
    "prediction",
    "single_loop",
    "suggest_step_sizes",
]


def __dir__() -> list[str]:
    return __all__

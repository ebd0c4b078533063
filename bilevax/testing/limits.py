"""Where a method goes on a problem whose solutions are known: the point says which problem it solves."""

from functools import partial
from typing import Any

import jax
import numpy as np

from bilevax import checks
from bilevax.problem import Algorithm, Batch
from bilevax.testing._contract import contract, name_of
from bilevax.testing.problems._quadratic import Quadratic
from bilevax.testing.trees import truth
from bilevax.typing import Array, PyTree

__all__ = ["check_limit", "last", "limit_is_the_declared_one", "x_is_finite"]


def __dir__() -> list[str]:
    return __all__


KEY = jax.random.key(0)


@contract("Take smaller steps, and look for a sign.")
def x_is_finite(end: Any) -> None:
    """At the end."""
    truth(np.isfinite(end.x).all(), "x is not finite")


@contract(
    "If it ends at another known point, it solves another problem: x_p has each agent's own lower level, x_l each "
    "agent's own inverse Hessian. If at none, look for a bias of the step size (no correction of a level), a truncated "
    "series, or take more iterations or smaller steps."
)
def limit_is_the_declared_one(end: Any, problem: Quadratic, x: np.ndarray, atol: float) -> None:
    """Every agent ends at x, to `atol`."""
    distance = _off(end.x, x)
    known = {"x*": problem.x_star, "x_l": problem.x_l, "x_p": problem.x_p}
    others = ", ".join(f"{_off(end.x, point):.2g} from {name}" for name, point in known.items())
    truth(distance <= atol, f"x ends {distance:.2g} from the declared point; {others}")


def _off(got: Array, expected: np.ndarray) -> float:
    """The largest error of any agent; infinite where it is no number."""
    return float(np.nan_to_num(np.abs(np.asarray(got) - expected), nan=np.inf).max())


def check_limit(
    algorithm: Algorithm, problem: Quadratic, x: np.ndarray, iterations: int = 2500, atol: float = 1e-10
) -> Any:
    """Runs a method with all data on a quadratic, and compares where x ends with a point, such as `problem.x_star`.

    Args:
      algorithm: a method over as many agents as `problem` has, made with `problem.problem` and without sampling.
      problem: such as `problems.quadratic(0)`.
      x: the point where all agents are to end: `problem.x_star`, `x_l`, `x_p` or `penalized(10.0)`.
      iterations: so many, from the origin.
      atol: largest error of any entry.

    Returns:
      The last state.

    Raises:
      ContractError: if x is not finite in the end; with the distances from all known points, if it ends elsewhere.
      ValueError: if algorithm is none, or has another number of agents than problem.

    Cost: one program.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> q, gossip = testing.problems.quadratic(0), bx.gossip(bx.topology.complete(8))
        >>> method = bx.decentralized.sldbo(q.problem, gossip, (0.1, 0.2, 0.2))
        >>> end = testing.check_limit(method, q, q.x_star, iterations=200, atol=1e-4)
    """
    end = last(algorithm, problem, iterations)
    x_is_finite.hold(name_of(algorithm), end)
    limit_is_the_declared_one.hold(name_of(algorithm), end, problem, x, atol)
    return end


def last(algorithm: Algorithm, problem: Quadratic, iterations: int) -> Any:
    """The state after so many iterations with all data, in numpy.

    Args:
      algorithm: a method over as many agents as `problem` has.
      problem: a quadratic.
      iterations: so many, from the origin.

    Returns:
      The state of the method.

    Raises:
      ValueError: if algorithm is none, or has another number of agents than problem.

    Cost: one program.

    Example:
        >>> import bilevax as bx
        >>> from bilevax.testing import limits, problems
        >>> q = problems.four_agents()
        >>> method = bx.decentralized.sldbo(q.problem, bx.gossip(bx.topology.ring(4)), 0.1)
        >>> limits.last(method, q, iterations=1).x.shape
        (4, 1)
    """
    checks.instance("algorithm", algorithm, Algorithm, "Make it with problem.problem over the agents of problem.")
    checks.instance("problem", problem, Quadratic, "Pass, say, bilevax.testing.problems.quadratic(0).")
    _takes_the_agents(algorithm, problem)
    run = jax.jit(partial(_run, algorithm, iterations))
    return jax.tree.map(np.asarray, run(*problem.start, problem.batch))


def _takes_the_agents(algorithm: Algorithm, problem: Quadratic) -> None:
    n = len(problem.A)
    try:
        jax.eval_shape(algorithm.init, *problem.start, problem.batch)
    except ValueError as error:
        if "agents" not in str(error):
            raise
        raise ValueError(
            f"algorithm must be made over the {n} agents of problem; got one whose init refuses them. "
            f"Make the method over {n} agents, such as those of bx.gossip(bx.topology.ring({n}))."
        ) from error


def _run(algorithm: Algorithm, iterations: int, x: PyTree, y: PyTree, batch: Batch) -> Any:
    def step(k: Array, state: Any) -> Any:
        return algorithm.step(jax.random.fold_in(KEY, k), state, batch)[0]

    return jax.lax.fori_loop(0, iterations, step, algorithm.init(x, y, batch))

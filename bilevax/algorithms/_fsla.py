"""FSLA: plain steps on y and v in turn, recursive momentum on x."""

from bilevax.algorithms._one_agent import one_agent
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample
from bilevax.single_loop._levels import Levels, Rate
from bilevax.single_loop.correction._none import none
from bilevax.single_loop.engine import GAUSS_SEIDEL, single_loop
from bilevax.single_loop.estimator import storm
from bilevax.single_loop.step_sizes import StepSizes


@as_called
def fsla(problem: BilevelProblem, step_sizes: StepSizes, *, sample: Sample, momentum: Rate = 0.1) -> Algorithm:
    """The fully single-loop algorithm: y, then v, then x, which alone has a momentum.

        y ← y − a_y ∇_y g(x, y; ξ)
        v ← v − a_v (∇²_yy g(x, y; ξ) v − ∇_y f(x, y; ξ))
        u ← (1 − a) (u − d_x(previous point; ξ)) + d_x(x, y, v; ξ),      x ← x − a_x u

    The noise of y and v enters d_x unreduced: `sustain`, with momentum on all three, costs the same here.

    Args:
      problem: f and g.
      step_sizes: `Levels(x, y, v)` of numbers, schedules k -> number, or optax transformations.
      sample: `sample(key, t, data) -> batch`, such as `bx.sampling.minibatch(64)`.
      momentum: a in [0, 1], of x alone: a number or a schedule; 1 for none.

    Returns:
      `Algorithm(init, step)` on x and y without an agents' axis.

    Raises:
      ValueError: if a concrete `momentum` is not in [0, 1]; as `bx.single_loop.single_loop`; if there is no key.

    Cost: two ∇f, four ∇_y g, two Hessian and two cross products on one sample: the estimator evaluates y and v at the
    previous point too, and drops it.

    Reference: Li, Gu and Huang, "A fully single loop algorithm for bilevel optimization without Hessian inverse", AAAI
    2022, arXiv 2112.04660. Deviation: one sample serves y, v and x of an iteration; v is not projected on a ball.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> loss = lambda x, y, c: ((y - x * c) ** 2).mean()
        >>> problem = bx.BilevelProblem(loss, loss)
        >>> method = bx.algorithms.fsla(problem, (0.1, 0.5, 0.5), sample=bx.sampling.minibatch(2))
        >>> data = jnp.arange(8.0)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), method.init(1.0, 2.0), bx.Batch(data, data))
    """
    estimator = storm(Levels(x=momentum, y=1.0, v=1.0), sample=sample)
    return one_agent(lambda gossip: single_loop(problem, gossip, step_sizes, estimator, none(), order=GAUSS_SEIDEL))

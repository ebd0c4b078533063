"""TTSA: one step on y and one on x, on two time scales."""

from bilevax.algorithms._bsa import bsa, falling
from bilevax.algorithms._descent import check_levels
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample
from bilevax.single_loop.step_sizes import StepSizes


@as_called
def ttsa(problem: BilevelProblem, step_sizes: StepSizes, *, sample: Sample, terms: int = 10) -> Algorithm:
    """Two-timescale stochastic approximation: `bsa` with one step on y, whose step sizes fall slower than those of x.

        y ← y − a_y ∇_y g(x, y; ξ)
        v = terms · a_v Π_{i=1}^{p} (I − a_v ∇²_yy g(x, y; ξ_i)) ∇_y f(x, y; ζ)       p uniform on 0..terms − 1
        x ← x − a_x (∇_x f(x, y; ζ) − ∇²_xy g(x, y; ξ') v)

    As noisy as `bsa`; take `soba`, which costs less in each iteration, or `sustain` for work.

    Args:
      problem: f and g.
      step_sizes: `Levels(x, y, v)`. A number a stands for a (k + 1)^(−3/5) for x and for a (k + 1)^(−2/5) for y;
        schedules k -> number and optax transformations are taken as they are. That of v is c in (0, 1 / L].
      sample: `sample(key, t, data) -> batch`, such as `bx.sampling.minibatch(64)`; each use has its own draw.
      terms: of the series, >= 1.

    Returns:
      `Algorithm(init, step)` with `DescentState` and `DescentInfo`, on x and y without an agents' axis.

    Raises:
      ValueError: if `terms` < 1, a step size is negative or of another kind, or that of v is 0; when it draws, if there
        is no key.

    Cost: one ∇f, two ∇_y g, (terms − 1) / 2 Hessian products in the mean and one cross product, on a sample each; each
    product on a sample of its own takes one more ∇_y g there.

    Reference: Hong, Wai, Wang and Yang, "A two-timescale framework for bilevel optimization", arXiv 2007.05170,
    algorithm 1. Deviation: no projection of x on a set.

    Example:
        >>> import bilevax as bx, jax
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> method = bx.algorithms.ttsa(problem, (0.25, 0.5, 0.5), sample=bx.sampling.full, terms=1)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), method.init(1.0, 2.0), bx.Batch(None, None))
        >>> float(state.x), float(state.y)
        (0.5, 1.0)
    """
    sizes = check_levels(problem, step_sizes, sample)
    sizes = sizes._replace(x=falling(sizes.x, 3 / 5), y=falling(sizes.y, 2 / 5))
    return bsa(problem, sizes, sample=sample, steps=1, terms=terms)

"""BSA: more and more steps on y, then one random term of the Neumann series."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import checks, ihvp
from bilevax.algorithms._descent import check_levels, counting, descent
from bilevax.hypergradients._hypergradient import hypergradient
from bilevax.inner._implicit import implicit
from bilevax.inner._optimizer_steps import optimizer_steps
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem, Hypergradient, InnerSolver, Iterate
from bilevax.sampling import Sample, split
from bilevax.single_loop._levels import at
from bilevax.single_loop.step_sizes import StepSizes, check_series, decay, inner_optimizer
from bilevax.typing import Array, Key, PyTree


def growing_steps(k: Array) -> Array:
    """The number of inner steps that the theory of BSA asks for, up to a factor.

        t_k = ⌈√(k + 1)⌉

    Args:
      k: the iteration.

    Returns:
      t_k, an integer.

    Cost: none.

    Reference: Ghadimi and Wang, arXiv 1802.02246, section 2.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.algorithms.growing_steps(jnp.arange(6)).tolist()
        [1, 2, 2, 2, 3, 3]
    """
    return jnp.ceil(jnp.sqrt(jnp.asarray(k, float) + 1.0)).astype(jnp.int32)


@as_called
def bsa(
    problem: BilevelProblem,
    step_sizes: StepSizes,
    *,
    sample: Sample,
    steps: int | Callable[[Array], Array] = growing_steps,
    terms: int = 10,
) -> Algorithm:
    """Bilevel stochastic approximation: stochastic steps on y, one unbiased draw of the Neumann series, one step on x.

        y ← y − a_y ∇_y g(x, y; ξ_t)                                                  `steps` times
        v = terms · a_v Π_{i=1}^{p} (I − a_v ∇²_yy g(x, y; ξ_i)) ∇_y f(x, y; ζ)       p uniform on 0..terms − 1
        x ← x − a_x (∇_x f(x, y; ζ) − ∇²_xy g(x, y; ξ) v)

    The first method with a rate, and a noisy one, see `ihvp.random_neumann`. Take `stocbio` or `amigo` for work.

    Args:
      problem: f and g.
      step_sizes: `Levels(x, y, v)`. A number a for x or y stands for `decay(a, 1/2)`, that is a / √(k + 1); schedules
        k -> number and (for x and y) optax transformations are taken as they are. That of v is c in (0, 1 / L].
      sample: `sample(key, t, data) -> batch`, such as `bx.sampling.minibatch(64)`; each use has its own draw.
      steps: steps on y in iteration k: a number >= 0, or a function k -> number, ⌈√(k + 1)⌉ by default.
      terms: of the series, >= 1.

    Returns:
      `Algorithm(init, step)` with `DescentState` and `DescentInfo`, on x and y without an agents' axis.

    Raises:
      ValueError: if a number of `steps` is negative, `terms` < 1, a step size is negative or of another kind, or that
        of v is 0; when it draws, if there is no key.

    Cost: one ∇f, `steps` + 1 ∇_y g, (terms − 1) / 2 Hessian products in the mean and one cross product, on a sample
    each; each product on a sample of its own takes one more ∇_y g there.

    Reference: Ghadimi and Wang, "Approximation methods for bilevel programming", arXiv 1802.02246, algorithms 2 and 3.

    Example:
        >>> import bilevax as bx, jax
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> method = bx.algorithms.bsa(problem, (0.25, 0.5, 0.5), sample=bx.sampling.full, terms=1)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), method.init(1.0, 2.0), bx.Batch(None, None))
        >>> float(state.x), float(state.y)
        (0.5, 1.0)
    """
    sizes = check_levels(problem, step_sizes, sample)
    check_series(sizes.v)
    terms = checks.count("terms", terms, minimum=1)
    sizes = sizes._replace(x=falling(sizes.x, 1 / 2), y=falling(sizes.y, 1 / 2))
    if callable(steps):
        checks.function("steps", steps, "k")
    else:
        steps = checks.count("steps", steps)

    def at_iteration(k: Array) -> Hypergradient:
        optimizer, number = inner_optimizer(sizes.y, k), steps(k) if callable(steps) else steps
        series = ihvp.random_neumann(terms=terms, step_size=at(k, sizes.v), sample=sample)
        last = implicit(problem.inner_loss, optimizer, 0, ihvp=series, cross_sample=sample, warm_start=False)
        run = optimizer_steps(problem.inner_loss, optimizer, None, sample)

        def forward(key: Key | None, state: Any, x: PyTree, z: Iterate, batch: Any) -> tuple[Iterate, Any, Any]:
            step_key, last_key = split(key, 2)
            z = jax.lax.fori_loop(0, number, lambda t, z: run.step(step_key, batch, x, z), z)
            return last.forward(last_key, state, x, z, batch)

        solver = InnerSolver(last.init, last.start, forward, last.backward)
        return hypergradient(problem.outer_loss, counting(solver, number))

    return descent(at_iteration, sizes.x, outer_sample=sample)


def falling(step: Any, power: float) -> Any:
    """A number falls as a power of the iteration; everything else stays as it is."""
    return step if callable(step) or hasattr(step, "update") else decay(step, power)

"""PZOBO: finite differences of whole inner solves, along Gaussian directions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.algorithms._descent import check_levels, counting, descent
from bilevax.hypergradients._hypergradient import hypergradient
from bilevax.inner import random_directions
from bilevax.inner._optimizer_steps import optimizer_steps
from bilevax.inner._zeroth_order import one_sided, zeroth_order
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem, Hypergradient, Iterate
from bilevax.sampling import Sample, fold
from bilevax.single_loop.step_sizes import StepSizes, inner_optimizer
from bilevax.typing import Array, Key, PyTree, Scalar

_SOLVE = 0  # folded into the key of the data of g, for the batches of all inner solves


class _Draw(NamedTuple):
    key: Key | None
    data: Any


@as_called
def pzobo(
    problem: BilevelProblem,
    step_sizes: StepSizes,
    *,
    sample: Sample,
    steps: int = 10,
    directions: int = 1,
    mu: Scalar = 1e-2,
) -> Algorithm:
    """The partial zeroth-order method: the derivative of `steps` inner steps is differenced, that of f is exact.

        S(x) = y after `steps` times  y ← y − a_y ∇_y g(x, y; ξ_t)          all S from the same y and on the same ξ_t
        ŷ_i = (S(x + μ u_i) − S(x)) / μ,          u_i Gaussian, i = 1..b
        x ← x − a_x (∇_x f(x, S(x); ζ) + (1/b) Σ_i ⟨∇_y f(x, S(x); ζ), ŷ_i⟩ u_i),          y ← S(x)

    It needs first derivatives alone, but its noise grows with the number of entries of x: E‖·‖² is (N + 1) / b times
    that of the indirect gradient. The gradient is that of `steps` inner steps from a given y, so that with few steps
    the limit is biased. Where JAX can differentiate g twice, `inner.forward_gradient` is exact along the directions at
    the same price.

    Args:
      problem: f and g.
      step_sizes: `Levels(x, y)` of numbers, schedules k -> number, or optax transformations (that of y starts fresh in
        each iteration).
      sample: `sample(key, t, data) -> batch`, such as `bx.sampling.minibatch(64)`.
      steps: N, steps of each solve, >= 1.
      directions: b >= 1.
      mu: μ > 0; about 1e-2 in float32 where x is of order 1.

    Returns:
      `Algorithm(init, step)` with `DescentState` and `DescentInfo` (whose `inner_loss` is None), on x and y without an
      agents' axis.

    Raises:
      ValueError: if `steps` < 1, `directions` < 1 or `mu` is not positive, or a step size is negative or of another
        kind; when it draws, if there is no key.

    Cost: (b + 1) `steps` gradients of g and one of f, on a sample each.

    Reference: Sow, Ji and Liang, "On the convergence theory for Hessian-free bilevel algorithms", arXiv 2110.07004,
    algorithms 1 (all data) and 2 (samples).

    Example:
        >>> import bilevax as bx, jax
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> method = bx.algorithms.pzobo(problem, (0.05, 0.5), sample=bx.sampling.full, steps=1, directions=100)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), method.init(1.0, 2.0), bx.Batch(None, None))
        >>> float(state.x) < 1, float(state.y), int(info.calls.inner_gradients)
        (True, 1.0, 101)
    """
    sizes = check_levels(problem, step_sizes, sample, ("x", "y"))
    steps = checks.count("steps", steps, minimum=1)
    directions = checks.count("directions", directions, minimum=1)

    def at_iteration(k: Array) -> Hypergradient:
        run = optimizer_steps(problem.inner_loss, inner_optimizer(sizes.y, k), None, sample)

        def solve(x: PyTree, y0: PyTree, draw: _Draw) -> PyTree:
            def step(z: Iterate, _: None) -> tuple[Iterate, None]:
                return run.step(draw.key, draw.data, x, z), None

            return jax.lax.scan(step, run.start(x, y0), length=steps)[0].y

        solver = zeroth_order(
            solve, directions=directions, mu=mu, difference=one_sided, sampler=random_directions.gaussian
        )
        return hypergradient(problem.outer_loss, counting(solver, (directions + 1) * steps))

    at_iteration(jnp.zeros((), jnp.int32))

    def inner_data(key: Key | None, t: Scalar, data: Any) -> _Draw:
        return _Draw(fold(key, _SOLVE), data)

    return descent(at_iteration, sizes.x, outer_sample=sample, inner_data=inner_data)

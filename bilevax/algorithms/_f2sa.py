"""F2SA: bilevel descent from first derivatives alone."""

from typing import Any

from bilevax import checks
from bilevax.algorithms._descent import check_levels, descent
from bilevax.hypergradients._penalty import penalty
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem, Hypergradient
from bilevax.sampling import Sample
from bilevax.single_loop._levels import at
from bilevax.single_loop.step_sizes import StepSizes, inner_optimizer
from bilevax.typing import Array


@as_called
def f2sa(
    problem: BilevelProblem, step_sizes: StepSizes, *, sample: Sample, multiplier: Any, steps: int = 10
) -> Algorithm:
    """The fully first-order method: two warm inner problems, with and without the outer loss, whose gap is the penalty.

        y ← y − a_y ∇_y g(x, y; ξ_t)       y_λ ← y_λ − a_y (∇_y g(x, y_λ; ξ_t) + ∇_y f(x, y_λ; ζ) / λ)   `steps` times
        x ← x − a_x (∇_x f(x, y_λ; ζ) + λ (∇_x g(x, y_λ; ξ) − ∇_x g(x, y; ξ)))

    It needs no product with a second derivative. For a constant λ the limit is off by O(1/λ); with λ growing it
    converges, but the noise and the errors of y and y_λ are multiplied by λ: let the step sizes fall meanwhile. Where
    second derivatives fit, `amigo` needs fewer steps.

    Args:
      problem: f and g.
      step_sizes: `Levels(x, y)` of numbers, schedules k -> number, or optax transformations (that of y keeps a
        state for each of the two problems).
      sample: `sample(key, t, data) -> batch`, such as `bx.sampling.minibatch(64)`; f and g are drawn apart.
      multiplier: λ > 0, or a schedule k -> λ_k.
      steps: steps on y and y_λ in each iteration, >= 0.

    Returns:
      `Algorithm(init, step)` with `DescentState` (whose estimator holds y_λ) and `DescentInfo`, on x and y without an
      agents' axis.

    Raises:
      ValueError: if `steps` < 0, a number `multiplier` is not positive, or a step size is negative or of another kind;
        when it draws, if there is no key.

    Cost: 2 `steps` + 2 gradients of g and `steps` + 1 of f, on a sample each.

    Reference: Kwon et al., "A fully first-order method for stochastic bilevel optimization", arXiv 2301.10945,
    algorithm 1. Deviation: the problem of y_λ is divided by λ, so that one step size serves both; both read the same
    samples of g, and one sample of f serves all steps of an iteration.

    Example:
        >>> import bilevax as bx, jax
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> method = bx.algorithms.f2sa(problem, (0.25, 0.5), sample=bx.sampling.full, multiplier=99.0, steps=9)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), method.init(1.0, 2.0), bx.Batch(None, None))
        >>> round(float(state.x), 3), float(state.y)
        (0.505, 1.0)
    """
    sizes = check_levels(problem, step_sizes, sample, ("x", "y"))
    steps = checks.count("steps", steps)
    if callable(multiplier):
        checks.function("multiplier", multiplier, "k")
    else:
        checks.scalar("multiplier", multiplier)
        checks.positive("multiplier", multiplier)

    def at_iteration(k: Array) -> Hypergradient:
        return penalty(
            problem,
            inner_optimizer(sizes.y, k),
            steps,
            multiplier=at(k, multiplier),
            sample=sample,
            cross_sample=sample,
        )

    return descent(at_iteration, sizes.x, outer_sample=sample)

"""stocBiO: stochastic steps on y, then a Neumann series on fresh batches."""

from bilevax import checks, ihvp
from bilevax.algorithms._descent import check_levels, descent
from bilevax.hypergradients._hypergradient import hypergradient
from bilevax.inner._implicit import implicit
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem, Hypergradient
from bilevax.sampling import Sample
from bilevax.single_loop._levels import at
from bilevax.single_loop.step_sizes import StepSizes, check_series, inner_optimizer
from bilevax.typing import Array


@as_called
def stocbio(
    problem: BilevelProblem, step_sizes: StepSizes, *, sample: Sample, steps: int = 10, terms: int = 10
) -> Algorithm:
    """Bilevel descent with warm stochastic steps on y and a Neumann series from zero in each iteration.

        y ← y − a_y ∇_y g(x, y; ξ_t)                                                          `steps` times
        v = a_v Σ_{q=0}^{terms−1} Π_{j<q} (I − a_v ∇²_yy g(x, y; ξ_j)) ∇_y f(x, y; ζ)
        x ← x − a_x (∇_x f(x, y; ζ) − ∇²_xy g(x, y; ξ) v)

    The series stops at a bias of (1 − a_v μ)^terms: where g is badly conditioned take `amigo`, whose v stays warm.

    Args:
      problem: f and g.
      step_sizes: `Levels(x, y, v)` of numbers or schedules k -> number; those of x and y may be optax
        transformations.
      sample: `sample(key, t, data) -> batch`, such as `bx.sampling.minibatch(64)`; each use has its own draw.
      steps: steps on y in each iteration, >= 0.
      terms: of the series, >= 1.

    Returns:
      `Algorithm(init, step)` with `DescentState` and `DescentInfo`, on x and y without an agents' axis.

    Raises:
      ValueError: if `steps` < 0 or `terms` < 1, a step size is negative or of another kind, or that of v is 0;
        when it draws, if there is no key.

    Cost: one ∇f, `steps` + 1 ∇_y g, `terms` Hessian products and one cross product, on a sample each; each product on a
    sample of its own takes one more ∇_y g there.

    Reference: Ji, Yang and Liang, "Bilevel optimization: convergence analysis and enhanced design", arXiv 2010.07962,
    algorithms 2 and 3. Deviation: batches of one size, where the paper shrinks those of the later factors.

    Example:
        >>> import bilevax as bx, jax
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> method = bx.algorithms.stocbio(problem, (0.25, 0.5, 0.5), sample=bx.sampling.full, steps=1, terms=1)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), method.init(1.0, 2.0), bx.Batch(None, None))
        >>> float(state.x), float(state.y)
        (0.5, 1.0)
    """
    sizes = check_levels(problem, step_sizes, sample)
    check_series(sizes.v)
    steps, terms = checks.count("steps", steps), checks.count("terms", terms, minimum=1)

    def at_iteration(k: Array) -> Hypergradient:
        solver = implicit(
            problem.inner_loss,
            inner_optimizer(sizes.y, k),
            steps,
            ihvp=ihvp.sgd(steps=terms, step_size=at(k, sizes.v), sample=sample),
            sample=sample,
            cross_sample=sample,
            warm_start=False,
        )
        return hypergradient(problem.outer_loss, solver)

    return descent(at_iteration, sizes.x, outer_sample=sample)

"""The value-function penalty: a hypergradient of first derivatives alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.carried import Carried, carrying, parameters, with_parameters
from bilevax.hypergradients._hypergradient import HypergradientInfo, check_batch, check_call
from bilevax.hypergradients._resume import first_state, resumed
from bilevax.inner._optimizer_steps import Optimizer, Watched, check_point, diverged, optimizer_steps, watch
from bilevax.printing import as_called, brief, by_shape
from bilevax.problem import Batch, BilevelProblem, Calls, Hypergradient, Iterate, SolverInfo, arrays, norm, owned
from bilevax.sampling import Sample, counted_from, fold, full, split
from bilevax.typing import Array, Key, PyTree, Scalar

_OUTER = 1  # folded into the key of an inner step, for the batch of f beside that of g


class PenaltyState(NamedTuple):
    """What `penalty` keeps between outer steps.

    Attributes:
      y: the warm minimizer of g.
      penalized: the warm minimizer y_λ of g + f / λ.
      step: number of estimates so far.
      opt_state: the warm state of the optimizer of y.
      penalized_opt_state: that of y_λ.
      t: inner steps so far, of each of the two.

    Example:
        >>> import bilevax as bx
        >>> bx.hypergradients.PenaltyState(y=1.0, penalized=1.5, step=0).penalized
        1.5
    """

    y: PyTree
    penalized: PyTree
    step: Array
    opt_state: Any = ()
    penalized_opt_state: Any = ()
    t: Any = 0

    def __repr__(self) -> str:
        return by_shape(self)


class PenaltyDetail(NamedTuple):
    """What `penalty` reports beside y; scalars.

    Attributes:
      multiplier: λ of this step.
      gap: g(x, y_λ) − g(x, y), of order 1 / λ²; negative where g is not solved.
      gradient_norm: ‖∇_y g + ∇_y f / λ‖ at y_λ.

    Example:
        >>> import bilevax as bx
        >>> bx.hypergradients.PenaltyDetail(multiplier=10.0, gap=0.01, gradient_norm=1e-6).gap
        0.01
    """

    multiplier: Array
    gap: Array
    gradient_norm: Array

    def __repr__(self) -> str:
        return brief(self)


@as_called
def penalty(
    problem: BilevelProblem,
    optimizer: Optimizer,
    steps: int,
    *,
    multiplier: Scalar | Callable[[Array], Scalar],
    sample: Sample = full,
    outer_sample: Sample = full,
    cross_sample: Sample = full,
) -> Hypergradient:
    """An estimator of ∇F(x) from first derivatives alone, with an error of order 1 / λ.

        y ≈ argmin_y g(x, y)          y_λ ≈ argmin_y g(x, y) + f(x, y) / λ
        ∇F(x) ≈ ∇_x f(x, y_λ) + λ (∇_x g(x, y_λ) − ∇_x g(x, y))

    It needs no Hessian product: for losses that can be differentiated once only, or models whose second derivatives do
    not fit. The two inner problems run side by side on the same batches of g, both warm, each with a state of its own
    of the same optimizer, which runs on as in `hypergradient`. λ must exceed about 2 L_f / μ_g for the second one to be
    convex, and the difference of gradients loses digits as λ grows: errors in y and y_λ are multiplied by λ.

    Args:
      problem: f and g, functions (x, y, batch) -> scalar.
      optimizer: any optax transformation, or a function x ↦ transformation.
      steps: inner steps of each of the two problems for each estimate, >= 0.
      multiplier: λ > 0, or an optax schedule of the outer step (F2SA lets it grow).
      sample: how inner step t draws its batch of g.
      outer_sample: how inner step t draws its batch of f.
      cross_sample: how the batch of the two ∇_x g and of the report is drawn, with the t of the last step.

    Returns:
      A `Hypergradient` with a `PenaltyState`; an `opt_state` that its `init` is given is taken over by both optimizers.
      In its `HypergradientInfo`, outer_loss is f(x, y_λ); `inner.inner_loss` and `inner.gradient_norm` are of g at y;
      `inner.detail` is a `PenaltyDetail`.

    Raises:
      ValueError: if problem is no `BilevelProblem`, steps is negative, the multiplier is not positive, a loss is not
        scalar, or the arguments of `estimate` do not fit.

    Cost: 2 · steps + 2 gradients of g and steps + 1 of f; memory of one step, two copies of y.

    Reference: Kwon et al., "A fully first-order method for stochastic bilevel optimization" (F2SA), arXiv 2301.10945,
    and Kwon et al., arXiv 2309.01753; Liu et al., "BOME! Bilevel optimization made easy", arXiv 2209.08709. Deviation:
    the second problem is divided by λ, so that one step size serves both.

    Example:
        >>> import bilevax as bx, jax, optax
        >>> inner_loss, outer_loss = lambda x, y, batch: 0.5 * (y - x) ** 2, lambda x, y, batch: 0.5 * y**2
        >>> problem = bx.BilevelProblem(outer_loss, inner_loss)
        >>> hypergrad = bx.penalty(problem, optax.sgd(0.5), steps=100, multiplier=99.0)
        >>> grad, _, _ = jax.jit(hypergrad.estimate)(None, hypergrad.init(1.0, 0.0), 1.0, bx.Batch(None, None))
        >>> round(float(grad), 4)  # λ / (λ + 1)
        0.99
    """
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    outer = checks.scalar_loss("outer_loss", problem.outer_loss)
    inner = carrying("inner_loss", problem.inner_loss)
    steps = checks.count("steps", steps)
    if callable(multiplier):
        checks.function("multiplier", multiplier, "step")
    else:
        checks.positive("multiplier", multiplier)
    for name, sampler in (("outer_sample", outer_sample), ("cross_sample", cross_sample)):
        checks.function(name, sampler, "key", "t", "data")
    plain = optimizer_steps(problem.inner_loss, optimizer, None, sample)

    def both(key: Key | None, t: Scalar, data: Batch) -> Batch:
        outer_key = fold(key, _OUTER)
        return Batch(outer_sample(outer_key, t, data.outer), sample(key, t, data.inner))

    def init(x: PyTree, y: PyTree, batch: Batch | None = None, *, opt_state: Any = None) -> PenaltyState:
        """The first state, with y as the warm minimizer of both problems; no batch is read."""
        check_batch(batch)
        check_point(x, y)
        opt_state, t = first_state(plain.start, x, y, opt_state)
        return owned(PenaltyState(arrays(y), arrays(y), jnp.zeros((), jnp.int32), opt_state, opt_state, t))

    def estimate(
        key: Key | None, state: PenaltyState, x: PyTree, batch: Batch
    ) -> tuple[PyTree, PenaltyState, HypergradientInfo]:
        """One estimate of ∇F(x): (grad, state, info), with grad a pytree like x; the key may be None without draws."""
        check_call(PenaltyState, state, x, batch)
        step_key, cross_key = split(key, 2)
        weight = multiplier(state.step) if callable(multiplier) else multiplier

        def penalized_loss(x: PyTree, y: PyTree, batch: Batch) -> Array | tuple[Array, PyTree]:
            value, after = inner(x, parameters(y), y, batch.inner)
            value = value + outer(x, y, batch.outer) / weight
            return (value, after.carried) if isinstance(y, Carried) else value

        def at_penalized(x: PyTree, params: PyTree) -> Array:
            return outer(x, with_parameters(y_penalized, params), batch.outer)

        penalized = optimizer_steps(penalized_loss, optimizer, None, both)

        def step(pair: tuple[Watched, Iterate], _: None) -> tuple[tuple[Watched, Iterate], None]:
            watched, z_penalized = pair
            watched = plain.watched_step(step_key, batch.inner, x, watched)
            return (watched, penalized.step(step_key, batch, x, z_penalized)), None

        start = (
            watch(resumed(plain.start, x, state.y, state.opt_state, state.t)),
            resumed(plain.start, x, state.penalized, state.penalized_opt_state, state.t),
        )
        with counted_from(state.t):
            ((z, begin), z_penalized), _ = jax.lax.scan(step, start, length=steps)
            data = cross_sample(cross_key, jnp.maximum(z.t - 1, 0), batch.inner)
        y, y_penalized = z.y, z_penalized.y
        outer_value, (direct, outer_y) = jax.value_and_grad(at_penalized, argnums=(0, 1))(x, parameters(y_penalized))
        slopes = jax.value_and_grad(inner, argnums=(0, 1), has_aux=True)
        (above, _), (above_x, above_y) = slopes(x, parameters(y_penalized), y_penalized, data)
        (value, _), (below_x, below_y) = slopes(x, parameters(y), y, data)
        grad = jax.tree.map(lambda d, a, b: (d + weight * (a - b)).astype(jnp.result_type(d)), direct, above_x, below_x)
        stationarity = norm(optax.tree.add_scale(above_y, 1 / weight, outer_y))
        detail = PenaltyDetail(jnp.asarray(weight, float), above - value, stationarity)
        size = norm(below_y)
        lost = ~jnp.isfinite(outer_value + above + value + size + norm(grad))
        breakdown = lost | diverged(begin, value, size)
        info = SolverInfo(value, size, breakdown, Calls(steps + 1, 2 * steps + 2), detail)
        state = PenaltyState(y, y_penalized, state.step + 1, z.opt_state, z_penalized.opt_state, z.t)
        return grad, state, HypergradientInfo(outer_value, info)

    return Hypergradient(init, estimate)

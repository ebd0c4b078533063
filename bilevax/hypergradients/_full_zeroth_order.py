"""Hypergradients where the outer loss is a black box as well."""

from typing import Any

import jax.numpy as jnp

from bilevax import checks
from bilevax.carried import parameters, with_parameters
from bilevax.hypergradients._hypergradient import (
    HypergradientInfo,
    HypergradientState,
    check_batch,
    check_call,
    hypergradient,
)
from bilevax.hypergradients._resume import refused
from bilevax.inner._optimizer_steps import Initial, Solve
from bilevax.inner._zeroth_order import Difference, central, zeroth_order
from bilevax.inner.random_directions import Sampler, rademacher
from bilevax.printing import as_called
from bilevax.problem import Batch, Hypergradient, Loss, arrays, owned
from bilevax.typing import Array, Key, PyTree, Scalar


@as_called
def full_zeroth_order(
    outer_loss: Loss,
    solve: Solve,
    *,
    directions: int = 8,
    mu: Scalar = 1e-3,
    difference: Difference = central,
    sampler: Sampler = rademacher,
    initial: Initial | None = None,
    chunk: int | None = None,
) -> Hypergradient:
    """Estimates ∇F by finite differences of F(x) = f(x, S(x)) along random directions: no derivative is taken.

        d_i = (F(x + μ v_i) − F(x − μ v_i)) / 2μ      or      (F(x + μ v_i) − F(x)) / μ
        ∇F(x) ≈ (1/b) Σ d_i v_i

    Where f can be differentiated, `hypergradient(outer_loss, inner.zeroth_order(...))` has less noise: it knows ∇_x f
    and ∇_y f. Here all of S(x) moves with x, also what y carries beside its parameters (`bx.inner.Carried`).

    Args:
      outer_loss: f, a function (x, y, batch) -> scalar; a JAX function, or a Python function in
        `bx.inner.black_box(f, returns=lambda x, y, batch: 0.0)`.
      solve: S, a function (x, y0, batch) -> y_T; a JAX function, or a Python function in `bx.inner.black_box`.
      directions: b >= 1.
      mu: μ > 0, the length of the difference; see `inner.zeroth_order`.
      difference: `inner.central` or `inner.one_sided`.
      sampler: of the directions; see `random_directions`.
      initial: y_0 as a function of x; by default y_0 is the warm y, the same for all evaluations.
      chunk: how many evaluations run at once, under `jax.vmap`; by default all, with 1 one after the other.

    Returns:
      A `Hypergradient` whose state and info are those of `hypergradient(outer_loss, inner.zeroth_order(...))`.

    Raises:
      ValueError: as `inner.zeroth_order`; if the outer loss does not return a floating-point scalar.

    Cost: 2 b + 1 solves and outer losses central, b + 1 one-sided; no gradient.

    Reference: Shen et al., arXiv 2406.14095, section 3.2; Nesterov, Spokoiny, "Random gradient-free minimization of
    convex functions", 2017, for the estimate.

    Example:
        >>> import bilevax as bx, jax, math
        >>> cost = bx.inner.black_box(lambda x, y, batch: math.sqrt(y), returns=lambda x, y, batch: 0.0)
        >>> hypergrad = bx.hypergradients.full_zeroth_order(cost, lambda x, y0, batch: x**2, directions=1)
        >>> x, batch = jax.numpy.array(3.0), bx.Batch(None, None)
        >>> grad, state, info = jax.jit(hypergrad.estimate)(jax.random.key(0), hypergrad.init(x, x), x, batch)
        >>> round(float(grad), 2), float(state.y), float(info.outer_loss)
        (1.0, 9.0, 3.0)
    """
    outer = checks.scalar_loss("outer_loss", outer_loss)
    checks.function("solve", solve, "x", "y0", "batch")

    def solve_and_evaluate(x: PyTree, start: PyTree, batch: Batch) -> PyTree:
        y = solve(x, _alone(start), batch.inner)
        return _paired(y, outer(x, with_parameters(y, parameters(y)), batch.outer))

    value = jnp.zeros(())
    solver = zeroth_order(
        solve_and_evaluate,
        directions=directions,
        mu=mu,
        difference=difference,
        sampler=sampler,
        initial=(lambda x: _paired(initial(x), value)) if initial else None,
        chunk=chunk,
    )
    pair = hypergradient(lambda x, y_and_value, batch: parameters(y_and_value)[1], solver)

    def init(x: PyTree, y: PyTree, batch: Batch | None = None, *, opt_state: Any = None) -> HypergradientState:
        """The first state, with y as the warm start of the black box; no batch is read."""
        check_batch(batch)
        refused(opt_state, "a black box solves the inner problem")
        return pair.init(x, _paired(y, value))._replace(y=owned(arrays(y)))

    def estimate(
        key: Key | None, state: HypergradientState, x: PyTree, batch: Batch
    ) -> tuple[PyTree, HypergradientState, HypergradientInfo]:
        """One estimate of ∇F(x): (grad, state, info), with grad a pytree like x; the key draws the directions."""
        check_call(HypergradientState, state, x, batch)
        grad, state, info = pair.estimate(key, state._replace(y=_paired(state.y, value)), x, Batch(None, batch))
        inner = info.inner._replace(calls=info.inner.calls._replace(outer_gradients=0))
        return grad, state._replace(y=_alone(state.y)), info._replace(inner=inner)

    return Hypergradient(init, estimate)


def _paired(y: PyTree, value: Array) -> PyTree:
    """The y of the black box and f there, as one inner variable."""
    return with_parameters(y, (parameters(y), value))


def _alone(y_and_value: PyTree) -> PyTree:
    return with_parameters(y_and_value, parameters(y_and_value)[0])

"""Hypergradients: an outer loss and an inner solver put together, with a memory or as one pure function."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.carried import parameters, with_parameters
from bilevax.hypergradients._resume import first_state, refused, resumed
from bilevax.inner._checked import check_solver, pulled_back, solved, started
from bilevax.inner._optimizer_steps import full_cotangent
from bilevax.printing import as_called, by_shape
from bilevax.problem import Batch, Hypergradient, InnerSolver, Iterate, Loss, SolverInfo, arrays, norm, owned
from bilevax.sampling import counted_from
from bilevax.typing import Array, Key, PyTree

BATCH_FIX = "Pass bx.Batch(outer=..., inner=...)."


class HypergradientState(NamedTuple):
    """What an estimator keeps between outer steps.

    Attributes:
      y: the warm inner variable.
      solver: the state of the inner solver (the warm v, Kronecker factors, ...).
      opt_state: the warm state of the inner optimizer; () where it starts afresh at each outer step.
      t: inner steps so far.

    Example:
        >>> import bilevax as bx, optax
        >>> solver = bx.inner.reverse(lambda x, y, batch: (y - x) ** 2, optax.sgd(0.1), steps=1)
        >>> float(bx.hypergradient(lambda x, y, batch: y**2, solver).init(1.0, 2.0).y)
        2.0
    """

    y: PyTree
    solver: Any
    opt_state: Any = ()
    t: Any = 0

    def __repr__(self) -> str:
        return by_shape(self)


class HypergradientInfo(NamedTuple):
    """What an estimate reports: f(x, y_T), and the info of the inner solver with all calls added up.

    Example:
        >>> import bilevax as bx
        >>> calls = bx.problem.Calls()
        >>> inner = bx.problem.SolverInfo(inner_loss=0.1, gradient_norm=1e-6, breakdown=False, calls=calls, detail=())
        >>> bx.hypergradients.HypergradientInfo(outer_loss=0.3, inner=inner).inner.gradient_norm
        1e-06
    """

    outer_loss: Array
    inner: SolverInfo

    def __repr__(self) -> str:
        return by_shape(self)


@as_called
def hypergradient(outer_loss: Loss, solver: InnerSolver, *, restart_optimizer: bool = False) -> Hypergradient:
    """An estimator of ∇F(x), F(x) = f(x, y(x)), that keeps y, its optimizer and v warm over the outer steps.

        z_0 = (y, o, t) of the last outer step     z_T = solver.forward(z_0)     (x_bar, y_bar) = solver.backward(∇_y f)
        ∇F(x) ≈ ∇_x f + x_bar          and with z_0 = start(x) of `initial`:   + [∂z_0/∂x]ᵀ z0_bar

    So y is trained as in an ordinary loop: momentum, moments and schedules o and the number t of steps run on, while x
    moves. The derivative ends where the outer step begins, at constants y and o: it sees what x did within it. (Where
    few steps make up an outer step, that is little of what x does in the long run: a learning rate that decays has
    hardly an effect on f within five steps, and a weight decay not all of its own.)

    An optimizer that is a function of x takes the numbers of the new x at each outer step, also where they stand in its
    state (`optax.inject_hyperparams`): what its `init` computes from x is made anew, the rest is kept. With `initial=`
    in the solver y, optimizer and t start afresh at each outer step. (Where you put another y into the state yourself,
    put the `opt_state` that belongs to it beside it, or pass restart_optimizer=True.)

    Args:
      outer_loss: f, a function (x, y, batch) -> scalar.
      solver: an inner solver, which holds the inner loss.
      restart_optimizer: whether the optimizer of y starts afresh at each outer step all the same; y is kept, and t runs
        on, which only the samplers see (a schedule counts in the optimizer's own state).

    Returns:
      `Hypergradient(init, estimate)`: `init(x, y, batch=None, *, opt_state=None) -> state`, whose `Batch` only a solver
      that keeps factors of the model asks for, and which goes on with the `opt_state` of a training of y so far: that
      of a loop by hand, of flax's `TrainState`, or of an `nnx.Optimizer`; and
      `estimate(key, state, x, Batch(outer, inner)) -> (grad, state, HypergradientInfo)`. The key may be None where
      nothing is drawn at random. Both are pure functions to jit, vmap and scan; without jit, each call traces anew.

    Raises:
      ValueError: if a loss is not scalar, x or y is empty or not floating-point, opt_state does not fit the optimizer
        (or nothing would read it), or the batch is no `Batch`.

    Cost: one gradient of f and the cost of the solver.

    Reference: Pedregosa, arXiv 1602.02355, algorithm 1 (implicit); Franceschi et al., arXiv 1806.04910 (unrolled).

    Example:
        >>> import bilevax as bx, jax, optax
        >>> solver = bx.inner.implicit(lambda x, y, batch: 0.5 * (y - x) ** 2, optax.sgd(1.0), steps=1)
        >>> hypergrad = bx.hypergradient(lambda x, y, batch: 0.5 * (y - batch) ** 2, solver)
        >>> state, batch = hypergrad.init(3.0, 0.0), bx.Batch(outer=1.0, inner=None)
        >>> grad, state, info = jax.jit(hypergrad.estimate)(jax.random.key(0), state, 3.0, batch)
        >>> float(grad), float(state.y), float(info.outer_loss), int(state.t)
        (2.0, 3.0, 2.0, 1)
    """
    outer = checks.scalar_loss("outer_loss", outer_loss)
    check_solver("solver", solver, "Pass, say, bx.inner.reverse(inner_loss, optax.sgd(0.1), steps=10).")
    afresh = solver.fresh or restart_optimizer

    def begin(state: HypergradientState, x: PyTree, y: PyTree) -> Iterate:
        if afresh:
            z = started(solver.start(x, y))
            return z if solver.fresh else z._replace(t=state.t)
        return resumed(solver.start, x, y, state.opt_state, state.t)

    def init(x: PyTree, y: PyTree, batch: Batch | None = None, *, opt_state: Any = None) -> HypergradientState:
        """The first state, with y as the warm inner variable and `opt_state` as that of its optimizer.

        By default the optimizer begins at y. The batch is read where the solver keeps factors of the model, for their
        shapes.
        """
        check_batch(batch)
        solver_state = solver.init(x, y, None if batch is None else batch.inner)
        if afresh:
            refused(opt_state, "the optimizer starts afresh at each outer step (initial=, restart_optimizer=True)")
            opt_state, t = (), jnp.zeros((), jnp.int32)
        else:
            opt_state, t = first_state(solver.start, x, y, opt_state)
        return owned(HypergradientState(arrays(y), solver_state, opt_state, t))

    def estimate(
        key: Key | None, state: HypergradientState, x: PyTree, batch: Batch
    ) -> tuple[PyTree, HypergradientState, HypergradientInfo]:
        """One estimate of ∇F(x): (grad, state, info), with grad a pytree like x.

        The state is that of `init(x, y)` or of the last estimate; its y, optimizer state and v start the inner solver.
        The key is split inside, and may be None where nothing is drawn.
        """
        check_call(HypergradientState, state, x, batch)
        z, pull_start = jax.vjp(lambda x, y: begin(state, x, y), x, state.y)

        def at_params(x: PyTree, params: PyTree, data: PyTree) -> Array:
            return outer(x, with_parameters(z_T.y, params), data)

        with counted_from(z.t):
            forward = solver.forward(key, state.solver, x, z, batch.inner)
            z_T, residual, solver_state = solved(forward, z, state.solver)
            value, (direct, y_bar) = jax.value_and_grad(at_params, argnums=(0, 1))(x, parameters(z_T.y), batch.outer)
            backward = solver.backward(residual, solver_state, Iterate(y_bar))
            (x_bar, z0_bar), solver_state, info = pulled_back(backward, x, z, solver_state)
        start_bar, _ = pull_start(full_cotangent(z0_bar, z))
        grad = jax.tree.map(lambda *parts: sum(parts), direct, x_bar, start_bar)
        info = info._replace(
            breakdown=info.breakdown | ~jnp.isfinite(value + norm(grad)),
            calls=info.calls._replace(outer_gradients=info.calls.outer_gradients + 1),
        )
        state = HypergradientState(z_T.y, solver_state, () if afresh else z_T.opt_state, z_T.t)
        return grad, state, HypergradientInfo(value, info)

    return Hypergradient(init, estimate)


def check_call(kind: type, state: Any, x: PyTree, batch: Batch) -> None:
    """Raises ValueError unless the arguments of `estimate` are a state of this kind, a valid x and a Batch."""
    fix = "Pass the state of init(x, y) or of the last estimate: estimate(key, state, x, batch)."
    checks.instance("state", state, kind, fix)
    checks.floating("x", x)
    checks.instance("batch", batch, Batch, BATCH_FIX)


def check_batch(batch: Batch | None) -> None:
    """Raises ValueError unless the batch of `init` is that of `estimate`, or None."""
    if batch is not None:
        checks.instance("batch", batch, Batch, BATCH_FIX)

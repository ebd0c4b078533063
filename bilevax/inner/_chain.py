"""Two inner solvers one after the other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.inner._checked import check_solver
from bilevax.printing import as_called, by_shape
from bilevax.problem import InnerSolver, Iterate, SolverInfo, added
from bilevax.typing import Key, PyTree


class ChainState(NamedTuple):
    """The states of the two links.

    Example:
        >>> import bilevax as bx
        >>> bx.inner.ChainState(first=(), last=()).first
        ()
    """

    first: Any
    last: Any

    def __repr__(self) -> str:
        return by_shape(self)


class ChainResidual(NamedTuple):
    """The residuals of the two links."""

    first: Any
    last: Any


@as_called
def chain(first: InnerSolver, last: InnerSolver) -> InnerSolver:
    """Solves with `first`, goes on with `last`, and sends the cotangent of `last` back through `first`.

        z_m = first(x, z_0)     z_T = last(x, z_m)
        (x_bar₂, m_bar) = last.backward(z_bar)     (x_bar₁, z0_bar) = first.backward(m_bar)     x_bar = x_bar₁ + x_bar₂

    The key is the same and the step count runs on, so that `chain(reverse(a), reverse(b))` is `reverse(a + b)`. Give
    both links the same loss, optimizer and sampler. Useful chains:

        truncated unroll         chain(no_gradient(T − K), reverse(K))
        unroll + implicit tail   chain(implicit(T − K, ihvp), reverse(K))
        forward, then reverse    chain(forward_gradient(T − K), reverse(K))

    The tail needs a damping of about 1 / (step size · K), and an optimizer without momentum.

    Args:
      first: the solver that starts; its `initial` counts.
      last: the solver that ends; a chain may be a link as well. Its `initial` is not used.

    Returns:
      An `InnerSolver` with state `ChainState(first, last)`. Its info is that of the returned y, with the calls of both
      links added up and the breakdowns joined; `info.detail` holds both infos.

    Raises:
      ValueError: if `last` pushes tangents from x alone (forward gradients), or the optimizer state of one link does
        not fit the other.

    Cost: the sum of both.

    Reference: Shaban et al., arXiv 1810.10667, for the truncated unroll.

    Example:
        >>> import bilevax as bx, jax, optax
        >>> reverse = lambda steps: bx.inner.reverse(lambda x, y, batch: 0.5 * (y - x) ** 2, optax.sgd(0.5), steps)
        >>> solvers = bx.inner.chain(reverse(1), reverse(2)), reverse(3)
        >>> [float(jax.jit(jax.grad(bx.differentiable(solver)))(1.0, 0.0, None)) for solver in solvers]
        [0.875, 0.875]
    """
    for name, link in (("first", first), ("last", last)):
        check_solver(name, link, "Pass two inner solvers; nest chains to join more.")
    if last.pushes_tangents:
        raise ValueError(
            "last must send a derivative back to the link before it; got a solver that pushes tangents from x alone, "
            "such as inner.forward_gradient. Make it the first link."
        )

    def init(x: PyTree, y: PyTree, batch: PyTree = None) -> ChainState:
        """The memories of both links, for one batch of inner data."""
        state = ChainState(first.init(x, y, batch), last.init(x, y, batch))
        got, expected = jax.eval_shape(first.start, x, y).opt_state, jax.eval_shape(last.start, x, y).opt_state
        checks.same_shapes(
            "optimizer state between the links of a chain", got, expected, "Give both links the same optimizer."
        )
        return state

    def forward(
        key: Key | None, state: ChainState, x: PyTree, z: Iterate, batch: PyTree
    ) -> tuple[Iterate, ChainResidual, ChainState]:
        """z_T of the last link, which went on from the z_m of the first."""
        z, first_residual, first_state = first.forward(key, state.first, x, z, batch)
        z, last_residual, last_state = last.forward(key, state.last, x, z, batch)
        return z, ChainResidual(first_residual, last_residual), ChainState(first_state, last_state)

    def backward(
        residual: ChainResidual, state: ChainState, z_bar: Iterate
    ) -> tuple[tuple[PyTree, Iterate], ChainState, SolverInfo]:
        """x_bar like x, the sum of both links; z0_bar is that of the first."""
        (last_x_bar, z_bar), last_state, last_info = last.backward(residual.last, state.last, z_bar)
        (first_x_bar, z_bar), first_state, first_info = first.backward(residual.first, state.first, z_bar)
        calls = added(first_info.calls, last_info.calls)
        breakdown = jnp.logical_or(first_info.breakdown, last_info.breakdown)
        info = last_info._replace(breakdown=breakdown, calls=calls, detail=(first_info, last_info))
        return (optax.tree.add(first_x_bar, last_x_bar), z_bar), ChainState(first_state, last_state), info

    return InnerSolver(init, first.start, forward, backward, first.pushes_tangents, first.fresh)

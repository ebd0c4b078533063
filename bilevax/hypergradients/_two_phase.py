"""Two hypergradient estimators, one after the other in time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.hypergradients._checked import check_hypergrad, estimated
from bilevax.printing import as_called, by_shape
from bilevax.problem import Batch, Hypergradient
from bilevax.typing import Array, Key, PyTree, Scalar


class TwoPhaseState(NamedTuple):
    """What `two_phase` keeps.

    Attributes:
      y: the warm inner variable, handed over at the switch.
      step: number of estimates so far.
      first: the state of the first estimator, without its y.
      second: that of the second.

    Example:
        >>> import bilevax as bx
        >>> bx.hypergradients.TwoPhaseState(y=1.0, step=0, first=(), second=()).y
        1.0
    """

    y: PyTree
    step: Array
    first: Any
    second: Any

    def __repr__(self) -> str:
        return by_shape(self)


class TwoPhaseInfo(NamedTuple):
    """What an estimate of `two_phase` reports.

    Attributes:
      phase: 0 for the first estimator, 1 for the second; scalar.
      first: the info of the first estimator; all 0 in the second phase.
      second: the info of the second estimator; all 0 in the first phase.

    Example:
        >>> import bilevax as bx
        >>> bx.hypergradients.TwoPhaseInfo(phase=1, first=(), second=()).phase
        1
    """

    phase: Array
    first: Any
    second: Any

    def __repr__(self) -> str:
        return by_shape(self)


class _Outcome(NamedTuple):
    """What both branches return: the state of the one that rested as it was, its info blank."""

    grad: PyTree
    y: PyTree
    first: Any
    second: Any
    first_info: Any
    second_info: Any


@as_called
def two_phase(switch_at: Scalar, first: Hypergradient, second: Hypergradient) -> Hypergradient:
    """Estimates by `first` in the outer steps before `switch_at`, and by `second` from there on.

        grad_k = first(x_k)  for k < switch_at          grad_k = second(x_k)  for k >= switch_at

    A cheap, biased estimator goes most of the way, an expensive, better one the rest. The warm y is handed over; what
    else the second one keeps (v, factors) starts as its `init` made it. Only the active one runs (`lax.cond`), but
    under `jax.vmap` over states of different age both do.

    Args:
      switch_at: outer step of the switch, a whole number >= 0; may be traced.
      first: estimator of the first phase.
      second: estimator of the second phase, for an x and y of the same shapes.

    Returns:
      A `Hypergradient` with state `TwoPhaseState(y, step, first, second)` and info
      `TwoPhaseInfo(phase, first, second)`.

    Raises:
      ValueError: if switch_at is negative or no whole number, or first or second is no `Hypergradient`.

    Cost: that of the active estimator; the memory of both states, with one y.

    Reference: Shen et al., "Memory-efficient gradient unrolling for large-scale bi-level optimization", arXiv
    2406.14095, section 3.3.

    Example:
        >>> import bilevax as bx, optax
        >>> inner_loss, outer_loss = lambda x, y, batch: 0.5 * (y - x) ** 2, lambda x, y, batch: y**2
        >>> cheap = bx.hypergradient(outer_loss, bx.inner.implicit(inner_loss, ihvp=bx.ihvp.identity(0.5)))
        >>> exact = bx.hypergradient(outer_loss, bx.inner.implicit(inner_loss, ihvp=bx.ihvp.exact()))
        >>> hypergrad = bx.two_phase(1, cheap, exact)
        >>> state, batch = hypergrad.init(3.0, 3.0), bx.Batch(None, None)
        >>> one, state, _ = hypergrad.estimate(None, state, 3.0, batch)
        >>> two, state, info = hypergrad.estimate(None, state, 3.0, batch)
        >>> float(one), float(two), int(info.phase), float(info.first.outer_loss)
        (3.0, 6.0, 1, 0.0)
    """
    checks.whole("switch_at", switch_at)
    for name, estimator in (("first", first), ("second", second)):
        check_hypergrad(name, estimator)

    def init(x: PyTree, y: PyTree, batch: Batch | None = None) -> TwoPhaseState:
        """The states of both estimators with one y, before the first outer step."""
        states = [estimator.init(x, y, batch) for estimator in (first, second)]
        for name, state in zip(("first", "second"), states, strict=True):
            checks.has_y(name, state)
        return TwoPhaseState(states[0].y, jnp.zeros((), jnp.int32), *(state._replace(y=None) for state in states))

    def estimate(
        key: Key | None, state: TwoPhaseState, x: PyTree, batch: Batch
    ) -> tuple[PyTree, TwoPhaseState, TwoPhaseInfo]:
        """One estimate of ∇F(x) by the estimator of this phase: (grad, state, info), with grad a pytree like x."""
        fix = "Pass the state of init(x, y) or of the last estimate: estimate(key, state, x, batch)."
        checks.instance("state", state, TwoPhaseState, fix)

        def run_first(part: Any) -> tuple[PyTree, Any, Any]:
            part = part._replace(y=state.y)
            return estimated(first.estimate(key, part, x, batch), x, part, "first")

        def run_second(part: Any) -> tuple[PyTree, Any, Any]:
            part = part._replace(y=state.y)
            return estimated(second.estimate(key, part, x, batch), x, part, "second")

        blank_first = optax.tree.zeros_like(jax.eval_shape(run_first, state.first)[2])
        blank_second = optax.tree.zeros_like(jax.eval_shape(run_second, state.second)[2])

        def in_first(state: TwoPhaseState) -> _Outcome:
            grad, part, info = run_first(state.first)
            return _Outcome(grad, part.y, part._replace(y=None), state.second, info, blank_second)

        def in_second(state: TwoPhaseState) -> _Outcome:
            grad, part, info = run_second(state.second)
            return _Outcome(grad, part.y, state.first, part._replace(y=None), blank_first, info)

        late = state.step >= switch_at
        done = jax.lax.cond(late, in_second, in_first, state)
        info = TwoPhaseInfo(late.astype(jnp.int32), done.first_info, done.second_info)
        return done.grad, TwoPhaseState(done.y, state.step + 1, done.first, done.second), info

    return Hypergradient(init, estimate)

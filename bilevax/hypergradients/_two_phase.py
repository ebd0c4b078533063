"""Two hypergradient estimators, one after the other in time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.hypergradients._checked import check_hypergrad, estimated
from bilevax.printing import as_called, by_shape
from bilevax.problem import Batch, Hypergradient
from bilevax.typing import Array, Key, PyTree, Scalar

HANDED_OVER = ("y", "opt_state", "t")  # fields of a state, where both estimators have one of the same form


class TwoPhaseState(NamedTuple):
    """What `two_phase` keeps.

    Attributes:
      y: the warm inner variable, handed over at the switch.
      step: number of estimates so far.
      first: the state of the first estimator, without what is handed over.
      second: that of the second.
      opt_state: the warm state of the inner optimizer, handed over at the switch; None where the states of the two
        optimizers do not look alike, and each estimator keeps its own.
      t: inner steps so far, handed over too; None where one of them does not count.

    Example:
        >>> import bilevax as bx
        >>> bx.hypergradients.TwoPhaseState(y=1.0, step=0, first=(), second=()).y
        1.0
    """

    y: PyTree
    step: Array
    first: Any
    second: Any
    opt_state: Any = None
    t: Any = None

    def __repr__(self) -> str:
        return by_shape(self)


class TwoPhaseInfo(NamedTuple):
    """What an estimate of `two_phase` reports.

    Attributes:
      phase: 0 for the first estimator, 1 for the second; scalar.
      first: the info of the first estimator; all 0 in the second phase.
      second: the info of the second estimator; all 0 in the first phase.
      handed_over: whether the second phase goes on with the optimizer state of the first; False where the two do not
        look alike, and the second optimizer starts afresh at the switch.

    Example:
        >>> import bilevax as bx
        >>> bx.hypergradients.TwoPhaseInfo(phase=1, first=(), second=()).phase
        1
    """

    phase: Array
    first: Any
    second: Any
    handed_over: Array | bool = True

    def __repr__(self) -> str:
        return by_shape(self)


class _Outcome(NamedTuple):
    """What both branches return: the state of the one that rested as it was, its info blank."""

    grad: PyTree
    shared: dict[str, Any]
    first: Any
    second: Any
    first_info: Any
    second_info: Any


@as_called
def two_phase(switch_at: Scalar, first: Hypergradient, second: Hypergradient) -> Hypergradient:
    """Estimates by `first` in the outer steps before `switch_at`, and by `second` from there on.

        grad_k = first(x_k)  for k < switch_at          grad_k = second(x_k)  for k >= switch_at

    A cheap, biased estimator goes most of the way, an expensive, better one the rest. The warm y and t are handed over,
    and the optimizer state where both keep one of the same structure; what else the second one keeps (v, factors,
    another optimizer) starts as its `init` made it. Only the active one runs (`lax.cond`), but under `jax.vmap` over
    states of different age both do.

    Args:
      switch_at: outer step of the switch, a whole number >= 0; may be traced.
      first: estimator of the first phase.
      second: estimator of the second phase, for an x and y of the same shapes.

    Returns:
      A `Hypergradient` with a `TwoPhaseState` and a `TwoPhaseInfo(phase, first, second, handed_over)`. An `opt_state`
      that its `init` is given is that of both.

    Raises:
      ValueError: if switch_at is negative or no whole number, or first or second is no `Hypergradient`.

    Cost: that of the active estimator; the memory of both states, with one y.

    Reference: Shen et al., "Memory-efficient gradient unrolling for large-scale bi-level optimization", arXiv
    2406.14095, section 3.3.

    Example:
        >>> import bilevax as bx, jax, optax
        >>> inner_loss, outer_loss = lambda x, y, batch: 0.5 * (y - x) ** 2, lambda x, y, batch: y**2
        >>> cheap = bx.hypergradient(outer_loss, bx.inner.implicit(inner_loss, ihvp=bx.ihvp.identity(0.5)))
        >>> exact = bx.hypergradient(outer_loss, bx.inner.implicit(inner_loss, ihvp=bx.ihvp.exact()))
        >>> hypergrad = bx.two_phase(1, cheap, exact)
        >>> state, batch = hypergrad.init(3.0, 3.0), bx.Batch(None, None)
        >>> one, state, _ = jax.jit(hypergrad.estimate)(None, state, 3.0, batch)
        >>> two, state, info = jax.jit(hypergrad.estimate)(None, state, 3.0, batch)
        >>> float(one), float(two), int(info.phase), float(info.first.outer_loss)
        (3.0, 6.0, 1, 0.0)
    """
    checks.whole("switch_at", switch_at)
    for name, estimator in (("first", first), ("second", second)):
        check_hypergrad(name, estimator)

    def init(x: PyTree, y: PyTree, batch: Batch | None = None, *, opt_state: Any = None) -> TwoPhaseState:
        """The states of both estimators with one y, before the first outer step."""
        given = {} if opt_state is None else {"opt_state": opt_state}
        states = [estimator.init(x, y, batch, **given) for estimator in (first, second)]
        for name, state in zip(("first", "second"), states, strict=True):
            checks.has_y(name, state)
        shared, without = _shared(*states)
        step = jnp.zeros((), jnp.int32)
        return TwoPhaseState(step=step, first=without(states[0]), second=without(states[1]), **shared)

    def estimate(
        key: Key | None, state: TwoPhaseState, x: PyTree, batch: Batch
    ) -> tuple[PyTree, TwoPhaseState, TwoPhaseInfo]:
        """One estimate of ∇F(x) by the estimator of this phase: (grad, state, info), with grad a pytree like x."""
        fix = "Pass the state of init(x, y) or of the last estimate: estimate(key, state, x, batch)."
        checks.instance("state", state, TwoPhaseState, fix)
        shared = {name: getattr(state, name) for name in HANDED_OVER if getattr(state, name) is not None}
        nothing = dict.fromkeys(shared)

        def run(name: str, estimator: Hypergradient, part: Any) -> tuple[PyTree, dict[str, Any], Any, Any]:
            part = part._replace(**shared)
            grad, part, info = estimated(estimator.estimate(key, part, x, batch), x, part, name)
            return grad, {name: getattr(part, name) for name in shared}, part._replace(**nothing), info

        blank_first = optax.tree.zeros_like(jax.eval_shape(lambda: run("first", first, state.first)[3]))
        blank_second = optax.tree.zeros_like(jax.eval_shape(lambda: run("second", second, state.second)[3]))

        def in_first(state: TwoPhaseState) -> _Outcome:
            grad, after, part, info = run("first", first, state.first)
            return _Outcome(grad, after, part, state.second, info, blank_second)

        def in_second(state: TwoPhaseState) -> _Outcome:
            grad, after, part, info = run("second", second, state.second)
            return _Outcome(grad, after, state.first, part, blank_first, info)

        late = state.step >= switch_at
        done = jax.lax.cond(late, in_second, in_first, state)
        handed_over = jnp.asarray("opt_state" in shared)
        info = TwoPhaseInfo(late.astype(jnp.int32), done.first_info, done.second_info, handed_over)
        return done.grad, TwoPhaseState(step=state.step + 1, first=done.first, second=done.second, **done.shared), info

    return Hypergradient(init, estimate)


def _shared(first: Any, second: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """What is handed over at the switch, and a function that takes it out of a state."""
    fields = {name: (getattr(first, name, None), getattr(second, name, None)) for name in HANDED_OVER}
    found = {name: one for name, (one, other) in fields.items() if name == "y" or _alike(one, other)}
    return found, lambda state: state._replace(**dict.fromkeys(found))


def _alike(one: Any, other: Any) -> bool:
    """Whether two parts of a state are there and have one structure, and one shape and dtype at every leaf."""
    forms = [(checks.Shapes.of(part), [*map(jnp.result_type, jax.tree.leaves(part))]) for part in (one, other)]
    return one is not None and other is not None and forms[0] == forms[1]

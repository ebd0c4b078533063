"""What an optax transformation is offered beside a gradient, and what some cannot be."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from bilevax import checks
from bilevax.typing import Array, PyTree


def update_of(
    optimizer: optax.GradientTransformation, value: Array, gradient: PyTree, value_fn: Callable[[PyTree], Array]
) -> Callable[..., tuple[PyTree, Any]]:
    """The `update(gradient, state, params)` of an optimizer, with those of these arguments that it takes.

    value, grad        of the loss at params (line searches, Polyak's step)
    value_fn, obj_fn   params -> value, under two names (lbfgs, sophia)
    grad_fn            (params, i) -> gradient, for any i (sharpness-aware minimization)
    """

    def offered_value(params: PyTree, *, obj_fn: Any = None, grad_fn: Any = None) -> Array:
        return value_fn(params)  # a line search refuses what its value_fn does not name

    offered = {
        "value": value,
        "grad": gradient,
        "value_fn": offered_value,
        "obj_fn": value_fn,
        "grad_fn": lambda params, _=None: jax.grad(value_fn)(params),
    }
    return functools.partial(optimizer.update, **checks.taken(optimizer.update, offered))


def check_state(state: Any) -> None:
    """Raises ValueError where the state is that of an optimizer that moves something else than y."""
    kept = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, optax.LookaheadState))
    if any(isinstance(part, optax.LookaheadState) for part in kept):
        raise ValueError(
            "optimizer must move y itself; got optax.lookahead, which moves a pair of parameters, fast and slow ones. "
            "Use the fast optimizer alone, or one that keeps an average in its state: optax.contrib.schedule_free_sgd."
        )

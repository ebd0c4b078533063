"""An inner variable of which a part is not optimized but moves along: running statistics, counts, keys."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.meshes import like, on_any_axes
from bilevax.typing import Array, PyTree

__all__ = ["Carried", "CarryingLoss", "carried_like", "carrying", "pair", "parameters", "with_parameters"]


def __dir__() -> list[str]:
    return __all__


class Carried(NamedTuple):
    """An inner variable y of two parts: what is optimized, and what inner steps hand on, such as BatchNorm's means.

        (g, carried_t) = inner_loss(x, Carried(params_{t−1}, carried_{t−1}), batch_t)
        params_t = params_{t−1} + update(∇_params g)

    With such a y the inner loss returns a pair, its value and the new carried. The optimizer, inverse-Hessian-vector
    products and cotangents know the params alone; no derivative passes through what is carried. The outer loss gets the
    whole y of the last step, so that a model in evaluation mode finds its statistics, and the state keeps the whole y;
    `initial` and `solve` return a `Carried` as well. In the implicit rule and in every report the statistics stay as
    they are at the last step. With flax nnx:

        graphdef, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)

        def inner_loss(x, y, batch):
            model = nnx.merge(graphdef, y.params, y.carried)
            value = weighted_cross_entropy(model(batch.images), batch.labels, x)
            return value, nnx.state(model, nnx.BatchStat)

        y = bx.inner.Carried(params, statistics)

    Attributes:
      params: what the optimizer moves, a pytree of floating-point arrays.
      carried: any pytree of arrays, counts and keys as well; it keeps its structure, shapes and dtypes.

    Example:
        >>> import bilevax as bx, jax, optax
        >>> def inner_loss(x, y, batch):  # it carries a running mean of y
        ...     return (y.params - x) ** 2, 0.5 * y.carried + 0.5 * y.params
        >>> solve = bx.differentiable(bx.inner.reverse(inner_loss, optax.sgd(0.25), steps=2))
        >>> y = solve(1.0, bx.inner.Carried(0.0, 0.0), None)
        >>> float(y.params), float(y.carried)
        (0.75, 0.25)
    """

    params: PyTree
    carried: PyTree


CarryingLoss: TypeAlias = Callable[[PyTree, PyTree, PyTree, PyTree], tuple[Array, PyTree]]
"""(x, params, y, batch) -> the loss at y with these params, and y with what it carries next."""


def parameters(y: PyTree) -> PyTree:
    """What of y is optimized: all of it, unless it is `Carried`."""
    return y.params if isinstance(y, Carried) else y


def with_parameters(y: PyTree, params: PyTree) -> PyTree:
    """`y` with other parameters; what it carries is a copy that no derivative passes through."""
    return Carried(params, jax.lax.stop_gradient(y.carried)) if isinstance(y, Carried) else params


def carrying(name: str, loss: Callable[[PyTree, PyTree, PyTree], Any]) -> CarryingLoss:
    """Returns `loss` as a checked function (x, params, y, batch) -> (value, y with what it carries next).

    It is the loss at y with these params, so that its derivative in y is that in params.
    """
    scalar, both = checks.scalar_loss(name, loss), on_any_axes(loss)

    def evaluate(x: PyTree, params: PyTree, y: PyTree, batch: PyTree) -> tuple[Array, PyTree]:
        if not isinstance(y, Carried):
            return scalar(x, params, batch), y
        value, carried = pair(name, "value", both(x, with_parameters(y, params), batch))
        fix = "Return from the loss as its second part what came in y.carried, with new values."
        carried = carried_like(f"carried of {name}", carried, y.carried, fix)
        return checks.scalar_value(name, value), y._replace(carried=carried)

    return evaluate


def pair(name: str, what: str, parts: Any) -> tuple[Any, PyTree]:
    """What a function of a `Carried` returned; raises ValueError unless it is a pair of `what` and the new carried."""
    if not isinstance(parts, tuple | list) or len(parts) != 2:
        raise ValueError(
            f"{name} must return ({what}, new carried) where y is a bx.inner.Carried; got {type(parts).__name__}. "
            f"Return as the second part what goes on to the next step, or let y be the params alone if nothing does."
        )
    return parts[0], parts[1]


def carried_like(name: str, carried: PyTree, before: PyTree, fix: str) -> PyTree:
    """What is carried on, without derivative, its floating-point leaves in the dtypes that they had before."""

    def cast(new: Any, old: Any) -> Any:
        dtypes = [jnp.result_type(leaf) for leaf in (new, old)]
        floating = all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
        return jnp.asarray(new, dtypes[floating])

    checks.same_shapes(name, carried, before, fix)
    carried = jax.tree.map(cast, carried, before)
    checks.same_form(name, carried, before, fix)
    return jax.lax.stop_gradient(like(carried, before))

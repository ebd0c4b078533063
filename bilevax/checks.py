"""Checks of what a user passes in: every message names the argument, what it got, what was expected, and the fix.

Values are checked when they are concrete and never when they are traced, so that every constructor also works inside
`jax.jit` and `jax.vmap`. Structures, shapes and dtypes are always known and always checked.
"""

import dataclasses
import inspect
import operator
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.meshes import on_any_axes
from bilevax.typing import Array, PyTree, Scalar


def nonnegative(name: str, value: Scalar) -> None:
    """Raises ValueError unless `value` (when concrete) is finite and >= 0 everywhere."""
    if not isinstance(value, jax.core.Tracer) and not (_finite(value) and (np.asarray(value) >= 0).all()):
        raise ValueError(f"{name} must be a finite number >= 0; got {value!r:.80}. Pass {name}=0.0 to switch it off.")


def positive(name: str, value: Scalar) -> None:
    """Raises ValueError unless `value` (when concrete) is finite and > 0 everywhere."""
    if not isinstance(value, jax.core.Tracer) and not (_finite(value) and (np.asarray(value) > 0).all()):
        raise ValueError(f"{name} must be a finite number > 0; got {value!r:.80}. Pass a small positive {name}.")


def scalar(name: str, value: Any, fix: str = "") -> None:
    """Raises ValueError unless `value` is one real number, also when traced."""
    kinds = (int, float, np.ndarray, np.generic, jax.Array)
    if not isinstance(value, kinds) or jnp.ndim(value) or not jnp.issubdtype(jnp.result_type(value), jnp.number):
        what = f"shape {jnp.shape(value)}" if isinstance(value, kinds) and jnp.ndim(value) else _describe(value)
        fix = fix or f"Pass, say, {name}=0.1; to try several, use jax.vmap."
        raise ValueError(f"{name} must be one number; got {what}. {fix}")


def fraction(name: str, value: Scalar, zero: bool = False) -> None:
    """Raises ValueError unless `value` (when concrete) is in (0, 1] everywhere, or in [0, 1] with `zero`."""
    if isinstance(value, jax.core.Tracer):
        return
    array = np.asarray(value)
    if not (_finite(value) and (array <= 1).all() and ((array >= 0) if zero else (array > 0)).all()):
        interval = "[0, 1]" if zero else "(0, 1]"
        raise ValueError(f"{name} must be in {interval}; got {value!r}. Pass, say, {name}=0.1.")


def agents_axis(name: str, tree: PyTree, n: int, fix: str) -> None:
    """Raises ValueError unless every leaf has the agents' axis of length n first."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != n:
            raise ValueError(
                f"{name} must have leaves [{n}, ...], one row for each of {n} agents; got shape {jnp.shape(leaf)} at "
                f"{name}{jax.tree_util.keystr(path)}. {fix}"
            )


def parts(name: str, value: Any, *expected: str) -> tuple[Any, ...]:
    """Returns what a function of somebody else returned; raises ValueError unless it is a tuple of so many parts."""
    if not isinstance(value, tuple) or hasattr(value, "_fields") or len(value) != len(expected):
        got = f"{len(value)} parts" if type(value) is tuple else _describe(value)
        raise ValueError(f"{name} must return ({', '.join(expected)}); got {got}. Return a tuple of these.")
    return value


def one_for_each_agent(name: str, value: Any, agents: Any, fix: str) -> None:
    """Raises ValueError unless there is one number for each of the agents held here."""
    if jnp.shape(value) != jnp.shape(agents):
        raise ValueError(
            f"{name} must be one number for each of the {len(agents)} agents held here; got shape {jnp.shape(value)}. "
            f"{fix}"
        )


def _finite(value: Any) -> bool:
    array = np.asarray(value)
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    return real and bool(np.isfinite(array).all())


def count(name: str, value: Any, minimum: int = 0) -> int:
    """Returns `value` as an int; raises ValueError unless it is a static whole number >= `minimum`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except (TypeError, jax.errors.ConcretizationTypeError) as error:
        fix = f"Pass a plain int, say {name}=10."
        if isinstance(value, jax.core.Tracer):
            fix = (
                "It fixes the shape of the program and cannot be traced: pass a plain int (static_argnums of jax.jit)."
            )
        what = type(value).__name__
        raise ValueError(f"{name} must be a static Python int >= {minimum}; got {what}. {fix}") from error
    if number < minimum:
        raise ValueError(f"{name} must be an int >= {minimum}; got {number}. Pass {name}={minimum} or more.")
    return number


def whole(name: str, value: Scalar) -> None:
    """Raises ValueError unless `value` is an integer scalar, and (when concrete) >= 0."""
    scalar = jnp.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), jnp.integer)
    if not scalar or not (isinstance(value, jax.core.Tracer) or value >= 0):
        raise ValueError(f"{name} must be a whole number >= 0; got {value!r}. Pass, say, {name}=100.")


def instance(name: str, value: Any, kind: type, fix: str) -> None:
    """Raises ValueError unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {article(kind.__name__)}; got {_describe(value)}. {fix}")


def made_of(name: str, value: Any, kind: type, fix: str, **functions: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is a `kind` whose functions take these positional arguments."""
    instance(name, value, kind, fix)
    for each, arguments in functions.items():
        function(f"{name}.{each}", getattr(value, each), *arguments)


def has_y(name: str, state: Any) -> None:
    """Raises ValueError unless the state of an estimator is a NamedTuple with a field `y`."""
    if "y" not in getattr(state, "_fields", ()):
        raise ValueError(
            f"{name}.init must return a NamedTuple with a field y, the warm inner variable; got {_describe(state)}. "
            f"Return, say, MyState(y=y)."
        )


def function(name: str, value: Any, *arguments: str, keywords: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless `value` is a function that takes these positional arguments and these keywords."""
    form = f"{name} must be a function ({', '.join([*arguments, *(f'{keyword}=' for keyword in keywords)])}) -> ..."
    if not callable(value):
        raise ValueError(f"{form}; got {_describe(value)}. Pass the function itself.")
    try:
        signature = inspect.signature(value)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(*arguments, **dict.fromkeys(keywords))
    except TypeError as error:
        bare = inspect.Signature([each.replace(annotation=each.empty) for each in signature.parameters.values()])
        raise ValueError(f"{form}; got {_describe(value)}{bare}: {error}. Give it these arguments.") from error


def _describe(value: Any) -> str:
    in_one_line = " ".join(repr(value).split())
    return getattr(value, "__qualname__", f"{in_one_line:.80} of type {type(value).__name__}")


def article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"an {noun}" if noun[0].lower() in "aeio" else f"a {noun}"


def floating(name: str, tree: PyTree) -> None:
    """Raises ValueError unless `tree` has leaves and every leaf is a real floating-point array or number."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_nnx_module)
    if not leaves:
        raise ValueError(
            f"{name} must hold at least one floating-point array; got an empty pytree {tree!r}. "
            f"Pass the {name} that the losses read."
        )
    for path, leaf in leaves:
        got, fix = _instead(name, leaf)
        if fix:
            raise ValueError(
                f"{name} must hold floating-point arrays only; got {got} at {name}{jax.tree_util.keystr(path)}. {fix}"
            )


def _is_nnx_module(node: Any) -> bool:
    """Whether it is a module of flax nnx, in which parameters, statistics and counts lie side by side."""
    return any(f"{kind.__module__}.{kind.__name__}" == "flax.nnx.module.Module" for kind in type(node).__mro__)


def _instead(name: str, leaf: Any) -> tuple[Any, str]:
    """What a leaf is, and what to pass in its place where it is not real and floating-point."""
    kind = article(type(leaf).__name__)
    if _is_nnx_module(leaf):
        return kind, (
            f"Split the module: graph, {name}, rest = nnx.split(model, nnx.Param, ...), and let the losses call "
            f"nnx.merge(graph, {name}, rest)."
        )
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if jnp.issubdtype(dtype, jnp.floating):
        return dtype, ""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return dtype, (
            "Pass its real and imaginary parts as two arrays, and let the losses put them together: jax.lax.complex."
        )
    if isinstance(dtype, np.dtype) and dtype.kind in "OUS":
        return kind if dtype.hasobject else dtype, (
            f"Leave out what is no array. Of a module of equinox pass the first part of eqx.partition(model, "
            f"eqx.is_inexact_array), and let the losses call eqx.combine({name}, rest); of one of linen its variables."
        )
    cast = ", or cast with .astype(float)" if jnp.issubdtype(dtype, jnp.integer) else ""
    return dtype, f"Keep counts, labels and keys in the batch{cast}."


def as_arrays(name: str, tree: PyTree) -> PyTree:
    """Makes NumPy arrays and numbers those of JAX, also under `jax.vmap`; raises ValueError where there is no such."""

    def convert(path: Any, leaf: Any) -> Array:
        if isinstance(leaf, jax.core.Tracer):
            return jnp.copy(leaf)  # behind a tracer of vmap may be a NumPy array, which no rule of derivatives takes
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if isinstance(dtype, np.dtype) and dtype.kind in "OUS":
            got = article(type(leaf).__name__) if dtype.hasobject else dtype
            raise ValueError(
                f"{name} must hold arrays and numbers only; got {got} at {name}{jax.tree_util.keystr(path)}. Number "
                f"what has names, and let the losses close over what is no number."
            )
        return jnp.asarray(leaf)

    return jax.tree_util.tree_map_with_path(convert, tree)


def same_shapes(name: str, got: PyTree, expected: PyTree, fix: str) -> None:
    """Raises ValueError unless the two pytrees have one structure and one shape at every leaf."""
    if (what := Shapes.of(got)) != (want := Shapes.of(expected)):
        raise ValueError(f"{name} must keep its structure and shapes; got {what}, expected {want}. {fix}")


def same_form(name: str, got: PyTree, expected: PyTree, fix: str) -> None:
    """Raises ValueError unless the two pytrees have one structure, and one shape and dtype at every leaf."""
    same_shapes(name, got, expected, fix)
    leaves = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, leaf), like in leaves:
        if (dtype := jnp.result_type(leaf)) != (wanted := jnp.result_type(like)):
            raise ValueError(
                f"{name} must keep its dtypes; got {dtype} at {jax.tree_util.keystr(path) or 'its only leaf'}, "
                f"expected {wanted}. {fix}"
            )


def scalar_loss(name: str, loss: Callable[[PyTree, PyTree, PyTree], Any]) -> Callable[[PyTree, PyTree, PyTree], Array]:
    """Returns `loss` with a check that it returns one floating-point number."""
    function(name, loss, "x", "y", "batch")
    evaluate = on_any_axes(loss)
    return lambda x, y, batch: scalar_value(name, evaluate(x, y, batch))


def scalar_value(name: str, value: Any) -> Array:
    """What the loss `name` returned, as an array; raises ValueError unless it is one floating-point number."""
    if not hasattr(value, "dtype") and not isinstance(value, float):
        fix = "Return the loss alone."
        if isinstance(value, tuple):
            fix += (
                " What goes on to the next inner step beside it, such as statistics, is returned where y is a "
                "bx.inner.Carried(params, carried), which hypergradients take and single-loop methods do not."
            )
        raise ValueError(f"{name} must return one floating-point number; got {type(value).__name__}. {fix}")
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name} must return a scalar; got shape {jnp.shape(value)}. Reduce the examples with .mean()."
        )
    if not jnp.issubdtype(value.dtype if hasattr(value, "dtype") else float, jnp.floating):
        raise ValueError(
            f"{name} must return a floating-point number; got dtype {value.dtype}. Return a loss that can be "
            f"differentiated, not a count or an index."
        )
    return jnp.asarray(value)


@dataclasses.dataclass(frozen=True, repr=False)
class Shapes:
    """The structure and shapes of a pytree, without its numbers."""

    structure: Hashable
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tree: PyTree) -> "Shapes":
        """Reads them off a pytree of arrays and numbers."""
        leaves, structure = jax.tree.flatten(tree)
        return cls(structure, tuple(jnp.shape(leaf) for leaf in leaves))

    def __repr__(self) -> str:
        return f"{self.structure} with shapes {list(self.shapes)}"


def taken(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered keyword arguments that the update of an optimizer takes, beside its first three."""
    parameters = dict(list(inspect.signature(function).parameters.items())[3:])
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    return {name: given for name, given in offered.items() if name in parameters}

"""Updates of an optimizer through which a derivative that is zero stays zero."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

from bilevax.curvature.capture.batch_axis import opened
from bilevax.curvature.capture.uses import bind
from bilevax.inner._scaled import scaled
from bilevax.typing import Array, PyTree

Choose: TypeAlias = Callable[[Any], list[Any]]  # the equations of a program that keep zeros
Run: TypeAlias = Callable[[Any], Callable[..., list[Any]]]

_ROOTS = ("sqrt", "rsqrt", "cbrt", "pow", "integer_pow", "log")  # have an infinite slope, at 0
_PRODUCTS = ("mul", "div")
_SCALED = (*_PRODUCTS, "neg", "convert_element_type", "broadcast_in_dim", "reshape", "squeeze")


def smooth_roots(update: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The same function of arrays, through whose roots a derivative that is 0 stays 0, in both modes.

    Adam's second moment s is 0 for a parameter that had no gradient yet. JAX makes ds / 2√s = 0/0 of its tangent 0, a
    NaN, while the update m / (√s + ε) has the derivative dm / ε whatever d√s is, since m = 0. The cotangent of √s is
    −m / (√s + ε)² = 0 there, and meets the same 1 / 2√s. Where an update selects, as clipping does between g and
    c g / ‖g‖, what is not selected has the cotangent 0, and the products and quotients that make it keep that as well.

    Values do not change, nor do derivatives that are finite; an infinite one stays infinite.
    """

    def smooth_update(*trees: PyTree) -> PyTree:
        program, shapes = jax.make_jaxpr(update, return_shape=True)(*trees)
        values = _evaluate(_singular, *opened(program), jax.tree.leaves(trees))
        return jax.tree.unflatten(jax.tree.structure(shapes), values)

    return smooth_update


def _singular(jaxpr: Any) -> list[Any]:
    """The roots, and the products and quotients that are scaled and selected at most."""
    found, reached = [], set()
    for equation in reversed(jaxpr.eqns):
        name, inputs = equation.primitive.name, [a for a in equation.invars if not isinstance(a, core.Literal)]
        if _selects(equation) or (name in _SCALED and equation.outvars[0] in reached):
            reached.update(inputs)
        if name in _ROOTS or (name in _PRODUCTS and equation.outvars[0] in reached):
            found.append(equation)
    return found


def _selects(equation: Any) -> bool:
    real = any(jnp.issubdtype(result.aval.dtype, jnp.floating) for result in equation.outvars)
    return real and (equation.primitive.name == "select_n" or any(map(_selects, _within(equation))))


def _all(jaxpr: Any) -> list[Any]:
    return [equation for equation in jaxpr.eqns if equation.primitive.name in (*_ROOTS, *_PRODUCTS)]


def _programs(equation: Any) -> list[Any]:
    """The programs among the parameters of an equation."""
    leaves = jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda leaf: hasattr(opened(leaf)[0], "eqns"))
    return [jaxpr for jaxpr, _ in map(opened, leaves) if hasattr(jaxpr, "eqns")]


def _within(equation: Any) -> Iterator[Any]:
    return (inner for jaxpr in _programs(equation) for inner in jaxpr.eqns)


def _evaluate(choose: Choose, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Runs a program of JAX in which the chosen equations keep zeros, also within its loops and branches.

    Functions with derivatives of their own (custom_jvp, custom_vjp) keep those.
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))
    chosen = {id(equation) for equation in choose(jaxpr)}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, [read(atom) for atom in equation.invars]
        if id(equation) in chosen:
            results = _elementwise(equation, inputs)
        elif name in _RULES and any(_concerns(choose, inner) for inner in _programs(equation)):
            results = _RULES[name](equation.params, inputs, functools.partial(_program, choose))
        else:
            results = bind(equation, inputs)
        values |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _program(choose: Choose, program: Any) -> Callable[..., list[Any]]:
    return lambda *inputs: _evaluate(choose, *opened(program), inputs)


def _concerns(choose: Choose, jaxpr: Any) -> bool:
    inner = (program for equation in jaxpr.eqns for program in _programs(equation))
    return bool(choose(jaxpr)) or any(_concerns(choose, program) for program in inner)


def _elementwise(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """A root, a product or a quotient of real numbers; one by a number in the program itself is left to JAX."""
    traced = [i for i, atom in enumerate(equation.invars) if not isinstance(atom, core.Literal)]
    result = equation.outvars[0].aval
    real = all(aval.dtype == result.dtype for aval in (equation.invars[i].aval for i in traced))
    finite = len(traced) < 2 if equation.primitive.name in _PRODUCTS else equation.params.get("y", 0) >= 1
    if finite or not (real and jnp.issubdtype(result.dtype, jnp.floating)):
        return bind(equation, inputs)

    def function(*arrays: Array) -> Array:
        given = dict(zip(traced, arrays, strict=True))
        return bind(equation, [given.get(i, value) for i, value in enumerate(inputs)])[0]

    return [_keeping_zeros(function)(*(inputs[i] for i in traced))]


def _keeping_zeros(function: Callable[..., Array]) -> Callable[..., Array]:
    """An elementwise function of arrays and scalars, whose derivative takes 0 to 0 whatever its slope is."""

    @jax.custom_jvp
    def value(*arrays: Array) -> Array:
        return function(*arrays)

    def push(arrays: tuple[Array, ...], dots: tuple[Any, ...]) -> tuple[Array, Array]:
        y = value(*arrays)
        one = jnp.ones_like(y)
        moved = [(i, dot) for i, dot in enumerate(dots) if not isinstance(dot, jax.custom_derivatives.SymbolicZero)]
        parts = [scaled(_like(y, slope(i, one, *arrays)), _like(y, dot)) for i, dot in moved]
        return y, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(y)

    def slope(i: int, one: Array, *arrays: Array) -> Array:  # ∂y/∂arrays[i], which keeps zeros in its own derivatives
        full = tuple(_like(one, array) for array in arrays)

        def along(*arrays: Array) -> Array:
            return jax.jvp(lambda array: function(*arrays[:i], array, *arrays[i + 1 :]), (arrays[i],), (one,))[1]

        return _evaluate(_all, *opened(jax.make_jaxpr(along)(*full)), full)[0]

    value.defjvp(push, symbolic_zeros=True)
    return value


def _like(y: Array, array: Array) -> Array:
    """An array or a scalar in the shape of y, and where y lies."""
    return array if jax.typeof(array) == jax.typeof(y) else array * jnp.ones_like(y)


def _call(given: dict[str, Any], inputs: Sequence[Any], run: Run) -> list[Any]:
    return run(given["jaxpr"] if "jaxpr" in given else given["call_jaxpr"])(*inputs)


def _cond(given: dict[str, Any], inputs: Sequence[Any], run: Run) -> list[Any]:
    return jax.lax.switch(inputs[0], [run(branch) for branch in given["branches"]], *inputs[1:])


def _scan(given: dict[str, Any], inputs: Sequence[Any], run: Run) -> list[Any]:
    step, first, last = run(given["jaxpr"]), given["num_consts"], given["num_consts"] + given["num_carry"]

    def body(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        results = step(*inputs[:first], *carry, *row)
        return results[: last - first], results[last - first :]

    options = {name: given[name] for name in ("length", "reverse", "unroll")}
    carry, rows = jax.lax.scan(body, list(inputs[first:last]), list(inputs[last:]), **options)
    return [*carry, *rows]


def _while(given: dict[str, Any], inputs: Sequence[Any], run: Run) -> list[Any]:
    first, last = given["cond_nconsts"], given["cond_nconsts"] + given["body_nconsts"]
    goes_on, body = run(given["cond_jaxpr"]), run(given["body_jaxpr"])
    return jax.lax.while_loop(
        lambda carry: goes_on(*inputs[:first], *carry)[0],
        lambda carry: body(*inputs[first:last], *carry),
        list(inputs[last:]),
    )


def _checkpoint(given: dict[str, Any], inputs: Sequence[Any], run: Run) -> list[Any]:
    program = jax.checkpoint(run(given["jaxpr"]), prevent_cse=given["prevent_cse"], policy=given["policy"])
    return program(*inputs)


_RULES = {  # pjit and checkpoint are names of older versions
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _call),
    **dict.fromkeys(("remat2", "remat", "checkpoint"), _checkpoint),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}

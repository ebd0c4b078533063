"""The programs that equations call: calls, the iterations of a scan, and maps as one program for all their pieces."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from bilevax.curvature.capture.places import Axis, Spread, axes_of
from bilevax.typing import Array

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call")
MARKS = ("pvary", "pcast", "pbroadcast")
CUSTOM = ("custom_vjp_call", "custom_vjp_call_jaxpr")

Program = tuple[Any, Sequence[Any]]
"""A jaxpr, in the form of this version of JAX, and its constants."""


def body(eqn: Any) -> Program | None:
    """The program that an equation calls once, with its constants; None where it calls none."""
    if eqn.primitive.name not in (*CALLS, *CUSTOM):
        return None
    inner = next(value for value in eqn.params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr"))
    return opened(inner)


def opened(jaxpr: Any) -> Program:
    """A program and its constants, however this version of JAX keeps them."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many constants and carries a scan has: what it slices or stacks has one axis more outside."""
    inner, _ = opened(eqn.params["jaxpr"])
    carries = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.outvars, inner.outvars, strict=True))
    sliced = sum(a.aval.ndim != b.aval.ndim for a, b in zip(eqn.invars, inner.invars, strict=True))
    return len(eqn.invars) - carries - sliced, carries


def at_once(eqn: Any, axes: Sequence[Axis]) -> Program | None:
    """A scan whose iterations are examples, or microbatches, and pass nothing on: one program for all of them."""
    consts, carries = scan_counts(eqn)
    sliced = [axis for axis in axes[consts:] if 0 in axes_of(axis) or (isinstance(axis, Spread) and not axis.ordered)]
    if carries or not sliced:
        return None
    each = core.jaxpr_as_fun(eqn.params["jaxpr"])
    mapped = jax.vmap(each, [None if k < consts else 0 for k in range(len(axes))])
    return opened(jax.make_jaxpr(mapped)(*_shapes(eqn)))


def ungrouped(eqn: Any) -> Program | None:
    """A `ragged_dot` as one product for each group, whose slots hold the rows of the group; None for any other."""
    # x [6, 4], w [3, 4, 5] and groups of 2, 3, 1 rows: slots [3, 6], of which the first holds the rows 0 and 1 and
    # nothing else; three products [6, 4] · [4, 5], of which row 2 is taken from the second
    if eqn.primitive.name not in ("ragged_dot", "ragged_dot_general"):
        return None
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    plain = (((1,), (1,)), ((), ()))
    if numbers is None or (numbers.dot_dimension_numbers, numbers.rhs_group_dimensions) != (plain, (0,)):
        return None

    def products(x: Array, w: Array, sizes: Array) -> list[Array]:
        rows, groups = jnp.arange(len(x)), jnp.arange(len(w))
        group = jnp.searchsorted(jnp.cumsum(sizes), rows, side="right")
        slots = jnp.where(group[None] == groups[:, None], rows[None], len(x))
        each = jnp.einsum("esd,edf->esf", x.at[slots].get(mode="fill", fill_value=0), w)
        return [each.at[group, rows].get(mode="fill", fill_value=0).astype(eqn.outvars[0].aval.dtype)]

    return opened(jax.make_jaxpr(products)(*_shapes(eqn)))


def unsharded(eqn: Any) -> Program | None:
    """A `shard_map` as one program for all of its pieces; None for any other equation."""
    # a [6, 4] in two pieces along "data": local programs of [3, 4] are mapped over [2, 3, 4], and their results
    # [2, 3, 2] put together, [6, 2]; what all of them share is mapped over nowhere
    if eqn.primitive.name != "shard_map":
        return None
    sizes, parameters = dict(eqn.params["mesh"].shape), eqn.params
    manual = parameters.get("manual_axes") or parameters.get("newly_manual_axes") or frozenset(sizes)
    names = [name for name in sizes if name in manual]
    inputs, outputs = ([_axes_by_dim(spec) for spec in parameters[key]] for key in ("in_specs", "out_specs"))
    each = core.jaxpr_as_fun(core.ClosedJaxpr(_unmarked(parameters["jaxpr"]), ()))
    for name in reversed(names):
        mapped = [0 if any(name in axes for axes in spec) else None for spec in inputs]
        each = jax.vmap(each, mapped, axis_name=name, axis_size=sizes[name])

    def whole(*arrays: Array) -> list[Array]:
        pieces = [_split(array, spec, names, sizes) for array, spec in zip(arrays, inputs, strict=True)]
        return [_merged(array, spec, names) for array, spec in zip(each(*pieces), outputs, strict=True)]

    return opened(jax.make_jaxpr(whole)(*_shapes(eqn)))


def _unmarked(jaxpr: Any) -> Any:
    """A local program without the marks that say over which axes of a mesh an array differs."""
    known: dict[Any, Any] = {}
    eqns = []
    for eqn in jaxpr.eqns:
        given = [var if isinstance(var, core.Literal) else known.get(var, var) for var in eqn.invars]
        if eqn.primitive.name in MARKS:
            known |= dict(zip(eqn.outvars, given, strict=True))
        else:
            parameters = {key: _inner(value) for key, value in eqn.params.items()}
            if eqn.primitive.name == "psum_invariant":  # a psum whose results are marked
                eqn, parameters = eqn.replace(primitive=jax.lax.psum_p), {"axis_index_groups": None, **parameters}
            eqns.append(eqn.replace(invars=given, params=parameters))
    results = [var if isinstance(var, core.Literal) else known.get(var, var) for var in jaxpr.outvars]
    return jaxpr.replace(eqns=eqns, outvars=results)


def _inner(value: Any) -> Any:
    if isinstance(value, core.ClosedJaxpr):
        return core.ClosedJaxpr(_unmarked(value.jaxpr), value.consts)
    if isinstance(value, tuple | list):
        return type(value)(map(_inner, value)) if type(value) in (tuple, list) else value
    return _unmarked(value) if isinstance(value, core.Jaxpr) else value


def _shapes(eqn: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.invars]


def _axes_by_dim(spec: Any) -> list[tuple[str, ...]]:
    """The axes of the mesh that split each dimension."""
    return [() if axes is None else axes if isinstance(axes, tuple) else (axes,) for axes in spec]


def _split(array: Array, spec: list[tuple[str, ...]], names: list[str], sizes: dict[str, int]) -> Array:
    """The pieces of an array, stacked along leading axes in the order of the mesh."""
    shape: list[int] = []
    places: dict[str, int] = {}
    for dim, size in enumerate(array.shape):
        axes = spec[dim] if dim < len(spec) else ()
        places |= {name: len(shape) + k for k, name in enumerate(axes)}
        shape += [*(sizes[name] for name in axes), size // math.prod(sizes[name] for name in axes)]
    front = [places[name] for name in names if name in places]
    others = [axis for axis in range(len(shape)) if axis not in front]
    return array.reshape(shape).transpose([*front, *others])


def _merged(array: Array, spec: list[tuple[str, ...]], names: list[str]) -> Array:
    """An array of its stacked pieces; where they are all the same, the first."""
    used = [name for name in names if any(name in axes for axes in spec)]
    array = array[tuple(slice(None) if name in used else 0 for name in names)]
    order, shape = [], []
    for dim in range(array.ndim - len(used)):
        axes = [used.index(name) for name in (spec[dim] if dim < len(spec) else ())]
        order += [*axes, len(used) + dim]
        shape.append(math.prod(array.shape[axis] for axis in order[-len(axes) - 1 :]))
    return array.transpose(order).reshape(shape)

"""Arrays spread over a mesh whose axes are Explicit, which is what `jax.make_mesh` makes.

There the type of an array says how it is spread, `float32[8@data,3]`, and JAX refuses a sum over a spread axis, a
gather along it and most reshapes unless it is told how the result shall lie. Elementwise work and plain sums need no
word. On one device, and where axes are Auto, each function here is the plain one, and the compiler places the result.
"""

import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
P = ParamSpec("P")
T = TypeVar("T")


def spread(leaf: Any) -> NamedSharding | None:
    """How an array lies on a mesh with Explicit axes; None for any other, and for numbers."""
    if leaf is None:
        return None
    sharding: NamedSharding = jax.typeof(leaf).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _lie(*trees: PyTree) -> NamedSharding | None:
    """How the first array lies that is on such a mesh."""
    return next(filter(None, map(spread, jax.tree.leaves(trees))), None)


def dot(a: PyTree, b: PyTree) -> Array:
    """The inner product of two pytrees, Σ a_i b_i."""
    if _lie(a, b) is None:
        return optax.tree.vdot(a, b)
    return optax.tree.sum(jax.tree.map(jnp.multiply, a, b))


def like(tree: PyTree, example: PyTree) -> PyTree:
    """The pytree, each leaf spread as that of the example."""

    def one(leaf: Any, example: Any) -> Any:
        sharding = spread(example)
        return leaf if sharding is None else jax.sharding.reshard(leaf, sharding)

    return jax.tree.map(one, tree, example)


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros, spread as the leaves, which `optax.tree.zeros_like` does not promise while it is traced."""
    return like(optax.tree.zeros_like(tree), tree)


def on_mesh(function: Callable[P, T]) -> Callable[P, T]:
    """The function with its new arrays on the mesh of its arguments, as `jax.set_mesh` has it: zeros like them."""

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        sharding = _lie(args)
        if sharding is None:
            return function(*args, **kwargs)

        def inside(*args: P.args, **kwargs: P.kwargs) -> T:
            with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
                return function(*args, **kwargs)

        return jax.jit(inside, keep_unused=True)(*args, **kwargs)

    return call


def laid(tree: PyTree, mesh: Mesh, specs: PyTree) -> PyTree:
    """The pytree, each leaf with a spec laid on a mesh with Explicit axes, where `jax.shard_map` asks for that."""
    if AxisType.Explicit not in mesh.axis_types:
        return tree

    def one(leaf: Any, spec: PartitionSpec) -> Any:
        return jax.sharding.reshard(leaf, NamedSharding(mesh, spec)) if tuple(spec) else whole(leaf)

    return jax.tree.map(one, tree, specs)


def whole(tree: PyTree) -> PyTree:
    """The pytree, each leaf whole on every device."""

    def one(leaf: Any) -> Any:
        sharding = spread(leaf)
        return leaf if sharding is None else jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, PartitionSpec()))

    return jax.tree.map(one, tree)


def ravel(tree: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """One vector of all leaves, whole on every device, and the way back to leaves that are spread as they were."""
    flat, unravel = ravel_pytree(whole(tree))
    return flat, lambda flat: like(unravel(flat), tree)


def bare(tree: PyTree) -> PyTree:
    """Zeros of the shapes and dtypes of the leaves, which lie nowhere: what is drawn like them may be put anywhere."""
    return jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.result_type(leaf)), tree)


def rows(leaf: Array, indices: Array) -> Array:
    """`leaf[indices]`, spread as the leaf, but whole along an axis of rows that the devices do not divide."""
    sharding = spread(leaf)
    if sharding is None:
        return leaf[indices]
    first, *others = sharding.spec or (None,)
    names = first if isinstance(first, tuple) else () if first is None else (first,)
    devices = math.prod(sharding.mesh.shape[name] for name in names)
    spec = PartitionSpec(None if len(indices) % devices else first, *others)
    return leaf.at[indices].get(out_sharding=NamedSharding(sharding.mesh, spec))


def entry(leaf: Array, index: Any) -> Array:
    """`leaf[index]`, spread as the leaf; beyond the end NaN, or the most negative number."""
    sharding = spread(leaf)
    out = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return leaf.at[index].get(mode="fill", out_sharding=out)


def by_compiler(function: Callable[P, T], example: PyTree = None) -> Callable[P, T]:
    """The function of arrays with Auto axes, for products of matrices and for what others have written.

    Its result is spread as the example, a prefix of it; whole on every device where that is a number or None.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        sharding = _lie(args)
        if sharding is None:
            return function(*args, **kwargs)
        out = _shardings(example, sharding)
        return jax.sharding.auto_axes(function, out_sharding=out)(*args, **kwargs)

    return call


def on_any_axes(function: Callable[P, T]) -> Callable[P, T]:
    """The function, and with Auto axes where JAX refuses it on Explicit ones: a loss that says no `out_sharding`."""

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if type(error).__name__ != "ShardingTypeError":  # whose class is no public part of JAX
                raise
            return by_compiler(function)(*args, **kwargs)

    return call


def as_spread(function: Callable[[T], PyTree], example: T) -> Callable[[T], PyTree]:
    """The function inside of `by_compiler`, of an argument that is spread as the example again: for a user's loss."""
    sharding = _lie(example)
    if sharding is None:
        return function
    return jax.sharding.explicit_axes(function, in_sharding=(_shardings(example, sharding),))


def _shardings(example: PyTree, sharding: NamedSharding) -> PyTree:
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: spread(leaf) or everywhere, example, is_leaf=lambda leaf: leaf is None)

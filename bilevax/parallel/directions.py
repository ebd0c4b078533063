"""The same hypergradient on many devices: each pushes its share of the random directions.

    make = lambda axis: bx.hypergradient(f, bx.inner.forward_gradient(g, optimizer, T, directions=256, axis=axis))
    hypergrad = bx.parallel.shard_directions(make, mesh)

Each device solves the inner problem, pushes b / devices tangents of it and adds up their part of the estimate; one sum
over the devices, of a vector like x, is all that travels. No device needs the tangents of another. For one key the
estimate is that of one device, up to the order of the sum.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from bilevax import checks
from bilevax.meshes import like, whole
from bilevax.parallel.agents import Axis
from bilevax.printing import as_called
from bilevax.problem import Batch, Hypergradient
from bilevax.typing import Key, PyTree

MakeHypergradient: TypeAlias = Callable[[Any], Hypergradient]
"""`make_hypergradient(axis) -> Hypergradient`, a function of yours; it gets the name of the axis, or several names."""


@as_called
def shard_directions(make_hypergradient: MakeHypergradient, mesh: Mesh) -> Hypergradient:
    """A hypergradient whose random directions are spread over the devices of a mesh, by `jax.shard_map`.

    It reads and returns the same pytrees as on one device, and every device works on whole ones. On several hosts call
    `jax.distributed.initialize()` first and run the same text on every one.

    Args:
      make_hypergradient: `make_hypergradient(axis) -> Hypergradient`, whose solver gets `axis=axis`:
        `inner.forward_gradient` or `inner.zeroth_order`. (Without it every device does all of the work.)
      mesh: a mesh with axes of any type, of a number of devices that divides the random directions.

    Returns:
      A `Hypergradient`, to jit.

    Raises:
      ValueError: if `make_hypergradient` returns no `Hypergradient`; from `estimate`, if
        the devices do not divide the random directions.

    Cost: on each device that of its share of the directions, and one run of the primal; one sum of a vector like x over
    the devices. Guides run on each of them.

    Reference: Shen et al., arXiv 2406.14095, section 3.3, on directions in parallel.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp, optax
        >>> loss, f = lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2), lambda x, y, batch: jnp.sum(y)
        >>> solver = lambda axis: bx.inner.forward_gradient(loss, optax.sgd(1.0), 1, directions=4, axis=axis)
        >>> make = lambda axis: bx.hypergradient(f, solver(axis))
        >>> hypergrad = bx.parallel.shard_directions(make, jax.sharding.Mesh(jax.devices()[:1], ("directions",)))
        >>> x, batch = jnp.zeros(1), bx.Batch(None, None)
        >>> jax.jit(hypergrad.estimate)(jax.random.key(0), hypergrad.init(x, x), x, batch)[0].tolist()
        [1.0]
    """
    checks.instance("mesh", mesh, Mesh, 'Pass jax.sharding.Mesh(jax.devices(), ("directions",)).')
    hypergrad = _made(make_hypergradient, mesh.axis_names[0] if len(mesh.axis_names) == 1 else mesh.axis_names)
    everywhere = PartitionSpec()
    # With check_vma=True a derivative at values that all devices share would be summed over them
    shard = partial(jax.shard_map, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)

    def estimate(key: Key | None, state: Any, x: PyTree, batch: Batch) -> tuple[PyTree, Any, Any]:
        """As on one device: (grad, state, info), with grad like x."""
        grad, after, info = shard(hypergrad.estimate)(key, *whole((state, x, batch)))
        return like(grad, x), like(after, state), info

    return Hypergradient(hypergrad.init, estimate)


@as_called
def pmap_directions(make_hypergradient: MakeHypergradient, devices: Sequence[jax.Device]) -> Hypergradient:
    """A hypergradient whose random directions are spread over the devices of one host, by `jax.pmap`.

    It reads and returns the same pytrees as on one device; `estimate` is compiled, and is not to be jitted again.

    Args:
      make_hypergradient: `make_hypergradient(axis) -> Hypergradient`; as in `shard_directions`.
      devices: devices of this host, such as `jax.local_devices()`, of a number that divides the random directions.

    Returns:
      A `Hypergradient`.

    Raises:
      ValueError: if `make_hypergradient` returns no `Hypergradient`; from `estimate`, if the devices do not divide the
        random directions.

    Cost: as in `shard_directions`; arguments are copied to the devices at each call.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp, optax
        >>> loss, f = lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2), lambda x, y, batch: jnp.sum(y)
        >>> solver = lambda axis: bx.inner.forward_gradient(loss, optax.sgd(1.0), 1, directions=4, axis=axis)
        >>> make = lambda axis: bx.hypergradient(f, solver(axis))
        >>> hypergrad = bx.parallel.pmap_directions(make, jax.devices()[:1])
        >>> x, batch = jnp.zeros(1), bx.Batch(None, None)
        >>> jax.jit(hypergrad.estimate)(jax.random.key(0), hypergrad.init(x, x), x, batch)[0].tolist()
        [1.0]
    """
    hypergrad = _made(make_hypergradient, "directions")
    here = np.arange(len(devices))  # pmap asks for an argument that is mapped
    run = jax.pmap(
        lambda _, *arguments: hypergrad.estimate(*arguments),
        "directions",
        in_axes=(0, None, None, None, None),
        out_axes=None,
        devices=devices,
    )
    return Hypergradient(hypergrad.init, partial(run, here))


def _made(make_hypergradient: MakeHypergradient, axis: Axis) -> Hypergradient:
    checks.function("make_hypergradient", make_hypergradient, "axis")
    hypergrad = make_hypergradient(axis)
    fix = "Return, say, bx.hypergradient(outer_loss, bx.inner.forward_gradient(..., axis=axis))."
    checks.instance("make_hypergradient(axis)", hypergrad, Hypergradient, fix)
    return hypergrad

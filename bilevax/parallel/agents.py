"""The same method on many devices and many hosts: each device holds n/devices of the n agents.

A method is written once, for a leading axis of agents and a `Gossip` (`make_algorithm(gossip) -> Algorithm`). Here it
gets a gossip whose agents live on different devices, and runs on them unchanged, to the same numbers: draws fold the
global ids of the agents into the key.

    one device           make_algorithm(bx.gossip(topology))
    devices of a mesh    shard_agents(make_algorithm, topology, mesh)      on one host or on many
    devices of one host  pmap_agents(make_algorithm, topology, devices)

What travels: a graph with few hops (ring, torus, hypercube, exponential, ...) sends the rows of boundary agents to the
device that needs them (`ppermute`), any other graph gathers the rows of all agents. Only a mean and a gossip cross the
devices; a branch that one device takes alone, such as the coin of its only agent, is free to differ.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bilevax import checks
from bilevax.agents import _gossip as gossips
from bilevax.agents import topology as graphs
from bilevax.meshes import laid
from bilevax.problem import Algorithm, Batch
from bilevax.single_loop._levels import Levels, levels
from bilevax.typing import Array, Key, PyTree

__all__ = ["join", "place", "pmap_agents", "shard_agents", "split"]


def __dir__() -> list[str]:
    return __all__


P = ParamSpec("P")
T = TypeVar("T")
Axis: TypeAlias = str | tuple[str, ...]  # of the devices; several together are one, the last the fastest
_ONE_MESH = 'Pass jax.sharding.Mesh(jax.devices(), ("agents",)).'


Graphs: TypeAlias = gossips.Topologies | Levels[gossips.Topologies]
"""A topology, a sequence of them taken in turn, or one of these for each level."""

Gossips: TypeAlias = gossips.Gossip | Levels[gossips.Gossip]
"""What becomes of them: a gossip, or one for each level."""

MakeAlgorithm: TypeAlias = Callable[[Any], Algorithm]
"""`make_algorithm(gossip) -> Algorithm`, a function of yours; it gets `Levels` of gossips for `Levels` of graphs."""


class Check(Protocol):
    """Raises ValueError unless the leaves of what a user passes in are laid out as the devices ask."""

    def __call__(self, name: str, tree: PyTree) -> None: ...


def shard_agents(make_algorithm: MakeAlgorithm, topology: Graphs, mesh: Mesh) -> Algorithm:
    """A method with its agents spread over the devices of a mesh, by `jax.shard_map`.

    It reads and returns the same pytrees as on one device. Leaves [n, ...] are sharded along their first axis and stay
    so, scalars (counters, a key) are the same on all devices: `place` puts data there beforehand. `jax.jit` and
    `jax.lax.scan` over `step` work as usual.

    On several hosts call `jax.distributed.initialize()` first, build the mesh of all `jax.devices()`, `place` the data,
    and run the same text on every host; pass placed data into a jitted function as an argument.

    Args:
      make_algorithm: `make_algorithm(gossip) -> Algorithm`, any method, such as
        `lambda gossip: bx.decentralized.sldbo(problem, gossip, step_sizes)`. What it returns must be [n, ...], agents
        first, or a scalar that every device computes alike (from counters, keys, `gossip.mean`), which is not checked.
      topology: a `Topology`, a sequence of them taken in turn, or `Levels` of these: `make_algorithm` gets `Levels` of
        gossips then. A directed graph is mixed by push-sum.
      mesh: a mesh with axes of any type, of a number of devices that divides n; several axes are taken together, the
        last one the fastest.

    Returns:
      `Algorithm(init, step)`, both jitted.

    Raises:
      ValueError: if the size of the mesh does not divide n, if `make_algorithm` does
        not take a gossip and return an `Algorithm`; as `bx.gossip`; from `init` and `step`, if a leaf has other rows.

    Cost: that of the method for n/devices agents on each device; the program is traced twice.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("agents",))
        >>> method = bx.parallel.shard_agents(
        ...     lambda gossip: bx.decentralized.sldbo(problem, gossip, (0.1, 0.2, 0.2)), bx.topology.ring(4), mesh
        ... )
        >>> x, y, batch = bx.parallel.place((jnp.zeros(4), jnp.zeros(4), bx.Batch(jnp.ones(4), jnp.ones(4))), mesh)
        >>> method.init(x, y).x.sharding.spec[0]
        'agents'
    """
    axis = _axis(mesh)
    algorithm, n = _spread(make_algorithm, topology, axis, mesh.size)

    def specs(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: PartitionSpec(axis) if jnp.ndim(leaf) else PartitionSpec(), tree)

    def run(function: Callable[..., PyTree], in_specs: tuple[PyTree, ...], *arguments: PyTree) -> PyTree:
        # The output specs need the ranks of the outputs: a shape run that calls all of them replicated finds what one
        # device holds, for n = 8 on 4 devices leaves [2, 3] and scalars [], and specs makes [8, 3] and [] of them.
        # With check_vma=True a derivative at a constant of the method's own would be summed over the devices
        arguments = laid(arguments, mesh, in_specs)
        shard = partial(jax.shard_map, function, mesh=mesh, in_specs=in_specs, check_vma=False)
        held = jax.eval_shape(shard(out_specs=PartitionSpec()), *arguments)
        return shard(out_specs=specs(held))(*arguments)

    @jax.jit
    def init(x: PyTree, y: PyTree, batch: Batch | None) -> Any:
        return run(algorithm.init, specs((x, y, batch)), x, y, batch)

    @jax.jit
    def step(key: Key | None, state: Any, batch: Batch) -> tuple[Any, Any]:
        return run(
            algorithm.step, (jax.tree.map(lambda leaf: PartitionSpec(), key), *specs((state, batch))), key, state, batch
        )

    def check(name: str, tree: PyTree) -> None:
        checks.agents_axis(name, tree, n, f"Pass the rows of all agents: {mesh.size} devices share them.")

    return _checked(init, step, check)


def pmap_agents(make_algorithm: MakeAlgorithm, topology: Graphs, devices: Sequence[jax.Device]) -> Algorithm:
    """A method with its agents spread over the devices of one host, by `jax.pmap`.

    Its pytrees have the axis of the devices first: leaves [devices, n/devices, ...], and [devices] in place of scalars.
    `split` makes them out of leaves [n, ...], `join` puts them together again. The key is one for all.

    Args:
      make_algorithm: `make_algorithm(gossip) -> Algorithm`, any method; as in `shard_agents`.
      topology: a `Topology`, a sequence of them, or `Levels` of these; as in `shard_agents`.
      devices: devices of this host, such as `jax.local_devices()`, of a number that divides n.

    Returns:
      `Algorithm(init, step)`, both parallel maps: `init(x, y, batch=None)` and `step(key, state, batch)`.

    Raises:
      ValueError: if `devices` are none, not of this host, or do not divide n, if `make_algorithm` does not take a
        gossip and return an `Algorithm`; as `bx.gossip`; from `init` and `step`, if a leaf is not split.

    Cost: that of the method for n/devices agents on each device.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> make = lambda gossip: bx.decentralized.sldbo(problem, gossip, (0.1, 0.2, 0.2))
        >>> method = bx.parallel.pmap_agents(make, bx.topology.ring(4), jax.devices()[:1])
        >>> method.init(*bx.parallel.split((jnp.zeros(4), jnp.zeros(4)), 1)).x.shape
        (1, 4)
    """
    here = [device for device in devices if device in jax.local_devices()] if isinstance(devices, Sequence) else []
    if not here or len(here) < len(devices):
        raise ValueError(
            f"devices must be a list of devices of this host; got {devices!r:.80}. Pass jax.local_devices(), or take "
            f"bx.parallel.shard_agents for several hosts."
        )
    algorithm, n = _spread(make_algorithm, topology, "agents", len(devices))
    first = len(devices), n // len(devices)

    def check(name: str, tree: PyTree) -> None:
        fix = f"Pass bx.parallel.split({name}, {first[0]})."
        _check_shapes(name, tree, f"[{first[0]}, {first[1]}, ...]", lambda shape: shape[:2] == first, fix)

    init = jax.pmap(algorithm.init, "agents", devices=devices)
    step = jax.pmap(algorithm.step, "agents", in_axes=(None, 0, 0), devices=devices)
    return _checked(init, step, check)


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts the rows of each agent on the device that holds it; scalars on all devices.

    On several hosts every process passes a tree of all n rows, and reads those of its own devices alone: a leaf may be
    a `numpy.memmap` of a file larger than the memory. (If a process has its own rows only, take
    `jax.make_array_from_process_local_data`.)

    Args:
      tree: a pytree of arrays [n, ...] and scalars: x, y, a batch, a state.
      mesh: the mesh of `shard_agents`.

    Returns:
      The pytree with leaves sharded over the axes of the mesh.

    Raises:
      ValueError: if the size of the mesh does not divide the rows of a leaf.

    Cost: one copy of each row.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> bx.parallel.place(jnp.zeros((4, 2)), jax.sharding.Mesh(jax.devices()[:1], ("agents",))).sharding.spec[0]
        'agents'
    """
    axis = _axis(mesh)
    _check_rows(tree, mesh.size)

    def put(leaf: Any) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec(axis) if jnp.ndim(leaf) else PartitionSpec())
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        dtype = jnp.result_type(leaf)
        return jax.make_array_from_callback(
            jnp.shape(leaf), sharding, lambda rows: np.asarray(leaf[rows] if rows else leaf, dtype)
        )

    return jax.tree.map(put, tree)


def split(tree: PyTree, devices: int) -> PyTree:
    """Gives `pmap_agents` its layout: leaves [n, ...] become [devices, n/devices, ...], scalars [devices].

    Args:
      tree: a pytree of arrays [n, ...] and scalars: x, y, a batch, a state.
      devices: the number of devices, a divisor of n.

    Returns:
      The pytree with the axis of the devices first.

    Raises:
      ValueError: if `devices` < 1, or if it does not divide the rows of a leaf.

    Cost: one copy of each leaf.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.parallel.split(jnp.zeros((8, 3)), 4).shape
        (4, 2, 3)
    """
    devices = checks.count("devices", devices, minimum=1)
    _check_rows(tree, devices)

    def one(leaf: Any) -> jax.Array:
        if jnp.ndim(leaf) == 0:
            return jnp.broadcast_to(leaf, (devices,))
        return jnp.reshape(leaf, (devices, -1, *jnp.shape(leaf)[1:]))

    return jax.tree.map(one, tree)


def join(tree: PyTree) -> PyTree:
    """Undoes `split`: leaves [devices, n/devices, ...] become [n, ...], [devices] the scalar of the first device.

    Args:
      tree: a pytree as `pmap_agents` returns it.

    Returns:
      The pytree as on one device.

    Raises:
      ValueError: if a leaf has no axis of the devices.

    Cost: one copy of each leaf.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.parallel.join(jnp.zeros((4, 2, 3))).shape
        (8, 3)
    """
    _check_shapes("tree", tree, "[devices, ...]", bool, "Pass what a method of bx.parallel.pmap_agents returned.")
    return jax.tree.map(lambda leaf: leaf[0] if leaf.ndim == 1 else leaf.reshape(-1, *leaf.shape[2:]), tree)


def _spread(make_algorithm: MakeAlgorithm, topology: Graphs, axis: Axis, devices: int) -> tuple[Algorithm, int]:
    """The method over a gossip whose agents are spread along a named axis, and their number."""
    checks.function("make_algorithm", make_algorithm, "gossip")
    gossip = gossip_along(topology, axis, devices)
    algorithm = make_algorithm(gossip)
    fix = "Return, say, bx.decentralized.sldbo(problem, gossip, step_sizes)."
    checks.instance("make_algorithm(gossip)", algorithm, Algorithm, fix)
    n = levels("gossip", gossip).x.n
    form, fix = f"[{n // devices}, ...] or scalars", "Put the agents held here first, or leave it out."

    def per_agent(function: Callable[P, T]) -> Callable[P, T]:
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            result = function(*args, **kwargs)
            _check_shapes("result", result, form, lambda shape: shape[:1] in ((), (n // devices,)), fix)
            return result

        return call

    return Algorithm(per_agent(algorithm.init), per_agent(algorithm.step)), n


def _checked(
    init: Callable[[PyTree, PyTree, Batch | None], Any],
    step: Callable[[Key | None, Any, Batch], tuple[Any, Any]],
    check: Check,
) -> Algorithm:
    """The method behind a check of what the user passes in."""

    def checked_init(x: PyTree, y: PyTree, batch: Batch | None = None) -> Any:
        for name, tree in (("x", x), ("y", y), ("batch", batch)):
            check(name, tree)
        return init(x, y, batch)

    def checked_step(key: Key | None, state: Any, batch: Batch) -> tuple[Any, Any]:
        check("batch", batch)
        return step(key, state, batch)

    return Algorithm(checked_init, checked_step)


def gossip_along(topology: Graphs, axis: Axis, devices: int) -> Gossips:
    """A gossip (of each level) for each device of a named axis, which holds n/devices consecutive agents."""
    if isinstance(topology, Levels):
        return Levels(*(_along(one, axis, devices) for one in topology))
    return _along(topology, axis, devices)


def _along(topology: gossips.Topologies, axis: Axis, devices: int) -> gossips.Gossip:
    graphs.check(topology)
    sequence = (topology,) if isinstance(topology, graphs.Topology) else tuple(topology)
    if sequence[0].n % devices:
        raise ValueError(
            f"topology must have a number of agents that the devices divide; got {sequence[0].n} agents and {devices} "
            f"devices. Take {np.gcd(sequence[0].n, devices)} of the devices, or other agents."
        )

    def mean(tree: PyTree) -> PyTree:
        return jax.lax.pmean(jax.tree.map(lambda leaf: jnp.mean(leaf, 0), tree), axis)

    plain = gossips.assemble(topology, partial(_form, axis, devices), lambda n: _held(axis, n // devices), mean)
    return gossips.with_push_sum(plain) if any(one.directed for one in sequence) else plain


def _form(axis: Axis, devices: int, topology: graphs.Topology) -> gossips.Form:
    """Shifts between devices for a graph with few hops, the local rows of W otherwise."""
    if devices == 1:
        return gossips.by_structure(topology)
    if _shifts_pay(devices, topology):
        return _shifts(axis, devices, topology)
    gather = partial(jax.lax.all_gather, axis_name=axis, tiled=True)
    return gossips.by_rows(topology, gossips.HeldRows(devices, lambda: jax.lax.axis_index(axis), gather))


def _shifts_pay(devices: int, topology: graphs.Topology) -> bool:
    """Whether shifts move fewer rows than gathering them all, in a number of permutes of the order of the devices."""
    # ring(8) on 4 devices, 2 agents each: hop 1 is far 0, cut 1, the second agent hears the first one of the next
    # device (`beyond`), 4 messages of 1 row; hop 7 is far 3, cut 1, the first one hears the second one of the device
    # before, 4 more. 8 rows in 2 permutes; gathering would move 4 · 6 = 24. star(8) has 12 messages with 18 rows, but
    # in 9 permutes, more than 2 · 4: it gathers.
    local = topology.n // devices
    receivers, senders = topology.matrix.nonzero()
    hops = (senders.astype(np.int64) - receivers) % topology.n
    far, cut = np.divmod(hops, local)
    beyond = receivers % local >= local - cut  # in the part that comes from one device more
    edges = np.flatnonzero((far + beyond) % devices)
    messages, first = np.unique(((2 * hops + beyond) * devices + receivers // local)[edges], return_index=True)
    rows = np.where(beyond, cut, local - cut)[edges[first]].sum()
    permutes = np.unique(messages // devices).size
    return bool(rows < devices * (topology.n - local) and permutes <= 2 * devices)


def _shifts(axis: Axis, devices: int, topology: graphs.Topology) -> gossips.Form:
    """A hop of far · local + cut brings the rows from `cut` on from `far` devices on, those before it from one more."""
    # 8 agents on 4 devices, leaves [2, 3] there. Hop 3 is far 1, cut 1: device 0, with the agents 0 and 1, needs 3 and
    # 4, row 1 of device 1 and row 0 of device 2, [1, 3] and [1, 3] -> [2, 3]. Hop 2 is far 1, cut 0: all of device 1.
    local, hops = topology.n // devices, gossips.hop_weights(topology)

    def receive(rows: Array, far: int, weights: np.ndarray) -> Array:
        """The rows of the device `far` places on, for the devices that give them weight [devices, rows]."""
        if far % devices == 0:
            return rows
        pairs = [((device + far) % devices, device) for device in range(devices) if weights[device].any()]
        return jax.lax.ppermute(rows, axis, pairs) if pairs else jnp.zeros_like(rows)

    def shift(leaf: Array, hop: int) -> Array:
        (far, cut), weights = divmod(hop, local), hops[hop].reshape(devices, local)
        near = receive(leaf[cut:], far, weights[:, : local - cut])
        return jnp.concatenate([near, receive(leaf[:cut], far + 1, weights[:, local - cut :])]) if cut else near

    return gossips.shifted(hops, shift, partial(_held, axis, local))


def _held(axis: Axis, local: int) -> Array:
    return jax.lax.axis_index(axis) * local + jnp.arange(local, dtype=jnp.int32)


def _axis(mesh: Mesh) -> Axis:
    """The axes of the mesh, along which the agents lie one after the other: its name where there is one."""
    checks.instance("mesh", mesh, Mesh, _ONE_MESH)
    return mesh.axis_names[0] if len(mesh.axis_names) == 1 else mesh.axis_names


def _check_rows(tree: PyTree, devices: int) -> None:
    form = f"[n, ...], n a multiple of {devices} devices, or scalars"
    fix = "Give each agent its row (bx.replicate), or take fewer devices."
    _check_shapes("tree", tree, form, lambda shape: not shape or shape[0] % devices == 0, fix)


def _check_shapes(name: str, tree: PyTree, form: str, fits: Callable[[tuple[int, ...]], bool], fix: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not fits(jnp.shape(leaf)):
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name} must have leaves {form}; got shape {jnp.shape(leaf)} at {where}. {fix}")

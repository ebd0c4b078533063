"""Where the agents live: on one device, on several by shard_map or pmap, or on those of several hosts."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import bilevax as bx
from benchmarks.harness.errors import DataError
from bilevax import parallel

ADVICE = "Start the same command again on all hosts, as many or fewer: with --checkpoint it goes on where it was."


class Placed(NamedTuple):
    """A method on its devices.

    Attributes:
      method: `init(x, y, batch)` and `step(key, state, batch)` on placed arrays.
      put: `put(tree) -> tree` places leaves [n, ...].
      join: `join(tree) -> tree` gives them their leaves [n, ...] back, inside a trace too.
    """

    method: bx.problem.Algorithm
    put: Callable[[Any], Any]
    join: Callable[[Any], Any]


def gossip(topology: Any) -> Any:
    """A gossip, or `Levels` of them."""
    return bx.Levels(*map(bx.gossip, topology)) if isinstance(topology, bx.Levels) else bx.gossip(topology)


def place(make: Callable[[Any], bx.problem.Algorithm], topology: Any, devices: int, by: str) -> Placed:
    """Places a method.

    Args:
      make: builds it on a gossip, or on `Levels` of them.
      topology: of the agents, or `Levels` of them.
      devices: how many.
      by: "shard_map" or "pmap".

    Returns:
      The method, and how arrays come and go.
    """
    chosen = jax.devices()[:devices]
    if devices == 1:
        return Placed(make(gossip(topology)), jax.device_put, lambda tree: tree)
    if by == "pmap":
        put = lambda tree: parallel.split(tree, devices)  # noqa: E731
        return Placed(parallel.pmap_agents(make, topology, chosen), put, parallel.join)
    mesh = jax.sharding.Mesh(np.array(chosen), ("agents",))
    method = parallel.shard_agents(make, topology, mesh)
    return Placed(method, lambda tree: parallel.place(tree, mesh), lambda tree: tree)


def start_devices(devices: int) -> int:
    """Sees to it that there are so many devices, virtual ones on a CPU."""
    if devices > 1:
        with contextlib.suppress(RuntimeError):  # JAX has started: the count below says whether it has enough
            jax.config.update("jax_num_cpu_devices", devices)
    if len(jax.devices()) < devices:
        raise DataError(
            f"--devices {devices} needs as many devices; JAX has {len(jax.devices())}. Pass fewer, or on a CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={devices}."
        )
    return devices


def join_hosts(coordinator: str | None, processes: int | None, process: int | None) -> int:
    """Joins the other hosts, and returns the number of devices of all of them."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of no effect on other devices
    jax.config.update("jax_enable_preemption_service", False)  # which would swallow SIGTERM
    parallel.initialize(coordinator, processes, process, advice=ADVICE)
    return len(jax.devices())


def fetch(tree: Any) -> Any:
    """NumPy arrays of what may live on several hosts."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)

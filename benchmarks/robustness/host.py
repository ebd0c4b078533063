"""One process of the job hosts: `python -m benchmarks.robustness.host FOLDER ITERATIONS TIMEOUT [ADDRESS N PROCESS]`.

Two decentralized methods whose agents lie on the devices of all processes, saved from time to time; a line for each
iteration.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import bilevax as bx
from bilevax.typing import Key

AGENTS, EVERY = 8, 10
KEY = 5


def quadratic() -> Any:
    """The problem of the agents, from a module whose import starts JAX: not before the processes have joined."""
    from bilevax.testing import problems

    return problems.quadratic(0, AGENTS)


def methods() -> dict[str, tuple[Any, Callable[[Any], bx.problem.Algorithm]]]:
    """Name -> a graph, and what makes the method: neighbours send to each other, or all rows are gathered."""
    problem = quadratic().problem
    return {
        "sldbo": (bx.topology.ring(AGENTS), lambda gossip: bx.decentralized.sldbo(problem, gossip, (0.05, 0.1, 0.1))),
        "s3ldbo": (
            bx.topology.erdos_renyi(AGENTS, probability=0.4, seed=1),
            lambda gossip: bx.decentralized.s3ldbo(problem, gossip, (0.05, 0.1, 0.1), coins=bx.coins.independent(0.5)),
        ),
    }


def first() -> tuple[Any, Any, bx.Batch]:
    """x, y and the batch of the agents."""
    return np.zeros((AGENTS, 2)), np.zeros((AGENTS, 3)), quadratic().batch


def key(k: int) -> Key:
    """Of iteration k."""
    return jax.random.fold_in(jax.random.key(KEY), k)


def main(folder: str, iterations: str, timeout: str, *cluster: str) -> int:
    """Starts or resumes the run, and saves the last state."""
    if cluster:
        address, processes, process = cluster
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        bx.parallel.initialize(address, int(processes), int(process), timeout=float(timeout))
    mesh = jax.sharding.Mesh(jax.devices(), ("agents",))
    x, y, batch = bx.parallel.place(first(), mesh)
    spread = {name: bx.parallel.shard_agents(make, graph, mesh) for name, (graph, make) in methods().items()}
    states = {name: method.init(x, y, batch) for name, method in spread.items()}
    start = 0
    if bx.checkpoint.latest(folder) is not None:
        start, states = bx.checkpoint.restore(folder, states)
    for k in range(start, int(iterations)):
        states = {name: method.step(key(k), states[name], batch)[0] for name, method in spread.items()}
        print(f"at {k}", flush=True)
        if (k + 1) % EVERY == 0:
            bx.checkpoint.save(folder, k + 1, states)
    bx.checkpoint.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

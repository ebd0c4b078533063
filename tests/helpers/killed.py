"""`killed.py folder steps every [port process processes]`: two loops that are saved and resumed.

It prints a line for each iteration, and on the last one a checksum of all that was ever computed, as JSON.
"""

import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

import bilevax as bx

N = 8
CONFIG = {"rates": [0.1, 0.05], "agents": N}


def inner_loss(x, y, batch):
    a, b = batch
    return jnp.mean((a @ y - b) ** 2) + jnp.sum(jnp.exp(x) * y**2)


def outer_loss(x, y, batch):
    a, b = batch
    return jnp.mean((jnp.tanh(a @ y) - b) ** 2)


def data(seed, *shape):
    numbers = np.random.default_rng(seed)
    part = lambda: (numbers.normal(size=(*shape, 6, 3)), numbers.normal(size=(*shape, 6)))  # noqa: E731
    return bx.Batch(part(), part())


def loops(mesh):
    """Of one hypergradient, and of agents on the devices of all processes: `start() -> carry`, `step(carry, k)`."""
    key, few = jax.random.key(7), bx.sampling.minibatch(3)
    solver = bx.inner.implicit(inner_loss, optax.adam(0.1), 3, ihvp=bx.ihvp.cg(maxiter=3), sample=few)
    hypergrad, outer = bx.hypergradient(outer_loss, solver), optax.adam(0.05)
    batch, shared = data(0), bx.parallel.place(data(1, N), mesh)
    coins = bx.coins.subset(0.5, block=2)
    problem = bx.BilevelProblem(outer_loss, inner_loss)
    make = lambda gossip: bx.decentralized.s3ldbo(problem, gossip, 0.05, coins=coins)  # noqa: E731
    method = bx.parallel.shard_agents(make, bx.topology.ring(N), mesh)

    def start():
        x, y = jnp.zeros(3), jnp.ones(3)
        own = (x, hypergrad.init(x, y, batch), outer.init(x))
        points = bx.parallel.place((np.zeros((N, 3)), np.ones((N, 3))), mesh)
        return own, method.init(*points, shared)

    @jax.jit
    def single(own, k):
        x, state, outer_state = own
        grad, state, _ = hypergrad.estimate(jax.random.fold_in(key, k), state, x, batch)
        updates, outer_state = outer.update(grad, outer_state)
        return optax.apply_updates(x, updates), state, outer_state

    def step(carry, k):
        own, agents = carry
        return single(own, k), method.step(jax.random.fold_in(key, k), agents, shared)[0]

    return start, step


def everything(tree):
    """As NumPy has it, of all processes."""
    whole = lambda leaf: multihost_utils.process_allgather(leaf, tiled=True)  # noqa: E731
    return [
        np.asarray(leaf if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable else whole(leaf))
        for leaf in jax.tree.leaves(tree)
    ]


def main(folder, steps, every, port=None, process=0, processes=1):
    steps, every = int(steps), int(every)
    if port is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        bx.parallel.initialize(f"localhost:{port}", int(processes), int(process), timeout=60.0)
    start, step = loops(jax.sharding.Mesh(jax.devices(), ("agents",)))
    state = {"carry": start(), "path": np.zeros((steps, 3))}
    first = 0
    if bx.checkpoint.latest(folder) is not None:
        first, state = bx.checkpoint.restore(folder, state, CONFIG)
    for k in range(first, steps):
        print(f"at {k}", flush=True)
        state["carry"] = step(state["carry"], k)
        state["path"][k] = state["carry"][0][0]
        if (k + 1) % every == 0 or k + 1 == steps:
            bx.checkpoint.save(folder, k + 1, state, CONFIG)
    bx.checkpoint.wait()
    found = everything(state)
    checksum = hashlib.sha256(b"".join(leaf.tobytes() for leaf in found)).hexdigest()
    print(json.dumps({"bits": checksum, "first": first, "mean": float(sum(np.abs(leaf).sum() for leaf in found))}))


if __name__ == "__main__":
    main(*sys.argv[1:])

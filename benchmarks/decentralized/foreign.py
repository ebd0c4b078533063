"""Rows of a plugin: algorithms of the user's own, whose cost is read off their first iterations."""

import jax
import jax.numpy as jnp

import bilevax as bx
from benchmarks.decentralized.methods import Row
from benchmarks.decentralized.network import Network
from benchmarks.decentralized.placement import gossip
from benchmarks.harness.plugin import Function

ITERATIONS = 10  # whose derivative evaluations are counted


def foreign(function: Function, network: Network, topologies: bx.Levels, size: int) -> Row:
    """The row of a function of a plugin; one that asks for a sampler gets minibatches of this size."""

    def make(network: Network, gossip: bx.Gossip, steps: bx.Levels) -> bx.Algorithm:
        return function.algorithm(network.problem, gossip, steps, sample=network.sample(size))

    graphs = topologies.x if topologies.x is topologies.y else topologies
    calls = counted(make(network, gossip(graphs), bx.Levels(0.0, 0.0, 0.0)), network)
    return Row(function.name, make, lambda network: calls, size if function.samples else None)


def counted(method: bx.Algorithm, network: Network) -> bx.Calls:
    """The most derivative evaluations of an agent, on average over them, in one of the first iterations."""

    @jax.jit
    def most(x: jax.Array, y: jax.Array, batch: bx.Batch) -> bx.Calls:
        def step(state: object, _: None) -> tuple:
            state, info = method.step(jax.random.key(0), state, batch)
            return state, bx.Calls(*(jnp.mean(jnp.asarray(number, float)) for number in info.calls))

        return jax.tree.map(jnp.max, jax.lax.scan(step, method.init(x, y, batch), length=ITERATIONS)[1])

    return bx.Calls(*map(float, most(*network.start, network.batch)))

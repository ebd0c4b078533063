"""Rows of a plugin: algorithms of the user's own, whose cost is read off their first iterations."""

import jax
import jax.numpy as jnp

import bilevax as bx
from benchmarks.decentralized.methods import Row
from benchmarks.decentralized.network import Network
from benchmarks.decentralized.placement import gossip
from benchmarks.harness.errors import DataError
from benchmarks.harness.plugin import Function

ITERATIONS = 10  # whose derivative evaluations are counted


def foreign(function: Function, network: Network, topologies: bx.Levels, size: int) -> Row:
    """The row of a function of a plugin; one that asks for a sampler gets minibatches of this size."""

    def make(network: Network, gossip: bx.agents.Gossip, steps: bx.Levels) -> bx.problem.Algorithm:
        return function.algorithm(network.problem, gossip, steps, sample=network.sample(size))

    graphs = topologies.x if topologies.x is topologies.y else topologies
    method = make(network, gossip(graphs), bx.Levels(0.0, 0.0, 0.0))
    calls = most_calls(function, method, network)
    return Row(function.name, make, lambda network: calls, size if function.samples else None)


def most_calls(function: Function, method: bx.problem.Algorithm, network: Network) -> bx.problem.Calls:
    """The most derivative evaluations of an agent in one of the first iterations; of a coin, where it says yes.

    Raises:
      DataError: if the method that the function made cannot be traced, or evaluates no derivative.
    """

    def most(x: jax.Array, y: jax.Array, batch: bx.Batch) -> bx.problem.Calls:
        def step(state: object, key: jax.Array) -> tuple:
            state, info = method.step(key, state, batch)
            return state, bx.problem.Calls(*(jnp.max(jnp.asarray(number, float)) for number in info.calls))

        keys = jax.random.split(jax.random.key(0), ITERATIONS)
        return jax.tree.map(jnp.max, jax.lax.scan(step, method.init(x, y, batch), keys)[1])

    arguments = (*network.start, network.batch)
    function.traced(most, *arguments)
    calls = bx.problem.Calls(*map(float, jax.jit(most)(*arguments)))
    if not any(calls):
        raise DataError(
            f"{function.kind}['{function.name}'] in {function.file} must evaluate derivatives in one of the first "
            f"{ITERATIONS} iterations, by whose info.calls its cost is known; got none of any agent. Count them there, "
            f"or toss coins that are likelier."
        )
    return calls

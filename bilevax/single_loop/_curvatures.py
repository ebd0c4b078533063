"""The largest curvature of the mean inner loss, and of the agents' own, by power iterations through gossip."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax.agents._gossip import Gossip, per_agent
from bilevax.problem import Batch, BilevelProblem, Calls, inner_gradient, norm
from bilevax.sampling import fold
from bilevax.single_loop._averaging import Average
from bilevax.typing import Array, Key, PyTree, Scalar

PRODUCTS = 10  # power iterations
SLOWER = 4.0  # so many iterations more between two refreshes of an agent halve the steps of y and v
SHARPNESS = 8  # the power of a mean that stands for a maximum over the agents


class Averages(NamedTuple):
    """Of vectors, whose errors later ones correct, and of the numbers that agents decide by."""

    rough: Average
    fine: Average


class Spent(NamedTuple):
    """So far: of each agent [n], and rounds; iterations, and ∇f of an agent in them, at most one in each."""

    calls: Calls
    bytes: Array
    rounds: Array
    iterations: Array
    refreshes: Array

    def sent(self, size: Array, rounds: Scalar) -> "Spent":
        """With a message more."""
        return self._replace(bytes=self.bytes + size, rounds=self.rounds + rounds)

    def with_calls(self, calls: Calls) -> "Spent":
        """With these evaluations more."""
        return self._replace(calls=jax.tree.map(lambda past, now: past + now, self.calls, Calls(*calls)))

    def with_iteration(self, info: Any, gossip: Gossip) -> "Spent":
        """With an iteration of a method more."""
        refreshed = jnp.minimum(1.0, gossip.mean(jnp.asarray(info.calls.outer_gradients, float)))
        later = self.with_calls(info.calls).sent(info.bytes, info.rounds)
        return later._replace(iterations=self.iterations + 1, refreshes=self.refreshes + refreshed)

    def pace(self) -> Array:
        """What waits of T iterations between two refreshes of an agent leave of a step: 4 / (3 + T)."""
        between = self.iterations / jnp.maximum(self.refreshes, 1.0)
        return SLOWER / (SLOWER - 1 + jnp.maximum(between, 1.0))


class Curvatures(NamedTuple):
    """The largest eigenvalue of the mean of the agents' Hessians, and the largest of any agent's own."""

    mean: Array
    largest: Array


def curvatures(
    key: Key,
    problem: BilevelProblem,
    gossip: Gossip,
    averages: Averages,
    x: PyTree,
    y: PyTree,
    batch: Batch,
) -> tuple[Curvatures, Spent]:
    """Both by power iterations from one random vector.

        p_i = H_i u_i,      t ← W̃ (t + p − p_last),      u_i = t_i / ‖t_i‖

    mean t = mean p at every step, as in gradient tracking; for the agents' own t_i = p_i. The maximum over the agents
    is the mean of 8th powers times n, which is too large by n^(1/8) at most.

    Returns:
      The same numbers for all agents, and what was spent.
    """
    agents = gossip.agents()

    def gradients(y: PyTree) -> PyTree:
        return jax.vmap(lambda x, y, data: inner_gradient(problem.inner_loss, x, y, data).gradient)(x, y, batch.inner)

    _, products = jax.vjp(gradients, y)

    def normed(t: PyTree) -> tuple[PyTree, Array]:
        lengths = jax.vmap(norm)(t)
        safe = jnp.maximum(lengths, float(jnp.finfo(jnp.float32).tiny))
        return per_agent(lambda size, leaf: leaf / size, safe, t), lengths

    def iterate(carry: tuple[PyTree, PyTree, PyTree, PyTree], number: Array) -> tuple[Any, tuple[Array, Array, Array]]:
        u, t, last, mine = carry
        (p,), (alone,) = products(u), products(mine)
        t, sent = averages.rough.apply(fold(key, number), optax.tree.add(t, optax.tree.sub(p, last)))
        (u, lengths), (mine, own) = normed(t), normed(alone)
        return (u, t, p, mine), (lengths, own, sent)

    zeros = optax.tree.zeros_like(y)
    one = optax.tree.random_like(key, jax.tree.map(lambda leaf: leaf[0], y), sampler=jax.random.normal)
    start, _ = normed(jax.tree.map(lambda leaf, all: jnp.broadcast_to(leaf, all.shape), one, y))
    _, (lengths, own, sent) = jax.lax.scan(iterate, (start, zeros, zeros, start), jnp.arange(PRODUCTS))
    none, ones = jnp.zeros(agents.shape), jnp.ones(agents.shape)
    rounds = jnp.asarray(PRODUCTS * averages.rough.rounds)
    spent = Spent(Calls(none, ones, 2 * PRODUCTS * ones, none), sent.sum(0), rounds, jnp.zeros(()), jnp.zeros(()))
    (mean, mine), size = averages.fine.apply(key, (lengths[-1], own[-1]))
    mean, mine, spent = gossip.mean(mean), gossip.mean(mine), spent.sent(size, averages.fine.rounds)
    powers, size = averages.fine.apply(key, (own[-1] / mine) ** SHARPNESS)
    largest = mine * (gossip.n * gossip.mean(powers)) ** (1 / SHARPNESS)
    return Curvatures(mean, largest), spent.sent(size, averages.fine.rounds)

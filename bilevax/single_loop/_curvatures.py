"""The largest curvature of the mean inner loss by power iterations through gossip, and what a search has spent."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

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
    """So far: of each agent [n], and rounds; iterations, and ∇f of an agent in them, at most one in each.

    Beside iterations there are the power iterations, and directions that were evaluated for their slopes alone.
    """

    calls: Calls
    bytes: Array
    rounds: Array
    iterations: Array
    refreshes: Array
    slopes: Array

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

    def iterate(carry: tuple[PyTree, PyTree, PyTree], number: Array) -> tuple[Any, tuple[Array, Array]]:
        both, t, last = carry  # u of the mean and of each agent, leaves [2, n, ...]
        (both,) = jax.vmap(products)(both)
        p, alone = (jax.tree.map(lambda leaf, place=place: leaf[place], both) for place in range(2))
        t, sent = averages.rough.apply(fold(key, number), optax.tree.add(t, optax.tree.sub(p, last)))
        both, lengths = jax.vmap(normed)(jax.tree.map(lambda *pair: jnp.stack(pair), t, alone))
        return (both, t, p), (lengths, sent)

    zeros = optax.tree.zeros_like(y)
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], y))
    one = unravel(jax.random.rademacher(key, flat.shape, flat.dtype))  # one draw, which compiles fast
    start = jax.tree.map(lambda leaf, all: jnp.broadcast_to(leaf, (2, *all.shape)), one, y)
    start, _ = jax.vmap(normed)(start)
    _, (lengths, sent) = jax.lax.scan(iterate, (start, zeros, zeros), jnp.arange(PRODUCTS))
    none, ones = jnp.zeros(agents.shape), jnp.ones(agents.shape)
    rounds = jnp.asarray(PRODUCTS * averages.rough.rounds)
    calls, zero = Calls(none, ones, 2 * PRODUCTS * ones, none), jnp.zeros(())
    spent = Spent(calls, sent.sum(0), rounds, zero, zero, zero)
    powers = jnp.stack([lengths[-1, 0], lengths[-1, 1] ** SHARPNESS], axis=1)  # [n, 2]
    powers, size = averages.fine.apply(key, powers)
    mean, power = gossip.mean(powers)
    return Curvatures(mean, (gossip.n * power) ** (1 / SHARPNESS)), spent.sent(size, averages.fine.rounds)

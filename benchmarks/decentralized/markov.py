"""A random Markov chain whose rewards many agents see differently, and the value of its states as a bilevel problem."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx

SPREAD = 0.1  # of a Dirichlet draw for each row of transitions: a few successors are likely


class States(NamedTuple):
    """What f_i reads.

    Attributes:
      states: int [m].
      features: φ of these states, [m, d].
    """

    states: chex.Array
    features: chex.Array


class Transitions(NamedTuple):
    """What g_i reads: states with the mean over their successors, or with one that was drawn.

    Attributes:
      states: int [m].
      weights: how often the agent visits them; 1 is average. In a draw of m states, times S / m.
      rewards: r_i, [m].
      features: φ of the successor, [m, d].
      chances: P [S, S], from which successors are drawn.
      table: r_i(s, s'), [S, S].
      every: φ of all states, [S, d].
    """

    states: chex.Array
    weights: chex.Array
    rewards: chex.Array
    features: chex.Array
    chances: chex.Array
    table: chex.Array
    every: chex.Array


class Chain(NamedTuple):
    """A Markov chain, and what the agents see of it.

    Attributes:
      features: φ, [S, d].
      chances: P [S, S], rows of which sum to 1.
      rewards: r_i(s, s'), [n, S, S].
      visits: w_is [n, S], with mean 1 over the agents for each state.
      discount: γ.
    """

    features: np.ndarray
    chances: np.ndarray
    rewards: np.ndarray
    visits: np.ndarray
    discount: float

    @property
    def expected(self) -> np.ndarray:
        """The agents' mean reward of each state: over successors, and over agents by their visits, [S]."""
        return np.mean(self.visits * np.einsum("st,nst->ns", self.chances, self.rewards), axis=0)

    @property
    def solution(self) -> np.ndarray:
        """x* = argmin ‖Φ x − r − γ P Φ x‖², [d]."""
        matrix = self.features - self.discount * self.chances @ self.features
        return np.linalg.lstsq(matrix, self.expected, rcond=None)[0]

    @property
    def values(self) -> np.ndarray:
        """Of the states, without any approximation: V = (I − γ P)⁻¹ r, [S]."""
        return np.linalg.solve(np.eye(len(self.chances)) - self.discount * self.chances, self.expected)

    @property
    def batch(self) -> bx.Batch:
        """All states for all agents, leaves [n, ...] in single precision."""
        n, (number, _) = len(self.rewards), self.features.shape
        states = np.arange(number, dtype=np.int32)
        means = np.einsum("st,nst->ns", self.chances, self.rewards)
        nexts = self.chances @ self.features

        def alike(array: np.ndarray) -> np.ndarray:
            return np.broadcast_to(array, (n, *array.shape))

        shared = (alike(array) for array in (nexts, self.chances))
        features, chances = shared
        inner = Transitions(
            alike(states), self.visits, means, features, chances, self.rewards, alike(self.features)
        )
        outer = States(alike(states), alike(self.features))
        return jax.tree.map(lambda leaf: leaf if leaf.dtype == np.int32 else leaf.astype(np.float32), bx.Batch(outer, inner))


def draw(
    seed: int, agents: int, states: int, features: int, discount: float, differing: float, uneven: float | None
) -> Chain:
    """Draws a chain: φ and the mean rewards uniform in [0, 1], transitions by a Dirichlet distribution.

    Args:
      seed: of all draws.
      agents: n.
      states: S.
      features: d.
      discount: γ.
      differing: standard deviation of an agent's rewards around the mean ones.
      uneven: visits to a state are divided over the agents by a Dirichlet distribution with this parameter; None for
        equally.

    Returns:
      The chain.
    """
    random = np.random.default_rng(seed)
    phi = random.uniform(size=(states, features))
    chances = random.dirichlet(np.full(states, SPREAD), size=states)
    rewards = random.uniform(size=(states, states)) + differing * random.normal(size=(agents, states, states))
    visits = np.ones((agents, states))
    if uneven is not None:
        visits = agents * random.dirichlet(np.full(agents, uneven), size=states).T
    return Chain(phi, chances, rewards, visits, discount)


def evaluation(discount: float) -> bx.BilevelProblem:
    """f_i and g_i of one agent; x [d]; y [S], the value of each state one step on."""

    def outer_loss(x: chex.Array, y: chex.Array, batch: States) -> chex.Array:
        return jnp.mean((batch.features @ x - y[batch.states]) ** 2) / 2

    def inner_loss(x: chex.Array, y: chex.Array, batch: Transitions) -> chex.Array:
        targets = batch.rewards + discount * batch.features @ x
        return jnp.sum(batch.weights * (y[batch.states] - targets) ** 2) / 2

    return bx.BilevelProblem(outer_loss, inner_loss)


def visited(size: int) -> Callable:
    """Draws so many states uniformly, and for g_i one successor of each; ∇f and ∇_y g, ∇²_yy g, ∇²_xy g are unbiased.

    The gradient ∇_x g alone would not be, as one successor stands in a square there; no method that draws reads it.
    """

    def sample(key: chex.PRNGKey, k: chex.Numeric, data: Any) -> Any:
        state_key, next_key = jax.random.split(key)
        drawn = jax.random.randint(state_key, (size,), 0, len(data.states))
        if isinstance(data, States):
            return States(data.states[drawn], data.features[drawn])
        after = jax.random.categorical(next_key, jnp.log(data.chances[drawn]))
        return data._replace(
            states=data.states[drawn],
            weights=data.weights[drawn] * len(data.states) / size,
            rewards=data.table[drawn, after],
            features=data.every[after],
        )

    return sample

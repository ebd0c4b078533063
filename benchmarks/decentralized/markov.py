"""A random Markov chain whose rewards many agents see differently, and the value of its states as a bilevel problem."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx
from bilevax.typing import Array, Key, Scalar

SPREAD = 0.1  # of a Dirichlet draw for each row of transitions: a few successors are likely


class States(NamedTuple):
    """What f_i reads: φ of all states, [S, d]."""

    features: Array | np.ndarray


class Transitions(NamedTuple):
    """What g_i reads: for each state, means over its successors, or over a few that were drawn.

    Attributes:
      weights: how often the agent visits a state, [S]; 1 is average.
      rewards: mean of r_i(s, s'), [S].
      features: mean of φ_s', [S, d].
      cumulative: sums of P along its rows, [S, S], from which successors are drawn.
      table: r_i(s, s'), [S, S].
      every: φ of all states, [S, d].
    """

    weights: Array | np.ndarray
    rewards: Array | np.ndarray
    features: Array | np.ndarray
    cumulative: Array | np.ndarray
    table: Array | np.ndarray
    every: Array | np.ndarray


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
        """The same states for all agents, leaves [n, ...] in single precision."""

        def alike(array: np.ndarray) -> np.ndarray:
            return np.broadcast_to(array, (len(self.rewards), *array.shape))

        phi, cumulative = alike(self.features), alike(np.cumsum(self.chances, axis=1))
        means = np.einsum("st,nst->ns", self.chances, self.rewards), alike(self.chances @ self.features)
        inner = Transitions(self.visits, *means, cumulative, self.rewards, phi)
        return jax.tree.map(lambda leaf: leaf.astype(np.float32), bx.Batch(States(phi), inner))


def draw(
    seed: int, agents: int, states: int, features: int, discount: float, differing: float, uneven: float | None
) -> Chain:
    """Draws a chain: rewards uniform in [0, 1], transitions by a Dirichlet distribution.

    Args:
      seed: of all draws.
      agents: n.
      states: S.
      features: d; the first is 1, the others are uniform in [−1, 1].
      discount: γ.
      differing: standard deviation of an agent's rewards around the mean ones.
      uneven: visits to a state are divided over the agents by a Dirichlet distribution with this parameter; None for
        equally.

    Returns:
      The chain.
    """
    random = np.random.default_rng(seed)
    phi = np.column_stack([np.ones(states), random.uniform(-1, 1, size=(states, features - 1))])
    chances = random.dirichlet(np.full(states, SPREAD), size=states)
    rewards = random.uniform(size=(states, states)) + differing * random.normal(size=(agents, states, states))
    visits = np.ones((agents, states))
    if uneven is not None:
        visits = agents * random.dirichlet(np.full(agents, uneven), size=states).T
    return Chain(phi, chances, rewards, visits, discount)


def evaluation(discount: float) -> bx.BilevelProblem:
    """f_i and g_i of one agent; x [d]; y [S], the value of each state one step on."""

    def outer_loss(x: Array, y: Array, batch: States) -> Array:
        return jnp.mean((batch.features @ x - y) ** 2) / 2

    def inner_loss(x: Array, y: Array, batch: Transitions) -> Array:
        return jnp.mean(batch.weights * (y - batch.rewards - discount * batch.features @ x) ** 2) / 2

    return bx.BilevelProblem(outer_loss, inner_loss)


def successors(size: int) -> Callable:
    """Draws so many successors of each state for g_i: ∇_y g, ∇²_yy g and ∇²_xy g are unbiased. f_i is left as it is.

    The gradient ∇_x g alone would be biased, by the variance of what is drawn; no method that draws reads it.
    """

    def sample(key: Key, k: Scalar, data: Any) -> Any:
        if isinstance(data, States):
            return data
        chances = jax.random.uniform(key, (len(data.table), size))
        after = jax.vmap(lambda row, chance: jnp.searchsorted(row, chance, side="right"))(data.cumulative, chances)
        after = jnp.minimum(after, len(data.table) - 1)  # the last sum may round to less than 1
        rewards = jnp.take_along_axis(data.table, after, axis=1).mean(axis=1)
        return data._replace(rewards=rewards, features=data.every[after].mean(axis=1))

    return sample

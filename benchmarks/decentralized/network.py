"""One bilevel problem of n agents with their data: what a task hands to the harness."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import bilevax as bx
from bilevax.typing import Array, Key, PyTree, Scalar

DRAWS = 100  # minibatches of each agent, among which the one of the largest curvature is found


class Network(NamedTuple):
    """A problem divided over agents.

    Attributes:
      problem: f_i and g_i of one agent; the same functions for all seeds, since programs are compiled once.
      batch: leaves [n, ...]; outer = what f_i reads, inner = what g_i reads.
      x, y: the first point of every agent, without the agents' axis.
      sample: `sample(size)` draws minibatches: a function `(key, t, data of one agent) -> data`, unbiased; `by_weight`
        where rows fill up.
      sizes: mean numbers of examples of an agent, outer and inner: a minibatch counts as its share of them.
      bound: `bound(data)`, from the inner data of one agent, all or a minibatch: no eigenvalue of its ∇²_yy g_i is
        larger, whatever x and y are.
      scores: `scores(x, y) -> {name: number}`, of NumPy arrays: the mean x, and the mean y or, where personal, leaves
        [n, ...]. Numbers may be NaN.
      personal: whether each agent has a lower level of its own, y_i = argmin g_i(x, y_i), in place of a common one.
      diagonal: `diagonal(x)`, like y: roughly that of ∇²_yy g, for a common lower level; it makes F cheaper to find.
      known: what of f_i and g_i reads no data, such as a penalty, as losses that are given None; None for nothing.
      fit: what of g_i reads data, by its parts; None where it has no such parts.
      outer_fit: the same of f_i.
    """

    problem: bx.BilevelProblem
    batch: bx.Batch
    x: PyTree
    y: PyTree
    sample: Callable[[int], Callable]
    sizes: bx.Batch
    bound: Callable[[Any], Scalar]
    scores: Callable[[Any, Any], dict[str, float]]
    personal: bool = False
    diagonal: Callable[[Any], Any] | None = None
    known: bx.BilevelProblem | None = None
    fit: bx.curvature.ModelLoss | None = None
    outer_fit: bx.curvature.ModelLoss | None = None

    @property
    def n(self) -> int:
        """Number of agents."""
        return len(jax.tree.leaves(self.batch)[0])

    @property
    def start(self) -> tuple[PyTree, PyTree]:
        """The first point, leaves [n, ...]."""
        return bx.replicate((self.x, self.y), self.n)

    def curvature(self, size: int | None = None) -> float:
        """L of all agents: the largest bound of one of them, or of any of DRAWS minibatches of this size of each."""
        with jax.ensure_compile_time_eval():  # the step sizes of a method may be traced around it
            return float(largest_bound(self.bound, self.sample, size, self.batch.inner))

    def point(self, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        """Where a method is judged: the mean x, and the mean y, or that of each agent where the lower level is its own.

        Args:
          x: leaves [n, ...].
          y: leaves [n, ...].
        """
        return mean(x), y if self.personal else mean(y)

    def loss(self, loss: Callable[..., Any], x: PyTree, y: PyTree, batch: Any) -> Array:
        """The mean over agents of their losses at a `point`."""
        return jnp.mean(jax.vmap(loss, (None, 0 if self.personal else None, 0))(x, y, batch))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def largest_bound(bound: Callable, sample: Callable, size: int | None, data: PyTree) -> Array:
    """Of all agents, leaves [n, ...], or of minibatches of them; see `Network.curvature`."""

    def of_one(data: PyTree) -> Array:
        if size is None:
            return jnp.asarray(bound(data), float)
        keys = jax.random.split(jax.random.key(0), DRAWS)
        return jnp.max(jax.vmap(lambda key: jnp.asarray(bound(sample(size)(key, 0, data)), float))(keys))

    return jnp.max(jax.lax.map(of_one, data))


def second_moment(rows: Array, weights: Array) -> Array:
    """The largest eigenvalue of the mean of w a aᵀ over the rows a [N, d], by the smaller of its two Gram matrices."""
    scaled = rows * jnp.sqrt(weights / len(rows))[:, None]
    return jnp.linalg.eigvalsh(scaled @ scaled.T if len(rows) < rows.shape[1] else scaled.T @ scaled)[-1]


def penalized(penalty: Callable[[Any, Any], Array]) -> bx.BilevelProblem:
    """What is known of g_i without data, where it is `penalty(x, y)`; of f_i nothing."""
    return bx.BilevelProblem(lambda x, y, batch: jnp.zeros(()), lambda x, y, batch: penalty(x, y))


def mean(tree: PyTree) -> PyTree:
    """Over the agents."""
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), tree)


def by_weight(size: int) -> Callable:
    """Draws so many rows of one agent in proportion to their weights, so that no row that only fills up is drawn.

    The data are `(*rows, weights)`, leaves [L, ...]. All rows drawn get the mean weight of the agent's rows: the
    weighted mean over the draw is then unbiased.
    """

    def sample(key: Key, k: Scalar, data: tuple) -> tuple:
        *rows, weights = data
        chosen = jax.random.choice(key, len(weights), (size,), p=weights / weights.sum())
        return (*(leaf[chosen] for leaf in rows), jnp.full(size, weights.mean(), weights.dtype))

    return sample

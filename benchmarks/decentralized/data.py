"""The data of hyper-cleaning divided over agents, and what the command line calls topologies and partitions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from benchmarks import corrupted
from benchmarks.data import DataError


class Choice(NamedTuple):
    """A value of an option, such as `dirichlet:0.1`.

    Attributes:
      example: the name, and a number behind a colon for each one that it takes.
      make: `make(n, seed, *numbers)`.
    """

    example: str
    make: Callable[..., Any]


# Undirected graphs: exact diffusion needs a symmetric W.
TOPOLOGIES = (
    Choice("ring", lambda n, seed: bx.topology.ring(n)),
    Choice("path", lambda n, seed: bx.topology.path(n)),
    Choice("star", lambda n, seed: bx.topology.star(n)),
    Choice("complete", lambda n, seed: bx.topology.complete(n)),
    Choice("torus", lambda n, seed: bx.topology.torus(n)),
    Choice("grid", lambda n, seed: bx.topology.grid(n)),
    Choice("hypercube", lambda n, seed: bx.topology.hypercube(n)),
    Choice("erdos-renyi:0.4", lambda n, seed, probability: bx.topology.erdos_renyi(n, probability, seed)),
    Choice("regular:3", lambda n, seed, degree: bx.topology.random_regular(n, int(degree), seed)),
)
PARTITIONS = (
    Choice("dirichlet:0.1", lambda n, seed, alpha: bx.partition.dirichlet_balanced(n, alpha, seed)),
    Choice("dirichlet-plain:0.1", lambda n, seed, alpha: bx.partition.dirichlet(n, alpha, seed)),
    Choice("classes:2", lambda n, seed, classes: bx.partition.classes_per_agent(n, int(classes), seed)),
    Choice("shards:1", lambda n, seed, number: bx.partition.shards(n, int(number))),
    Choice("quantity:2", lambda n, seed, beta: bx.partition.quantity_skew(n, beta, seed)),
    Choice("iid", lambda n, seed: bx.partition.iid(n, seed)),
)


def parsed(option: str, text: str, choices: Sequence[Choice]) -> Callable[[int, int], Any]:
    """Reads `name` or `name:number`.

    Args:
      option: its name, for the message.
      text: what was given.
      choices: what there is.

    Returns:
      `make(n, seed)`.

    Raises:
      ValueError: if it is none of the choices.
    """
    name, *numbers = text.split(":")
    for choice in choices:
        known, *needed = choice.example.split(":")
        if name == known and len(numbers) == len(needed):
            try:
                values = [float(number) for number in numbers]
            except ValueError:
                break
            return lambda n, seed: choice.make(n, seed, *values)
    examples = ", ".join(choice.example for choice in choices)
    raise ValueError(
        f"{option} must be like one of {examples}; got {text}. Pass, say, --{option} {choices[0].example}."
    )


class Divided(NamedTuple):
    """Data of all agents.

    Attributes:
      whole: before it was divided.
      batch: leaves [n, L, ...]: outer = validation (images, labels, weights), inner = training (images, labels, ids,
        weights), where ids are the positions of an agent's images in x, and weights are n · L / N, and 0 where rows
        only fill up: means over the L rows, so weighted, have the loss on the undivided data as their mean over agents.
    """

    whole: corrupted.Data
    batch: bx.Batch


def divide(whole: corrupted.Data, partition: Callable[..., list]) -> Divided:
    """Gives the agents their training images, by true labels, and their validation images."""
    (images, given), ids = whole.batch.inner, np.arange(len(whole.truth))
    try:
        train, validation = partition(np.asarray(whole.truth), np.asarray(whole.batch.outer[1]))
    except ValueError as error:
        raise DataError(f"The partition does not suit the data of seed {whole.seed}: {error}") from error
    (*inner, ids), weights = bx.partition.stack((images, given, ids), train)
    outer, outer_weights = bx.partition.stack(whole.batch.outer, validation)
    batch = bx.Batch(outer=(*outer, outer_weights), inner=(*inner, ids, weights))
    return Divided(whole, jax.tree.map(np.asarray, batch))


def cross_entropy(y: chex.Array, images: chex.Array, labels: chex.Array) -> chex.Array:
    """Of softmax regression with the weights y [pixels, 10]; one number for each image."""
    return optax.softmax_cross_entropy_with_integer_labels(images @ y, labels)


def cleaning(l2: float) -> bx.BilevelProblem:
    """f_i and g_i of one agent; x [N], for the training images of all agents; y [pixels, 10]."""

    def outer_loss(x: chex.Array, y: chex.Array, batch: tuple) -> chex.Array:
        images, labels, weights = batch
        return jnp.mean(weights * cross_entropy(y, images, labels))

    def inner_loss(x: chex.Array, y: chex.Array, batch: tuple) -> chex.Array:
        images, labels, ids, weights = batch
        losses = jax.nn.sigmoid(x[ids]) * cross_entropy(y, images, labels)
        return jnp.mean(weights * losses) + l2 / 2 * jnp.sum(y**2)

    return bx.BilevelProblem(outer_loss, inner_loss)


def mean_loss(loss: bx.problem.Loss, x: Any, y: Any, batch: Any) -> chex.Array:
    """The mean over agents of their losses at one point (x, y)."""
    return jnp.mean(jax.vmap(loss, (None, None, 0))(x, y, batch))


def by_weight(size: int) -> Callable:
    """Draws so many rows of one agent in proportion to their weights, so that no row that only fills up is drawn.

    All of them get the mean weight of the agent's rows: the weighted mean over the draw is then unbiased.
    """

    def sample(key: chex.PRNGKey, k: chex.Numeric, data: tuple) -> tuple:
        *rows, weights = data
        chosen = jax.random.choice(key, len(weights), (size,), p=weights / weights.sum())
        return (*(leaf[chosen] for leaf in rows), jnp.full(size, weights.mean(), weights.dtype))

    return sample

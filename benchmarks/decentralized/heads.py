"""Few-shot tasks of many agents, a backbone that they share, and a linear head for each task of each agent."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from benchmarks.data.few_shot import QUERIES, WAYS
from benchmarks.harness.errors import DataError
from benchmarks.networks.convolutional import patches
from bilevax.typing import Array, Key, PyTree, Scalar

LENGTH = 4.0  # of the features of every image: then ∇²_yy g is bounded for every x
ADAPTATION = 100  # steps of the heads of new tasks


class Backbone(nn.Module):
    """Convolutions of stride 2 and means over the positions: images [N, side, side(, 3)] -> features [N, F].

    Attributes:
      widths: channels of each convolution; the last are F.
    """

    widths: Sequence[int] = (16, 32)

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Features of one length for all images, whose mean is 0."""
        hidden = images[..., None] if images.ndim == 3 else 4 * (images - 0.5)
        for width in self.widths:
            convolution = nn.Conv(
                width, (3, 3), 2, conv_general_dilated=patches, kernel_init=nn.initializers.he_normal()
            )
            hidden = nn.relu(convolution(hidden))
        rows = hidden.mean(axis=(1, 2))
        rows = rows - rows.mean(axis=1, keepdims=True)
        return LENGTH * rows / jnp.sqrt(jnp.sum(rows**2, axis=1, keepdims=True) + 1e-6)


BACKBONE = Backbone()


def features(x: PyTree, images: Array) -> Array:
    """Of the backbone with the weights x: images [tasks, N, ...] -> [tasks, N, F]."""
    tasks, number = images.shape[:2]
    rows = cast(Array, BACKBONE.apply({"params": x}, images.reshape(-1, *images.shape[2:])))
    return rows.reshape(tasks, number, -1)


def cross_entropy(x: PyTree, y: Array, images: Array, labels: Array) -> Array:
    """Mean over tasks and images; y [tasks, F, WAYS]."""
    logits = jnp.einsum("tnf,tfw->tnw", features(x, images), y)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def decay(l2: float, x: PyTree, y: Array) -> Array:
    """The part of g_i that reads no data."""
    return l2 / 2 * jnp.sum(y**2) / len(y)


def personal(l2: float) -> bx.BilevelProblem:
    """f_i and g_i of one agent; x are the weights of the backbone, y [tasks, F, WAYS] the heads of its own tasks."""

    def outer_loss(x: PyTree, y: Array, batch: tuple) -> Array:
        return cross_entropy(x, y, *batch)

    def inner_loss(x: PyTree, y: Array, batch: tuple) -> Array:
        return cross_entropy(x, y, *batch) + decay(l2, x, y)

    return bx.BilevelProblem(outer_loss, inner_loss)


def curvature(l2: Any) -> Any:
    """L of the loss of one task in its head, whatever x is: LENGTH² times ½, the bound of a softmax, plus l2."""
    return LENGTH**2 / 2 + l2


class Tasks(NamedTuple):
    """The tasks of all agents.

    Attributes:
      classes: int [n, tasks, WAYS], what they tell apart.
      ids: int [n, tasks, WAYS, shots + QUERIES], numbers of their images among all of them.
      batch: leaves [n, tasks, ...]: outer = query (images, labels), inner = support (images, labels).
    """

    classes: np.ndarray
    ids: np.ndarray
    batch: bx.Batch


def deal(images: np.ndarray, partition: Callable[..., list], tasks: int, shots: int, seed: int) -> Tasks:
    """Gives the agents their images, and draws the tasks of each from its own.

    Args:
      images: [classes, number, side, side(, 3)].
      partition: of the labels of all images.
      tasks: of each agent.
      shots: support images of each class.
      seed: of the draws.

    Returns:
      The tasks.

    Raises:
      DataError: where an agent has fewer than WAYS classes with enough images.
    """
    number, each = images.shape[1], shots + QUERIES
    labels = np.repeat(np.arange(len(images)), number)
    try:
        (parts,) = partition(labels)
    except ValueError as error:
        raise DataError(f"The partition does not suit the data of seed {seed}: {error}") from error
    random = np.random.default_rng((seed, len(parts)))
    classes, ids = [], []
    for agent, rows in enumerate(parts):
        held, counts = np.unique(labels[rows], return_counts=True)
        enough = held[counts >= each]
        if len(enough) < WAYS:
            raise DataError(
                f"The partition leaves agent {agent} with {len(enough)} classes of {each} images or more, for tasks of "
                f"{WAYS} classes. Pass fewer --shots or --agents, or another --partition, say dirichlet:0.1."
            )
        for _ in range(tasks):
            chosen = random.choice(enough, WAYS, replace=False)
            classes.append(chosen)
            ids.append([random.choice(rows[labels[rows] == one], each, replace=False) for one in chosen])
    shape = (len(parts), tasks, WAYS, each)
    return _tasks(images, np.reshape(classes, shape[:3]), np.reshape(ids, shape), shots)


def _tasks(images: np.ndarray, classes: np.ndarray, ids: np.ndarray, shots: int) -> Tasks:
    rows, labels = images.reshape(-1, *images.shape[2:]), np.arange(WAYS, dtype=np.int32)

    def part(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        flat = ids.reshape(*ids.shape[:2], -1)
        return rows[flat], np.broadcast_to(np.repeat(labels, ids.shape[3]), flat.shape)

    return Tasks(classes, ids, bx.Batch(outer=part(ids[..., shots:]), inner=part(ids[..., :shots])))


def of_each_task(size: int) -> Callable:
    """Draws so many images of an agent in all, equally many of each of its tasks: the mean is unbiased."""

    def sample(key: Key, k: Scalar, data: tuple) -> tuple:
        images, labels = data
        tasks, number = labels.shape
        drawn = jax.random.randint(key, (tasks, size // tasks), 0, number)
        return jax.vmap(lambda leaf, rows: leaf[rows])(images, drawn), jnp.take_along_axis(labels, drawn, axis=1)

    return sample


@jax.jit
def adapted(x: PyTree, tasks: bx.Batch, l2: Scalar) -> tuple[Array, Array]:
    """Accuracy and loss on the query images of new tasks, whose heads descend from zero on the support images.

        y ← y − 1/L ∇_y g(x, y), ADAPTATION times, with the features of x

    Args:
      x: weights of the backbone.
      tasks: leaves [tasks, ...].
      l2: strength of the penalty on a head.

    Returns:
      Means over tasks and query images.
    """

    def logits(y: Array, inputs: Array) -> Array:
        return jnp.einsum("tnf,tfw->tnw", inputs, y)

    support, query = features(x, tasks.inner[0]), features(x, tasks.outer[0])

    def loss(y: Array) -> Array:
        """Added up over the tasks, each of which descends by itself."""
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(y, support), tasks.inner[1])
        return jnp.sum(jnp.mean(losses, axis=1)) + l2 / 2 * jnp.sum(y**2)

    start = jnp.zeros((len(support), support.shape[2], WAYS))
    y = jax.lax.fori_loop(0, ADAPTATION, lambda k, y: y - jax.grad(loss)(y) / curvature(l2), start)
    outputs, labels = logits(y, query), tasks.outer[1]
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return jnp.mean(outputs.argmax(axis=2) == labels), jnp.mean(losses)


def scores(tasks: bx.Batch, l2: float) -> Callable[[Any, Any], dict[str, float]]:
    """Of new tasks; the heads y of the agents' own tasks do not count."""

    def numbers(x: Any, y: Any) -> dict[str, float]:
        accuracy, loss = map(float, adapted(x, tasks, l2))
        finite = np.isfinite(loss)
        return {"test_accuracy": accuracy if finite else np.nan, "test_loss": loss if finite else np.nan}

    return numbers

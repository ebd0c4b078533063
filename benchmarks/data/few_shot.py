"""Few-shot tasks: images of Omniglot and of miniImageNet, and how a task is drawn from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx
from benchmarks.data.download import omniglot, shrunk
from benchmarks.data.photos import mini_imagenet
from bilevax.typing import Array, Key

WAYS, QUERIES = 5, 5  # classes of a task, and query images of each class
POOL, POOL_PHOTOS = 7, 4  # drawings shrink from 105 × 105 to 15 × 15, photographs from 84 × 84 to 21 × 21


def shrink(images: np.ndarray) -> Array:
    """Drawings, bool [class, drawer, side, side] with False for ink, to means over POOL × POOL pixels; 1 is ink."""
    return jnp.asarray(1 - shrunk(images, POOL))


def draw_task(key: Key, images: Array, shots: int = 1) -> bx.Batch:
    """Draws a task: distinct classes, and distinct images of each; drawings are turned by 0, 90, 180 or 270 degrees.

    Args:
      key: of the draw.
      images: drawings [classes, drawers, side, side], or photographs [classes, number, side, side, 3].
      shots: support images of each class.

    Returns:
      outer = query (images [WAYS · QUERIES, ...], labels), inner = support (images [WAYS · shots, ...], labels).
    """
    class_key, drawer_key, turn_key = jax.random.split(key, 3)
    classes = jax.random.choice(class_key, len(images), (WAYS,), replace=False)
    drawers = jnp.argsort(jax.random.uniform(drawer_key, (WAYS, images.shape[1])), axis=1)[:, : shots + QUERIES]
    drawings = images[classes[:, None], drawers]
    if images.ndim == 4:
        turns = [functools.partial(jnp.rot90, k=k, axes=(1, 2)) for k in range(4)]
        turn = jax.vmap(lambda number, drawings: jax.lax.switch(number, turns, drawings))
        drawings = turn(jax.random.randint(turn_key, (WAYS,), 0, len(turns)), drawings)
    labels = jnp.broadcast_to(jnp.arange(WAYS)[:, None], drawers.shape)

    def part(of: slice) -> tuple[Array, Array]:
        return drawings[:, of].reshape(-1, *images.shape[2:]), labels[:, of].reshape(-1)

    return bx.Batch(outer=part(slice(shots, None)), inner=part(slice(shots)))


@functools.cache
def read(name: str) -> tuple[Array, Array]:
    """The images of the classes to learn from, and of those for the test, [classes, images, side, side(, 3)]."""
    if name == "omniglot":
        return shrink(omniglot("background")), shrink(omniglot("evaluation"))
    train, test = (mini_imagenet(part, POOL_PHOTOS) for part in ("train", "test"))
    return jnp.asarray(train, jnp.float32) / 255, jnp.asarray(test, jnp.float32) / 255

"""The proving ground: one problem on which the numbers of a method are held against each other.

    g(x, y) = c Σ softplus(A tanh y) + ‖y‖² + yᵀB x          f(x, y) = w Σ softplus(C (y Σx)) + s (½‖y − b‖² + ½‖x‖²)

Each gradient of g and each product with its Hessian is one product with Aᵀ, each product with its cross derivative
one with Bᵀ, each gradient of f one with Cᵀ: a compiled program shows how many it runs. With c = w = 0 and s = 1 the
Hessian is 2 I and the hypergradient is known, in the same program, since all these letters are arrays of the batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.problem import Batch, BilevelProblem, Calls
from bilevax.testing.compiled import executed_dots, products
from bilevax.typing import Array, Key, PyTree, Scalar

DRAWS = 16  # entries of the stream of batches
Data = dict[str, Array]  # what a loss reads


def _inner_loss(x: Array, y: Array, batch: Data) -> Array:
    curved = jnp.sum(jax.nn.softplus(batch["A"] @ jnp.tanh(y)))
    return batch["c"] * curved + jnp.sum(y**2) + y @ (batch["B"] @ x)


def _outer_loss(x: Array, y: Array, batch: Data) -> Array:
    curved = jnp.sum(jax.nn.softplus(batch["C"] @ (y * jnp.sum(x))))
    return batch["w"] * curved + batch["s"] * (0.5 * jnp.sum((y - batch["b"]) ** 2) + 0.5 * jnp.sum(x**2))


PROBLEM = BilevelProblem(_outer_loss, _inner_loss)


def make_point(seed: int = 0) -> tuple[Array, Array]:
    """X of 5 numbers and y of 11."""
    draw = np.random.default_rng(seed).normal
    return jnp.asarray(draw(size=5) / 3), jnp.asarray(draw(size=11) / 3)


def make_batch(seed: int = 100, curved: float = 1.0) -> Batch:
    """A batch of both losses; with curved = 0 the Hessian of g is 2 I."""
    draw = np.random.default_rng(seed).normal
    A, B, C, b = (draw(size=shape) / 3 for shape in ((7, 11), (11, 5), (13, 11), 11))
    outer = {"C": C, "b": b, "w": np.asarray(curved), "s": np.ones(())}
    inner = {"A": A, "B": B, "c": np.asarray(curved), "gains": np.ones(DRAWS), "noise": np.zeros(())}
    return jax.tree.map(jnp.asarray, Batch(outer, inner))


def stream(key: Key | None, t: Scalar, data: Data) -> Data:
    """A sampler whose draw depends on the step where the gains differ, and on the key where there is noise."""
    if key is None:
        raise ValueError("key must be a jax.random.key for a stream of draws; got None. Hand on the key of the call.")
    word = jax.random.key_data(key)[-1] * jnp.uint32(2654435769)  # scatters the seeds 1, 2, ...
    uniform = word.astype(jnp.float32) / 2**32
    gain = data["gains"][t % DRAWS] + data["noise"] * uniform.astype(data["noise"].dtype)
    return data | {"A": gain * data["A"], "B": gain * data["B"]}


def varied(batch: Batch) -> Batch:
    """The same, with another draw at each step."""
    return batch._replace(inner=batch.inner | {"gains": jnp.asarray(1 + np.arange(DRAWS) / 8)})


def noisy(batch: Batch) -> Batch:
    """The same, with another draw for each key."""
    return batch._replace(inner=batch.inner | {"noise": jnp.asarray(np.ones(()))})


def halved(tree: PyTree) -> PyTree:
    """The same in bfloat16."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.bfloat16), tree)


def spoiled(batch: Batch) -> tuple[Batch, Batch]:
    """The same, with one NaN in what f reads, or in what g reads."""
    C, A = np.array(batch.outer["C"]), np.array(batch.inner["A"])
    C[3, 2] = A[3, 2] = np.nan
    outer, inner = batch.outer | {"C": jnp.asarray(C)}, batch.inner | {"A": jnp.asarray(A)}
    return batch._replace(outer=outer), batch._replace(inner=inner)


def solution(x: Array, batch: Batch) -> Array:
    """The minimizer y of g where c = 0."""
    return jnp.asarray(-np.asarray(batch.inner["B"]) @ np.asarray(x) / 2)


def exact_gradient(x: Array, batch: Batch) -> Array:
    """The hypergradient where c = w = 0."""
    residual = np.asarray(solution(x, batch)) - np.asarray(batch.outer["b"])
    return jnp.asarray(np.asarray(x) - np.asarray(batch.inner["B"]).T @ residual / 2)


def _draw(data: Data, t: Scalar) -> Data:
    gain = data["gains"][t % DRAWS]
    return data | {"A": gain * data["A"], "B": gain * data["B"]}


@functools.partial(jax.jit, static_argnames="steps")
def descend(steps: int, rate: Scalar, x: Array, y: Array, data: Data) -> Array:
    """Y after plain gradient steps on the draws of `stream` without noise."""

    def step(y: Array, t: Array) -> tuple[Array, None]:
        return y - rate * jax.grad(_inner_loss, 1)(x, y, _draw(data, t)), None

    return jax.lax.scan(step, y, jnp.arange(steps))[0]


@functools.partial(jax.jit, static_argnames="steps")
def unrolled_gradient(steps: int, rate: Scalar, x: Array, y: Array, batch: Batch) -> Array:
    """The derivative of f after those steps."""
    return jax.grad(lambda x: _outer_loss(x, descend(steps, rate, x, y, batch.inner), batch.outer))(x)


@jax.jit
def losses(x: Array, y: Array, data: Data, last: int) -> tuple[Array, Array]:
    """G and ‖∇_y g‖ on draw `last` of `stream` without noise."""
    value, gradient = jax.value_and_grad(_inner_loss, 1)(x, y, _draw(data, last))
    return value, jnp.linalg.norm(gradient)


def executed(program: jax.stages.Compiled, unknown_trips: int) -> Calls:
    """What a compiled program on this problem runs; a shared pull-back counts as both of its products.

    Gradients of g and products with its Hessian look alike: both stand in `inner_gradients`.
    """
    dots = executed_dots(str(program.as_text()), unknown_trips)
    return Calls(products(dots, 13, 11), products(dots, 7, 11), 0, products(dots, 11, 5))


def together(calls: Calls) -> Calls:
    """Declared calls, as `executed` counts them."""
    gradients: Any = calls.inner_gradients + calls.hessian_products
    return Calls(int(calls.outer_gradients), int(gradients), 0, int(calls.cross_products))

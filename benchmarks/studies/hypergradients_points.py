"""Where hypergradients are compared: small networks at several points of their training, with the exact answer.

    g(x, y) = mean over training of sigmoid(x_i) · CE_i(y) + l2 / 2 · ‖y‖²     f(y) = mean over validation of CE_j(y)

y is taken twice on the way of plain gradient descent on g, and at a minimum. There the dense Hessian is formed:

    exact = −∇²_xy g (∇²_yy g + shift I)⁻¹ ∇_y f

At a minimum the shift is 0, and this is the derivative of the solved problem. On the way there the Hessian has negative
eigenvalues, and the implicit formula stands for nothing; a shift of l2 − (the smallest eigenvalue) makes it that of the
nearest convex problem.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax.flatten_util import ravel_pytree

import bilevax as bx
from benchmarks.data.images import Data
from benchmarks.networks.dense import affine
from benchmarks.networks.model import Model
from benchmarks.tasks import hyper_cleaning
from benchmarks.tasks.hyper_cleaning import numbered, outer_loss
from bilevax.typing import Array, Key, PyTree, Scalar

ESTIMATES = 10  # estimates that follow each other up to the point
UNROLLED = 10  # iterates before the first of them, for those that unroll
STEP_SIZE = 0.2
STAGES: Mapping[str, int | None] = {"start": 20, "middle": 200, "end": None}  # inner steps; None: to a minimum
SIDE = 8  # of an image of the digits


class Point(NamedTuple):
    """A point (x, y) with the iterates that led to it.

    Attributes:
      l2: weight decay.
      weights: name of x.
      stage: name of y.
      x: [N].
      path: leaves [UNROLLED + ESTIMATES, ...], the last iterates of gradient descent; y is the last of them.
      exact: the hypergradient [N], float64.
      smallest: the smallest eigenvalue of the Hessian.
      gradient_norm: ‖∇_y g‖.
    """

    l2: float
    weights: str
    stage: str
    x: Array
    path: PyTree
    exact: np.ndarray
    smallest: float
    gradient_norm: float


def strided(y: Any, images: Array) -> Array:
    """A convolution with stride 2 and tanh; images [N, height, width, channels]."""
    layout = ("NHWC", "HWIO", "NHWC")
    outputs = jax.lax.conv_general_dilated(images, y["weights"], (2, 2), "SAME", dimension_numbers=layout)
    return jnp.tanh(outputs + y["bias"][None, None, None])


def feedforward(y: Any, images: Array) -> Array:
    """Hidden layers with tanh."""
    *hidden, last = y
    for layer in hidden:
        images = jnp.tanh(affine(layer, images))
    return affine(last, images)


def convolutional(y: Any, images: Array) -> Array:
    """Two convolutions and a dense layer."""
    *hidden, last = y
    features = images.reshape(-1, SIDE, SIDE, 1)
    for layer in hidden:
        features = strided(layer, features)
    return affine(last, features.reshape(len(images), -1))


def layers(*shapes: tuple[int, ...]) -> Callable[[Key, int], PyTree]:
    """The first y: normal kernels of these shapes with variance 1 / inputs, and no biases."""

    def init(key: Key, pixels: int) -> PyTree:
        keys = jax.random.split(key, len(shapes))
        return [
            {"weights": jax.random.normal(key, shape) / np.prod(shape[:-1]) ** 0.5, "bias": jnp.zeros(shape[-1])}
            for key, shape in zip(keys, shapes, strict=True)
        ]

    return init


def network(logits: Callable, *shapes: tuple[int, ...]) -> Model:
    """A classifier of the digits."""
    return Model(layers(*shapes), logits, bx.curvature.gauss_newton)


NETS = {
    "mlp": network(feedforward, (64, 16), (16, 10)),
    "cnn": network(convolutional, (3, 3, 1, 4), (3, 3, 4, 8), (32, 10)),
}


def inner_loss(net: Model, l2: Scalar) -> bx.curvature.ModelLoss:
    """The weighted training loss of hyper-cleaning with this weight decay."""
    return dataclasses.replace(hyper_cleaning.inner_loss(net), l2=l2)


def equal(data: Data) -> np.ndarray:
    """All weights 1/2, where cleaning starts."""
    return np.zeros(data.clean.shape)


def random(data: Data) -> np.ndarray:
    """Standard normal x."""
    return np.random.default_rng(data.seed).normal(size=data.clean.shape)


def cleaned(data: Data) -> np.ndarray:
    """Weights of 0.95 for true and 0.05 for false labels, about where cleaning ends."""
    return np.where(data.clean, 3.0, -3.0)


WEIGHTS: Mapping[str, Callable[[Data], np.ndarray]] = {f.__name__: f for f in (equal, random, cleaned)}


@functools.partial(jax.jit, static_argnums=(0, 5))
def descend(net: Model, l2: float, x: Array, y: Any, batch: tuple, steps: int) -> Any:
    """All iterates of gradient descent, leaves [steps + 1, ...], y the first of them."""

    def step(y: Any, _: None) -> tuple[Any, Any]:
        gradient = jax.grad(inner_loss(net, l2), argnums=1)(x, y, batch)
        return jax.tree.map(lambda leaf, slope: leaf - STEP_SIZE * slope, y, gradient), y

    return jax.lax.scan(step, y, None, steps + 1)[1]


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradient(net: Model, l2: float, x: Array, y: Any, batch: tuple) -> tuple:
    return jax.value_and_grad(inner_loss(net, l2), argnums=1)(x, y, batch)


def minimize(net: Model, l2: float, x: Array, y: Any, batch: tuple) -> Any:
    """The minimum of g that L-BFGS finds from y."""
    flat, unravel = ravel_pytree(y)

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _value_and_gradient(net, l2, x, unravel(jnp.asarray(flat)), batch)
        return float(value), np.asarray(ravel_pytree(gradient)[0])

    options = {"maxiter": 50_000, "maxfun": 50_000, "ftol": 0, "gtol": 1e-9, "maxcor": 50}
    found = scipy.optimize.minimize(value_and_gradient, np.asarray(flat), jac=True, method="L-BFGS-B", options=options)
    return unravel(jnp.asarray(found.x))


@functools.partial(jax.jit, static_argnums=0)
def dense_system(net: Model, l2: float, x: Array, y: Any, batch: bx.Batch) -> tuple:
    """The Hessian [M, M] and the gradient [M] of g, and the gradient [M] of f."""
    flat, unravel = ravel_pytree(y)
    loss = inner_loss(net, l2)
    product = bx.curvature.hessian(loss, x, y, batch.inner)
    hessian = jax.lax.map(lambda row: ravel_pytree(product(unravel(row)))[0], jnp.eye(flat.size, dtype=flat.dtype))
    inner = jax.grad(loss, argnums=1)(x, y, batch.inner)
    outer = jax.grad(functools.partial(outer_loss, net), argnums=1)(x, y, batch.outer)
    return hessian, ravel_pytree(inner)[0], ravel_pytree(outer)[0]


@functools.partial(jax.jit, static_argnums=0)
def indirect(net: Model, l2: float, x: Array, y: Any, batch: tuple, v: Array) -> Array:
    """−∇²_xy g v [N], which is all of the hypergradient, since f does not look at x."""
    return -bx.curvature.cross(inner_loss(net, l2), x, y, batch)(ravel_pytree(y)[1](v))


def solved(net: Model, l2: float, x: Array, y: Any, batch: bx.Batch) -> tuple[np.ndarray, float, float]:
    """The exact hypergradient, the smallest eigenvalue of the Hessian, and ‖∇_y g‖."""
    hessian, inner, outer = (np.asarray(part) for part in dense_system(net, l2, x, y, batch))
    smallest = float(np.linalg.eigvalsh(hessian)[0])
    shift = 0.0 if smallest > 0 else l2 - smallest
    v = scipy.linalg.solve(hessian + shift * np.eye(len(hessian)), outer, assume_a="pos")
    return np.asarray(indirect(net, l2, x, y, batch.inner, v)), smallest, float(np.linalg.norm(inner))


def points(net: Model, l2: float, weights: str, data: Data) -> Iterator[Point]:
    """The points of one training run, computed in float64; x and paths come back in float32."""
    with jax.enable_x64(True):
        batch = jax.tree.map(
            lambda leaf: leaf.astype(float) if leaf.dtype == jnp.float32 else leaf, numbered(data.batch)
        )
        x = jnp.asarray(WEIGHTS[weights](data))
        y = jax.tree.map(lambda leaf: leaf.astype(float), net.init(jax.random.key(data.seed), SIDE**2))
        every = descend(net, l2, x, y, batch.inner, max(steps for steps in STAGES.values() if steps))
        kept = UNROLLED + ESTIMATES
        for stage, steps in STAGES.items():
            if steps is None:
                last = minimize(net, l2, x, jax.tree.map(lambda leaf: leaf[-1], every), batch.inner)
                path = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (kept, *leaf.shape)), last)
            else:
                path = jax.tree.map(lambda leaf, stop=steps + 1: leaf[stop - kept : stop], every)
                last = jax.tree.map(lambda leaf: leaf[-1], path)
            exact, smallest, norm = solved(net, l2, x, last, batch)
            x32, path = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (x, path))
            yield Point(l2, weights, stage, x32, path, exact, smallest, norm)

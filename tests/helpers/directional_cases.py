"""Small problems with known hypergradients for the tests of estimators along random directions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx

KEY = jax.random.key(0)
NO_DATA = bx.Batch(None, None)


def estimate(solver, outer_loss, x, y, batch=NO_DATA, key=KEY):
    """One compiled estimate from a fresh state."""
    hypergrad = bx.hypergradient(outer_loss, solver)
    return jax.jit(hypergrad.estimate)(key, hypergrad.init(x, y, batch), x, batch)


def rows(vectors):
    """A sampler that always returns the given directions [b, N], for an x of shape [N]."""
    return bx.inner.random_directions.Sampler(lambda key, like, number: lambda i: vectors[i], lambda N, b: (N - 1) / b)


def signs(N):
    """All 2^N vectors of signs, [2^N, N]."""
    return 2.0 * ((np.arange(2**N)[:, None] >> np.arange(N)[None, :]) & 1) - 1


def flat(tree, axes=0):
    """The leaves of a pytree as one vector, behind `axes` leading axes."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(*leaf.shape[:axes], -1) for leaf in leaves], axis=-1)


def assert_mean(samples, expected, errors=4.0):
    """The mean over axis 0 is within that many standard errors of what is expected."""
    samples = np.asarray(samples, np.float64)
    standard_error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - expected), errors * standard_error + 1e-12)


class Quadratic(NamedTuple):
    """½ yᵀ diag(h) y − xᵀy below and ½ ‖y − a‖² above: every number of an unroll is a fraction."""

    h: jax.Array
    a: jax.Array
    x: jax.Array
    y: jax.Array

    def inner_loss(self, x, y, batch):
        return y @ (self.h * y) / 2 - x @ y

    def outer_loss(self, x, y, batch):
        return jnp.sum((y - self.a) ** 2) / 2


QUADRATIC = Quadratic(jnp.array([1.0, 2.0]), jnp.array([6.0, 5.0]), jnp.array([16.0, 8.0]), jnp.zeros(2))
QUADRATIC_SGD = optax.sgd(1 / 4)
QUADRATIC_GRADIENT = np.array([7 / 16, -3 / 4])  # after two steps


def quadratic_estimate(solver, x=QUADRATIC.x, key=KEY):
    return estimate(solver, QUADRATIC.outer_loss, x, QUADRATIC.y, key=key)


# y(x) = x after one step and f = uᵀy: the hypergradient is any u one likes, given as the outer batch.


def tracking_loss(x, y, batch):
    return jnp.sum((y - x) ** 2) / 2


def linear_loss(x, y, u):
    return u @ y


def probe(directions, u, key=KEY, **options):
    """An estimate of u by `directions` directions."""
    solver, zeros = (
        bx.inner.forward_gradient(tracking_loss, optax.sgd(1.0), 1, directions=directions, **options),
        jnp.zeros(len(u)),
    )
    return estimate(solver, linear_loss, zeros, zeros, bx.Batch(u, None), key)


# Softmax regression on 24 weighted examples; x holds the weights and one regularization per input.

_random = np.random.default_rng(0)
TRAIN = {
    "inputs": jnp.asarray(_random.normal(size=(24, 5))),
    "labels": jnp.asarray(_random.integers(0, 3, size=24)),
    "index": jnp.arange(24),
}
VALID = {"inputs": jnp.asarray(_random.normal(size=(9, 5))), "labels": jnp.asarray(_random.integers(0, 3, size=9))}
WEIGHTS = {"weights": jnp.asarray(_random.normal(size=24)), "l2": jnp.asarray(_random.normal(size=5) - 1)}
Y0 = {"w": jnp.asarray(_random.normal(size=(5, 3))), "b": jnp.zeros(3)}
N = 29


def cross_entropies(y, batch):
    logits = batch["inputs"] @ y["w"] + y["b"][None, :]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])


def cleaning_loss(x, y, batch):
    weights = jax.nn.sigmoid(x["weights"][batch["index"]])
    return jnp.mean(weights * cross_entropies(y, batch)) + jnp.sum(jnp.exp(x["l2"])[:, None] * y["w"] ** 2) / 2


def validation_loss(x, y, batch):
    """The outer loss has a direct part in x as well."""
    return jnp.mean(cross_entropies(y, batch)) + 0.05 * optax.tree.norm(x, squared=True)


def from_x(x):
    """A first y that depends on x."""
    return {"w": 0.5 * x["weights"][:15].reshape(5, 3), "b": x["l2"][:3]}


CLEANING = bx.Batch(VALID, TRAIN)
DIRECT = flat(jax.tree.map(lambda leaf: 0.1 * leaf, WEIGHTS))


def cleaning_estimate(solver, x=WEIGHTS, key=KEY, batch=CLEANING):
    return estimate(solver, validation_loss, x, Y0, batch, key)


def unrolled(optimizer, batches, initial=lambda x: Y0):
    """F(x) written out with optax alone: one step on each of the stacked batches [T, ...]."""

    def step(carry, batch, x):
        y, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(cleaning_loss, 1)(x, y, batch), opt_state, y)
        return (optax.apply_updates(y, updates), opt_state), None

    def value(x):
        y = initial(x)
        (y, _), _ = jax.lax.scan(lambda carry, batch: step(carry, batch, x), (y, optimizer.init(y)), batches)
        return validation_loss(x, y, VALID)

    return value

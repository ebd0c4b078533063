"""A small network, its Gauss–Newton matrix written out, and the factors and inverses that tests of KFAC compare."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevax import curvature
from bilevax.curvature import fisher, kronecker

KEY = jax.random.key(0)
DAMPING = 0.3
N, T, D, C = 5, 4, 3, 3


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


INPUTS, SEQUENCES, IMAGES = normal(0, N, D), normal(1, N, T, D), normal(2, 2, 4, 3, 2)
LABELS, WEIGHTS = jnp.asarray(np.arange(N) % C), jnp.asarray(np.linspace(0.2, 2.0, N))
Y = {
    "hidden": {"bias": normal(3, 4), "kernel": normal(4, D, 4)},
    "out": {"bias": normal(5, C), "kernel": normal(6, 4, C)},
}


def affine(layer, inputs):
    return inputs @ layer["kernel"] + layer["bias"].reshape((1,) * (inputs.ndim - 1) + (-1,))


def network(y, inputs):
    return affine(y["out"], jnp.tanh(affine(y["hidden"], inputs)))


def pair(x, batch):
    return batch


def weighted(x, batch):
    return x


def make(model=network, loss=curvature.softmax_cross_entropy, **parts):
    return curvature.ModelLoss(model, loss, **{"split": pair, **parts})


def factors(inner_loss, y, batch, x=None, key=KEY, **choices):
    choices = {"fisher": fisher.exact, **choices}
    return jax.jit(lambda key, x, y, batch: kronecker.factors(key, inner_loss, x, y, batch, **choices))(
        key, x, y, batch
    )


def applied(ihvp, inner_loss, x, y, batch):
    apply, _ = ihvp.prepare(KEY, ihvp.init(x, y, batch, inner_loss), inner_loss, (x, y, batch))
    return lambda b: apply(b)[0]


def solve(ihvp, inner_loss, y, batch, b, x=None):
    """v, compiled."""
    return jax.jit(lambda x, y, batch, b: applied(ihvp, inner_loss, x, y, batch)(b))(x, y, batch, b)


def inverse(ihvp, inner_loss, y, batch, x=None):
    """The matrix [M, M] that the IHVP multiplies by."""

    @jax.jit
    def matrix(x, y, batch):
        flat, unravel = ravel_pytree(y)
        apply = applied(ihvp, inner_loss, x, y, batch)
        return jax.vmap(lambda b: ravel_pytree(apply(unravel(b)))[0])(jnp.eye(flat.size, dtype=flat.dtype))

    return np.asarray(matrix(x, y, batch))


def gauss_newton(inner_loss, y, batch, x=None):
    """1/N Σ w Jᵀ L J over all examples and positions, from jax.jacobian and jax.hessian; without the penalty."""

    @jax.jit
    def matrix(x, y, batch):
        flat, unravel = ravel_pytree(y)
        inputs, targets = inner_loss.split(x, batch)
        jacobian = jax.jacobian(lambda flat: inner_loss.model(unravel(flat), inputs))(flat)
        return curved(inner_loss, jacobian[..., None, :], inner_loss.model(y, inputs), targets, x, batch)

    return np.array(matrix(x, y, batch))


def curved(inner_loss, jacobian, outputs, targets, x, batch):
    """Σ_n scale_n Σ_p J_npᵀ L_n J_np over all outputs n, for a jacobian [..., C, P, M]."""
    size = outputs.shape[-1]
    scale = inner_loss.scale(inner_loss.loss.value(outputs, targets), x, batch)
    one = lambda z, t: inner_loss.loss.value(z[None], t[None])[0]  # noqa: E731
    flat_targets = targets.reshape((-1, size)) if targets.shape == outputs.shape else targets.reshape(-1)
    L = jax.vmap(jax.hessian(one))(outputs.reshape(-1, size), flat_targets)
    rows = jacobian.reshape(-1, size, *jacobian.shape[-2:])
    return jnp.einsum("n,ncpi,ncd,ndpj->ij", scale.ravel(), rows, L, rows)


def rows(layer):
    """[kernel; bias], what A ⊗ B acts on."""
    return jnp.concatenate([layer["kernel"], layer["bias"][None]])


def index(y, name):
    """Where the entries of [kernel; bias] of a layer stand in the raveled y."""
    flat, unravel = ravel_pytree(y)
    return np.asarray(rows(unravel(jnp.arange(flat.size, dtype=flat.dtype))[name])).ravel().astype(int)


def block(matrix, y, name):
    return matrix[np.ix_(index(y, name), index(y, name))]


def kron(entry):
    return np.kron(entry.A, entry.B)


def distance(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def dense_solve(found, y, b, damping):
    """The raveled v of the blocks A ⊗ B + damping I."""
    flat = np.asarray(ravel_pytree(b)[0])
    v = np.zeros_like(flat)
    for name in y:
        matrix = kron(found[f"{name}/kernel"])
        v[index(y, name)] = np.linalg.solve(matrix + damping * np.eye(len(matrix)), flat[index(y, name)])
    return v

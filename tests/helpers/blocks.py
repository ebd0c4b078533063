"""Gauss–Newton blocks and Kronecker factors from dense Jacobians: what a capture of layers must find."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevax as bx
from bilevax import curvature
from bilevax.curvature.passes import curvatures
from bilevax.curvature.traced_loss import trace_loss

KEY = jax.random.key(0)


def untapped(outputs, inputs, weight, bias=None):
    return outputs


def make(model, **parts):
    """Softmax cross-entropy whose example weights are exp(x)."""
    return curvature.ModelLoss(
        model, curvature.softmax_cross_entropy, lambda x, batch: batch, lambda x, batch: jnp.exp(x), **parts
    )


def captured(model, x, y, batch, **choices):
    """The factors that the package finds, of the exact Fisher unless another is chosen."""
    return _compiled(model, **choices)(x, y, batch)


@functools.cache
def _compiled(model, fisher=curvature.fisher.exact, **choices):
    factors = curvature.kronecker.factors
    return jax.jit(lambda x, y, batch: factors(KEY, make(model), x, y, batch, fisher=fisher, **choices))


def corrected(key, inner_loss, x, y, batch, bases, fisher=curvature.fisher.exact, **choices):
    """Name of a weight -> the diagonal of the curvature in its basis, as EKFAC measures it."""
    unsupported = choices.get("unsupported", curvature.capture.error)
    here = trace_loss(inner_loss, x, y, batch, curvature.expand, None, unsupported)
    return {name: part.eigenvalues for name, part in curvatures(key, here, fisher, bases)[0].items()}


def kfac(model, x, y, b, batch, l2=0.25, **choices):
    """(v, info) of (curvature + l2 + 0.5) v = b."""
    ihvp = bx.ihvp.kfac(damping=0.5, **{"fisher": curvature.fisher.exact} | choices)
    inner_loss = make(model, l2=l2)

    @jax.jit
    def solve(x, y, b, batch):
        apply, _ = ihvp.prepare(KEY, ihvp.init(x, y, batch, inner_loss), inner_loss, (x, y, batch))
        return apply(b)

    return solve(x, y, b, batch)


def output_curvature(inner_loss, outputs, x, batch):
    """The Hessian of the weighted loss in all outputs together, [K, K]."""

    def value(flat):
        values = inner_loss.loss.value(flat.reshape(outputs.shape), batch[1])
        return jnp.sum(inner_loss.scale(values, x, batch) * values)

    return jax.hessian(value)(outputs.ravel())


def gauss_newton(model, x, y, batch):
    """JᵀLJ over all of y, [dim y, dim y], in the order of `ravel_pytree`."""
    flat, unravel = ravel_pytree(y)

    @jax.jit
    def dense(x, flat, batch):
        outputs = model(unravel(flat), batch[0])
        J = jax.jacobian(lambda flat: model(unravel(flat), batch[0]).ravel())(flat)
        return J.T @ output_curvature(make(model), outputs, x, batch) @ J

    return dense(x, flat, batch)


def block(G, y, pick):
    """The block of G that belongs to the entries `pick(y)` of y, an array of any shape, in its order."""
    flat, unravel = ravel_pytree(y)
    places = np.asarray(pick(jax.device_get(unravel(jnp.arange(flat.size, dtype=flat.dtype))))).astype(int)
    return np.asarray(G)[np.ix_(places.ravel(), places.ravel())]


def as_matrix(A):
    return np.diag(A) if np.ndim(A) == 1 else np.asarray(A)


def by_perturbation(tapped, x, y, batch):
    """(A, B) of each layer that `tapped(y, inputs, observe)` observes, by shifts of its outputs; positions expand.

    A = Σ_n q_n mean_t āāᵀ,  q_n = w_n / Σ w          B = Σ_n w_n/N Σ_t (∂z/∂s_nt)ᵀ L_n (∂z/∂s_nt)
    """
    inputs = batch[0]
    q = jax.nn.softmax(x)

    @jax.jit
    def dense(x, y, batch):
        acts, sizes = [], []

        def record(outputs, inputs, weight, bias=None):
            d_in = inputs.shape[-1]
            sizes.append((outputs.shape, weight.size // d_in))
            rows = inputs.reshape(len(q), -1, d_in)
            acts.append(rows if bias is None else jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], -1))
            return outputs

        def shifted(shifts):
            left = iter(shifts)
            return tapped(y, inputs, lambda outputs, *layer: outputs + next(left)).ravel()

        outputs = tapped(y, inputs, record)
        L = output_curvature(make(tapped), outputs, x, batch)
        jacobians = jax.jacobian(shifted)([jnp.zeros(shape) for shape, _ in sizes])
        found = []
        for a, J, (_, d_out) in zip(acts, jacobians, sizes, strict=True):
            J = J.reshape(len(L), -1, d_out)
            A = jnp.einsum("n,nti,ntj->ij", q, a, a) / a.shape[1]
            found.append((A, jnp.einsum("ktd,kl,lte->de", J, L, J)))
        return found

    return dense(x, y, batch)


def assert_same(entry, A, B, rtol=0.0, atol=1e-12):
    np.testing.assert_allclose(as_matrix(entry.A), as_matrix(A), rtol=rtol, atol=atol)
    np.testing.assert_allclose(entry.B, B, rtol=rtol, atol=atol)


def assert_equal_factors(found, expected, atol=1e-12):
    """The same entries under the same names."""
    assert set(found) == set(expected)
    for name, entry in expected.items():
        if hasattr(entry, "diagonal"):
            np.testing.assert_allclose(found[name].diagonal, entry.diagonal, rtol=0, atol=atol, err_msg=name)
        else:
            assert_same(found[name], entry.A, entry.B, atol=atol)


def covered(factors):
    """How many entries of y the factors speak for."""
    return sum(e.diagonal.size if hasattr(e, "diagonal") else len(e.A) * len(e.B) for e in factors.values())

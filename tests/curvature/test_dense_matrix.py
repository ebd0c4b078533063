"""EKFAC with the exact Fisher against the dense Gauss–Newton matrix: its diagonal in the basis of each block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import KEY, corrected, gauss_newton, make
from jax.flatten_util import ravel_pytree
from models import MODELS

from bilevax.curvature import capture, kronecker
from bilevax.curvature.fisher import exact


def measured(row):
    """Bases of the Kronecker blocks, the eigenvalues of EKFAC in them, and the diagonals of other leaves, by name."""
    inner_loss = make(row.model)

    @jax.jit
    def all_of(x, y, batch):
        found = kronecker.factors(KEY, inner_loss, x, y, batch, fisher=exact)
        diagonals = {name: entry.diagonal for name, entry in found.items() if isinstance(entry, kronecker.Diagonal)}
        pairs = {name: entry for name, entry in found.items() if name not in diagonals}
        bases = {name: kronecker.spectral.decompose(entry.A, entry.B, 0.0) for name, entry in pairs.items()}
        return bases, corrected(KEY, inner_loss, x, y, batch, bases), diagonals

    return jax.device_get(all_of(row.x, row.y, (row.inputs, row.labels)))


def matrix_and_places(row):
    """G with rows of its own for each use of an entry of y; and leaf -> place in G, for each use of an entry."""
    each = {key: jax.tree.map(lambda leaf, k=k: jnp.stack([leaf] * k), row.y[key]) for key, k in row.uses.items()}
    y = row.y | each
    flat, unravel = ravel_pytree(y)
    numbers = jax.device_get(unravel(jnp.arange(flat.size, dtype=flat.dtype)))

    def places(name):
        for use in range(row.uses.get(entry := name.split("/")[0], 1)):
            one = {key: jax.tree.map(lambda leaf, u=use * (key == entry): leaf[u], numbers[key]) for key in row.uses}
            yield dict(enumerate(jax.tree.leaves(numbers | one)))

    G = gauss_newton(row.untied or row.model, row.x, y, (row.inputs, row.labels))
    return np.asarray(G), places


def in_basis(G, places, *basis):
    """qᵀ G q for each q = q_A q_Bᵀ of a layer, whose entries [d_in, d_out] have these places in G."""
    d_in, d_out = places.shape
    block = G[np.ix_(places.ravel(), places.ravel())].reshape(d_in, d_out, d_in, d_out)
    qa, qb = (np.eye(size) if q is None else q for q, size in zip(basis, places.shape, strict=True))
    return np.einsum("ai,bj,abcd,ci,dj->ij", qa, qb, block, qa, qb, optimize=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_eigenvalues_are_the_diagonal_of_the_dense_matrix(name):
    """Where a leaf is used several times, each use counts as a leaf of its own."""
    row = MODELS[name]
    bases, eigenvalues, diagonals = measured(row)
    (G, places_of_uses), seen = matrix_and_places(row), []
    for block in capture.trace(row.model, row.y, row.inputs).blocks:
        if block.treatment is not None:
            continue
        expected = 0.0
        for leaves in places_of_uses(block.name):
            if block.name in diagonals:
                at = block.take(leaves[block.leaf]).astype(int)
                expected = expected + np.diag(G)[at]
            else:
                at, basis = np.asarray(block.pack(leaves)).astype(int), bases[block.name]
                stack = list(np.ndindex(block.stack))
                layers = [in_basis(G, at[k], *(q if q is None else q[k] for q in (basis.qa, basis.qb))) for k in stack]
                expected = expected + np.reshape(layers, at.shape)
            seen.extend(at.ravel())
        found = (diagonals | eigenvalues)[block.name]
        assert expected.max() > 1e-8, block.name
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11 * expected.max(), err_msg=block.name)
    assert len(set(seen)) == len(seen)
    unused = sorted({*range(len(G))} - {*seen})
    np.testing.assert_array_equal(G[unused], 0)

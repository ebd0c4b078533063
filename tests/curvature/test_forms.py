"""Forms in which factors are kept: thin ones equal the whole ones, long axes are diagonals, sketches add up."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import bilevax as bx
from bilevax import curvature
from bilevax.curvature import fisher, kronecker

KEY = jax.random.key(0)
N, T, D, WORDS, C = 2, 3, 18, 40, 16
DAMPING = 0.1


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 3)


Y = {
    "table": normal(0, WORDS, D),
    "stack": {"bias": normal(1, 2, D), "kernel": normal(2, 2, D, D)},
    "head": {"bias": normal(3, C), "kernel": normal(4, D, C)},
}
IDS, LABELS = jnp.array([[3, 1, 3], [7, 39, 0]]), jnp.array([[0, 1, 2], [2, 1, 0]])
MASK = jnp.array([[1, 1, 0], [1, 1, 1]])
WEIGHTS = jnp.array([0.5, 2.0])
BATCH = (IDS, LABELS)


def network(y, ids):
    """A table, two layers in a scan, a head: 6 rows of activations in each."""

    def layer(h, w):
        return h + jnp.tanh(h @ w["kernel"] + w["bias"][None, None]), None

    h, _ = jax.lax.scan(layer, y["table"][ids], y["stack"])
    return h @ y["head"]["kernel"] + y["head"]["bias"][None, None]


def make(model=network, **parts):
    loss = curvature.softmax_cross_entropy
    return curvature.ModelLoss(model, loss, lambda x, batch: batch, **{"weights": lambda x, batch: x, **parts})


LOSS = make(mask=lambda batch: MASK, l2=0.01)


def whole(name):
    """The Inverse of this name, of factors that are kept whole."""
    return getattr(kronecker, name)._replace(form=lambda size, rows: curvature.forms.dense)


def prepared(ihvp, loss, x, y, batch):
    return ihvp.prepare(KEY, ihvp.init(x, y, batch, loss), loss, (x, y, batch))[0]


@functools.cache
def compiled(ihvp, loss=LOSS):
    return jax.jit(lambda x, y, batch, b: prepared(ihvp, loss, x, y, batch)(b))


def solve(ihvp, loss=LOSS, x=WEIGHTS, y=Y, batch=BATCH):
    v, info = compiled(ihvp, loss)(x, y, batch, jax.tree.map(jnp.cos, y))
    return np.asarray(ravel_pytree(v)[0]), info


@functools.partial(jax.jit, static_argnums=0, static_argnames=("fisher", "inverse", "largest"))
def measured(loss, y, batch, **choices):
    return kronecker.factors(None, loss, None, y, batch, **choices)


def kfac(**choices):
    return bx.ihvp.kfac(**{"damping": DAMPING, **choices})


THIN = kfac()
WHOLE = kfac(inverse=whole("spectral"))


def test_what_is_kept():
    """6 rows are fewer than half of 18 and of 19; the table has a diagonal."""
    parts = jax.eval_shape(lambda: bx.ihvp.kfac(inverse_every=2).init(WEIGHTS, Y, BATCH, LOSS)).parts.blocks
    assert [leaf.shape for leaf in jax.tree.leaves(parts["stack/kernel"])] == [(2, D + 1, 6), (2, D, 6), (2, 6, 6)]
    assert parts["table"].qa is None
    assert [leaf.shape for leaf in parts["table"][1:3]] == [(D, 6), (WORDS, 6)]
    rows = {row.leaves[0]: row for row in curvature.describe(LOSS, WEIGHTS, Y, BATCH).rows}
    assert "A rows [6, 19], B rows [6, 18]" in rows["stack/kernel"].sizes
    assert rows["stack/kernel"].bytes == 8 * 2 * (6 * 19 + 6 * 18)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"damping": lambda eigenvalues: 0.1 + jnp.mean(eigenvalues)},
        {"fisher": fisher.sampled(2)},
        {"sharing": curvature.reduce},
    ],
    ids=["plain", "function", "two_columns", "reduce"],
)
def test_from_the_rows_it_is_the_same_inverse(choices):
    thin, info = solve(kfac(**choices))
    expected, other = solve(kfac(**choices, inverse=whole("spectral")))
    np.testing.assert_allclose(thin, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    np.testing.assert_allclose(info.curvature, other.curvature, rtol=1e-6)
    assert not info.breakdown


def test_corrected_eigenvalues_are_the_same_from_the_rows():
    """Beside factors that are kept for later steps, and therefore whole."""
    loss = make(l2=0.01)
    thin, _ = solve(bx.ihvp.ekfac(damping=DAMPING), loss)
    expected, _ = solve(bx.ihvp.ekfac(damping=DAMPING, inverse_every=2), loss)
    np.testing.assert_allclose(thin, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_without_damping_it_is_a_breakdown():
    _, info = solve(kfac(damping=0.0), make())
    assert info.breakdown


def twice(y, inputs):
    return jnp.tanh(jnp.tanh(inputs @ y) @ y)


def repeated(y, inputs):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ y), None), inputs, None, length=3)[0]


def once(y, inputs):
    return jnp.tanh(inputs @ y)


@pytest.mark.parametrize(("model", "thin"), [(once, True), (twice, False), (repeated, False)])
def test_rows_of_several_uses_would_add_up(model, thin):
    y, batch = normal(5, D, D), (normal(6, N, D), jnp.arange(N))
    loss = make(model)
    (row,) = curvature.describe(loss, WEIGHTS, y, batch).rows
    assert ("rows" in row.sizes) == thin
    v, _ = solve(THIN, loss, y=y, batch=batch)
    expected, _ = solve(WHOLE, loss, y=y, batch=batch)
    np.testing.assert_allclose(v, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_a_long_axis_is_a_diagonal():
    """A of a layer 18 -> 16 above 17, and B too above 15."""
    y, batch = normal(5, D, C), (normal(6, 30, D), jnp.asarray(np.arange(30) % C))
    loss = make(lambda y, inputs: inputs @ y, weights=None)
    found = measured(loss, y, batch, fisher=fisher.exact)["y"]
    A, B = np.asarray(found.A), np.asarray(found.B)
    b = np.cos(np.asarray(y)).ravel()
    pi = np.sqrt((np.trace(A) / D) / (np.trace(B) / C))
    left, right = pi * np.sqrt(DAMPING) * np.eye(D), np.sqrt(DAMPING) / pi * np.eye(C)
    for largest, first, second in ((17, np.diag(np.diag(A)), B), (15, np.diag(np.diag(A)), np.diag(np.diag(B)))):
        matrix = np.kron(first, second) + DAMPING * np.eye(D * C)
        overdamped = np.kron(first + left, second + right) if largest == 17 else matrix
        for inverse, expected in ((kronecker.spectral, matrix), (kronecker.factored, overdamped)):
            ihvp = kfac(fisher=fisher.exact, inverse=inverse, largest=largest)
            v, _ = solve(ihvp, loss, None, y, batch)
            np.testing.assert_allclose(v, np.linalg.solve(expected, b), rtol=1e-9)
    ihvp = bx.ihvp.ekfac(damping=DAMPING, fisher=fisher.exact, largest=15)
    v, _ = solve(ihvp, loss, None, y, batch)
    G = jax.jit(jax.hessian(lambda flat: loss(None, flat.reshape(D, C), batch)))(y.ravel())
    np.testing.assert_allclose(v, b / (np.diag(G) + DAMPING), rtol=1e-9)


def test_the_output_layer_of_a_large_vocabulary_is_a_diagonal():
    """B alone: the transpose of the layer above."""
    y, batch = normal(5, C, D), (normal(6, 30, C), jnp.asarray(np.arange(30) % D))
    loss = make(lambda y, inputs: inputs @ y, weights=None)
    found = measured(loss, y, batch, fisher=fisher.exact, largest=17)["y"]
    assert found.A.shape == (C, C)
    assert found.B.shape == (D,)
    v, _ = solve(kfac(fisher=fisher.exact, largest=17), loss, None, y, batch)
    matrix = np.kron(found.A, np.diag(found.B)) + DAMPING * np.eye(D * C)
    np.testing.assert_allclose(v, np.linalg.solve(matrix, np.cos(np.asarray(y)).ravel()), rtol=1e-9)


# Sketches.


def test_a_sketch_of_more_columns_than_eigenvalues_is_exact():
    """Factors of rank 6 by 8 columns, where they are kept whole and where rows were forbidden."""
    expected, _ = solve(WHOLE)
    v, _ = solve(kfac(inverse=kronecker.low_rank(8), ema=0.5))
    np.testing.assert_allclose(v, expected, rtol=0, atol=1e-7 * np.abs(expected).max())
    v, _ = solve(kfac(inverse=kronecker.low_rank(9)))
    np.testing.assert_allclose(v, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_sketches_add_up():
    """The mean of those of two halves is that of all."""
    y, batch = normal(5, D, C), (normal(6, 30, D), jnp.asarray(np.arange(30) % C))
    loss = make(lambda y, inputs: inputs @ y, weights=None)
    choices = {"fisher": fisher.exact, "inverse": kronecker.low_rank(5)}
    halves = (jax.tree.map(lambda a, s=s: np.asarray(a)[s], batch) for s in (slice(15), slice(15, 30)))
    one, two, both = (jax.device_get(measured(loss, y, data, **choices)) for data in (*halves, batch))
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose((a + b) / 2, c, atol=1e-12), one, two, both)
    assert isinstance(both["y"].A, kronecker.Sketch)
    inverted = functools.partial(curvature.inverted, damping=0.1, inverse=kronecker.low_rank(5))
    v = jax.jit(lambda found, y: inverted(found, loss, None, y, batch)(y))(both, y)
    K = np.kron(*(np.asarray(factor) for factor in nystrom(both["y"]))) + 0.1 * np.eye(D * C)
    np.testing.assert_allclose(np.ravel(v), np.linalg.solve(K, np.ravel(y)), rtol=1e-6)


def nystrom(entry):
    """Y (ΩᵀY)⁻¹ Yᵀ of both factors, and the mean of the other eigenvalues on what that does not span."""
    for factor in (entry.A, entry.B):
        if not isinstance(factor, kronecker.Sketch):
            rows = isinstance(factor, kronecker.Rows)
            yield np.asarray(factor.rows.T @ factor.rows if rows else factor if factor.ndim == 2 else jnp.diag(factor))
            continue
        image = np.asarray(factor.image)
        (size, rank), q = image.shape, np.linalg.qr(image)[0]
        omega = np.asarray(curvature.forms.random_matrix(size, rank, jnp.float64))
        shown = image @ np.linalg.solve(omega.T @ image, image.T)
        yield shown + (factor.trace - np.trace(shown)) / (size - rank) * (np.eye(size) - q @ q.T)


@pytest.mark.parametrize(("largest", "decay"), [(1e2, 1e-5), (1e6, 1e-3), (1e7, 1e-5)])
def test_rows_and_sketches_stay_positive_in_single_precision(largest, decay):
    """vᵀ K⁻¹ v of each eigenvector where the condition number is up to 1e10: exact by rows, > 0 by a sketch too."""
    with jax.enable_x64(False):
        rng, rows, size = np.random.default_rng(0), 60, 200
        u, q = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (rows, size))
        X = jnp.asarray(u * np.sqrt(largest * np.geomspace(1, decay, rows)) @ q.T[:rows], jnp.float32)
        values, vectors = np.linalg.eigh(np.asarray(X, float).T @ np.asarray(X, float))

        @jax.jit
        def quotients(factor, vectors):
            parts = kronecker.by_shape.decompose(factor, jnp.ones((1, 1)), 1e-3)
            one = lambda v: v @ kronecker.by_shape.solve(parts, 1e-3, v[:, None])[:, 0]  # noqa: E731
            return jax.vmap(one, 1)(jnp.asarray(vectors, jnp.float32))

        exact = 1 / (values + 1e-3)
        assert np.all(np.abs(quotients(curvature.forms.Rows(X), vectors) / exact - 1) < 0.01)
        assert np.all(quotients(curvature.forms.sketch(64).sum(X, None), vectors) > 0)


@functools.partial(jax.jit, static_argnames="forms")
def tailed(X, Z, v, forms):
    """What low_rank makes of two factors of these rows: parts, A⊗B damped, inverted and applied, all eigenvalues."""
    parts = curvature.inverse.eigen(*(form.sum(rows, None) for form, rows in zip(forms, (X, Z), strict=True)), DAMPING)
    return parts, curvature.inverse.eigen_solve(parts, DAMPING, v), curvature.inverse.whole_eigenvalues(parts)


FORMS = curvature.forms
SKETCHES = {
    "both": (FORMS.sketch(5), FORMS.sketch(4)),
    "first": (FORMS.sketch(5), FORMS.dense),
    "second": (FORMS.dense, FORMS.sketch(4)),
    "beside_rows": (FORMS.rows, FORMS.sketch(4)),
    "beside_a_diagonal": (FORMS.diagonal, FORMS.sketch(4)),
}


@pytest.mark.parametrize("forms", SKETCHES.values(), ids=SKETCHES)
def test_outside_of_a_sketch_is_the_mean_of_the_other_eigenvalues(forms):
    rows = 3 if forms[0] is FORMS.rows else 40
    X, Z, v = 3 * normal(7, rows, D), 3 * normal(8, 40, C), normal(9, D, C)
    _, found, eigenvalues = tailed(X, Z, v, forms)
    entry = kronecker.Kronecker(forms[0].sum(X, None), jnp.ones(()), forms[1].sum(Z, None))
    K = np.kron(*nystrom(entry))
    np.testing.assert_allclose(np.ravel(found), np.linalg.solve(K + DAMPING * np.eye(D * C), np.ravel(v)), rtol=1e-6)
    np.testing.assert_allclose(np.sort(np.ravel(eigenvalues)), np.linalg.eigvalsh(K), atol=1e-6 * np.abs(K).max())


def test_many_rows_do_not_lengthen_what_a_sketch_inverts():
    """Far more rows than columns of the sketch, eigenvalues that fall slowly: 10 times too long, were the others 0."""
    rng, size = np.random.default_rng(0), 120
    X, Z = (jnp.asarray(rng.normal(size=(900, size)) * np.arange(1.0, 1 + size) ** -0.25 / 10) for _ in range(2))
    v = normal(9, size, size)
    parts, found, _ = tailed(X, Z, v, (FORMS.sketch(20), FORMS.sketch(20)))
    _, exact, _ = tailed(X, Z, v, (FORMS.dense, FORMS.dense))
    without = curvature.inverse.eigen_solve(parts._replace(tail=None), DAMPING, v)
    error = lambda w: np.linalg.norm(w - exact) / np.linalg.norm(exact)  # noqa: E731
    assert error(found) < 0.8
    assert error(without) > 6


def test_corrected_eigenvalues_count_in_what_a_sketch_shows():
    """Outside of it EKFAC takes what KFAC takes; between decompositions a sketch shows its basis at once."""
    y, batch = normal(5, D, C), (normal(6, 30, D), jnp.asarray(np.arange(30) % C))
    loss = make(lambda y, inputs: inputs @ y, weights=None)
    choices = {"damping": DAMPING, "fisher": fisher.exact, "blocks": {"y": 5}}
    found = jax.device_get(measured(loss, y, batch, fisher=fisher.exact, inverse=kronecker.low_rank(5))["y"])
    (A, B), G = nystrom(found), jax.jit(jax.hessian(lambda flat: loss(None, flat.reshape(D, C), batch)))(y.ravel())
    spans = (np.linalg.qr(np.asarray(factor.image))[0] for factor in (found.A, found.B))
    Q = np.kron(*(q @ np.linalg.eigh(q.T @ matrix @ q)[1] for q, matrix in zip(spans, (A, B), strict=True)))
    K = np.kron(A, B) + Q @ (np.diag(np.einsum("ij,ik,kj->j", Q, G, Q)) - Q.T @ np.kron(A, B) @ Q) @ Q.T
    v, info = solve(bx.ihvp.ekfac(**choices), loss, None, y, batch)
    np.testing.assert_allclose(v, np.linalg.solve(K + DAMPING * np.eye(D * C), np.cos(np.ravel(y))), rtol=1e-6)
    np.testing.assert_allclose(info.curvature, np.linalg.eigvalsh(K)[0] + DAMPING, rtol=1e-6)

    @functools.partial(jax.jit, static_argnums=0)
    def second(every, other):
        ihvp = bx.ihvp.ekfac(**choices, ema=0.5, inverse_every=every)
        state = ihvp.init(None, y, batch, loss)
        for inputs in (batch[0], other):
            apply, state = ihvp.prepare(None, state, loss, (None, y, (inputs, batch[1])))
        return apply(y)[0]

    np.testing.assert_allclose(second(9, normal(7, 30, D)), second(1, normal(7, 30, D)), rtol=1e-6)


@pytest.mark.parametrize("largest", [1e2, 1e5])
def test_two_sketches_stay_symmetric_and_positive_in_single_precision(largest):
    with jax.enable_x64(False):
        rng, rows, size = np.random.default_rng(0), 60, 80
        u, q = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (rows, size))
        X = jnp.asarray(u * np.sqrt(largest * np.geomspace(1, 1e-5, rows)) @ q.T[:rows], jnp.float32)
        eigenvectors = np.concatenate([q[:, :3], q[:, 35:38], q[:, -3:]], axis=1)
        forms = (FORMS.sketch(24), FORMS.sketch(24))
        vectors = [jnp.asarray(np.outer(a, b), jnp.float32) for a in eigenvectors.T for b in eigenvectors.T]
        solved = np.array([np.ravel(tailed(X, X, v, forms)[1]) for v in vectors], float)
        gram = solved @ np.array([np.ravel(v) for v in vectors], float).T
        assert np.all(np.linalg.eigvalsh((gram + gram.T) / 2) > 0)
        root = np.sqrt(np.diag(gram))
        assert np.max(np.abs(gram - gram.T) / np.outer(root, root)) < 1e-4


# Which form by default, and what a state keeps.


def test_the_form_follows_from_the_shape():
    """Rows where they are at most half, the whole up to 1024, else a sketch of 256; of low_rank where it is less."""
    shown = lambda inverse, size, rows: str(inverse.form(size, rows))  # noqa: E731
    by_shape, low_rank = kronecker.by_shape, kronecker.low_rank(64)
    assert [shown(by_shape, 768, rows) for rows in (384, 385, None)] == ["rows", "dense", "dense"]
    assert [shown(by_shape, 3072, rows) for rows in (1536, 1537, None)] == ["rows", "sketch(256)", "sketch(256)"]
    assert [shown(low_rank, size, None) for size in (128, 129)] == ["dense", "sketch(64)"]
    assert [shown(low_rank, 768, rows) for rows in (128, 129)] == ["rows", "sketch(64)"]
    assert {shown(one, 9000, 5) for one in (kronecker.spectral, kronecker.factored)} == {"dense"}


def test_a_state_keeps_what_it_averages_and_no_more():
    for choices, kept in (({"inverse_every": 3}, False), ({"ema": 0.5}, True), ({"factors_every": 2}, True)):
        state = jax.eval_shape(lambda choices=choices: kfac(**choices).init(WEIGHTS, Y, BATCH, LOSS))
        assert bool(state.factors) == kept
    thin = jax.eval_shape(lambda: kfac(inverse_every=3).init(WEIGHTS, Y, BATCH, LOSS))
    assert sum(leaf.size for leaf in jax.tree.leaves(thin)) < 2 * ravel_pytree(Y)[0].size


def test_stacked_layers_are_decomposed_one_by_one():
    """Batches of matrices at once may never come back from LAPACK."""
    ihvp = kfac(inverse=kronecker.spectral)
    program = str(jax.make_jaxpr(lambda b: prepared(ihvp, LOSS, WEIGHTS, Y, BATCH)(b)[0])(Y))
    found = re.findall(r":f64\[([\d,]+)\] \w+:f64\[[\d,]+\] = eigh", program)
    assert {f"{D},{D}", f"{D + 1},{D + 1}"} <= {*found}
    assert all(shape.count(",") == 1 for shape in found)

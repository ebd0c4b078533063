"""Random directions: E[v vᵀ] = I, and the noise that each sampler declares is the noise that it makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from directional_cases import KEY, assert_mean, flat

import bilevax as bx
from bilevax.inner.random_directions import coordinate, gaussian, hadamard, orthogonal, rademacher, sphere

SAMPLERS = {
    "rademacher": rademacher,
    "gaussian": gaussian,
    "sphere": sphere,
    "orthogonal": orthogonal,
    "hadamard": hadamard,
    "coordinate": coordinate,
}
over_samplers = pytest.mark.parametrize("name", SAMPLERS)
TREE = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2, jnp.float32), "c": jnp.zeros((), jnp.float16), "d": jnp.zeros(3)}


def eager_draw(sampler, number, like, key=KEY):
    """All directions at once, leaves [number, ...]."""
    return jax.vmap(sampler.draw(key, like, number))(jnp.arange(number))


draw = jax.jit(eager_draw, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def draw_many(sampler, number, like, times):
    """Leaves [times, number, ...], for as many keys."""
    keys = jax.random.split(jax.random.key(1), times)
    return jax.vmap(lambda key: eager_draw(sampler, number, like, key))(keys)


def draws(sampler, number, N, times):
    return np.asarray(draw_many(sampler, number, jnp.zeros(N), times))


def declared(name, N, b):
    P = 1 << (N - 1).bit_length()
    return {
        "rademacher": (N - 1) / b,
        "gaussian": (N + 1) / b,
        "sphere": (N - 1) / b,
        "orthogonal": (N - b) / b,
        "hadamard": (N - 1) * (P - b) / (b * (P - 1)),
        "coordinate": (N - b) / b,
    }[name]


@pytest.mark.parametrize(
    ("name", "N", "b"),
    [(name, 20, b) for name in SAMPLERS for b in (1, 4, 16)] + [("hadamard", 8, 4), ("hadamard", 5, 4)],
)
def test_noise(name, N, b):
    """Also where the Hadamard matrix is larger than N: rows chosen by xor would give 0.09 of the noise at (5, 4)."""
    u = np.random.default_rng(N + b).normal(size=N)
    V = draws(SAMPLERS[name], b, N, max(20_000 // b, 4000))
    squared_errors = np.sum((np.einsum("kbn,kb->kn", V, V @ u) / b - u) ** 2, axis=1) / (u @ u)
    noise = SAMPLERS[name].noise(N, b)
    assert noise == pytest.approx(declared(name, N, b), rel=1e-12)
    assert_mean(squared_errors, noise)
    assert squared_errors.mean() == pytest.approx(noise, rel=0.03)
    assert_mean(V[:, -1, :, None] * V[:, -1, None, :], np.eye(N), errors=5)


@pytest.mark.parametrize(
    ("sampler", "N", "b"),
    [(orthogonal, 6, 6), (coordinate, 6, 6), (hadamard, 8, 8), (hadamard, 5, 8), (hadamard, 1, 1), (rademacher, 1, 1)],
)
def test_as_many_directions_as_there_are_numbers_are_exact(sampler, N, b):
    V = draws(sampler, b, N, 5)
    np.testing.assert_allclose(np.einsum("kbm,kbn->kmn", V, V) / b, np.broadcast_to(np.eye(N), (5, N, N)), atol=1e-14)
    assert sampler.noise(N, b) == 0


def test_what_the_directions_look_like():
    V = {name: draws(sampler, 4, 6, 50) for name, sampler in SAMPLERS.items()}
    for name in ("rademacher", "hadamard"):
        np.testing.assert_array_equal(np.abs(V[name]), 1)
    for name in ("sphere", "orthogonal", "coordinate"):
        np.testing.assert_allclose(np.linalg.norm(V[name], axis=2), np.sqrt(6), rtol=1e-14)
    for name in ("orthogonal", "coordinate"):
        gram = np.broadcast_to(6 * np.eye(4), (50, 4, 4))
        np.testing.assert_allclose(np.einsum("kbn,kcn->kbc", V[name], V[name]), gram, atol=1e-13)
    np.testing.assert_array_equal(np.count_nonzero(V["coordinate"], axis=2), 1)


@over_samplers
def test_pytrees_keep_their_structure_shapes_and_dtypes(name):
    V = draw(SAMPLERS[name], 8, TREE)
    jax.tree.map(lambda rows, like: np.testing.assert_equal(rows.shape, (8, *like.shape)), V, TREE)
    jax.tree.map(lambda rows, like: np.testing.assert_equal(rows.dtype, like.dtype), V, TREE)
    assert len(np.unique(flat(V, axes=1), axis=0)) == 8
    # The leaves are parts of one vector: their products vanish in the mean like those within a leaf.
    V = flat(draw_many(SAMPLERS[name], 3, TREE, 4000), axes=2)[:, 2]
    tolerance = 5 * np.std(V[:, :, None] * V[:, None, :], axis=0) / np.sqrt(4000) + 1e-3  # half precision
    np.testing.assert_array_less(np.abs(V.T @ V / 4000 - np.eye(12)), tolerance)


@over_samplers
def test_another_key_is_another_draw(name):
    assert not np.allclose(flat(draw(SAMPLERS[name], 8, TREE, jax.random.key(7))), flat(draw(SAMPLERS[name], 8, TREE)))


@pytest.mark.parametrize("name", ["rademacher", "orthogonal"])
def test_jit_is_eager(name):
    like = jnp.zeros(6)
    np.testing.assert_allclose(draw(SAMPLERS[name], 3, like), eager_draw(SAMPLERS[name], 3, like), atol=1e-14)


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"orthogonal"}))
def test_a_direction_depends_on_its_number_and_the_key_alone(name):
    few, many = (draw(SAMPLERS[name], number, jnp.zeros(9)) for number in (3, 8))
    np.testing.assert_allclose(few, many[:3], rtol=1e-14)
    row = jax.jit(lambda i: SAMPLERS[name].draw(KEY, jnp.zeros(9), 3)(i))(1)
    np.testing.assert_allclose(row, few[1], rtol=1e-14)


@pytest.mark.parametrize(("name", "number", "most"), [("orthogonal", 6, 5), ("coordinate", 6, 5), ("hadamard", 9, 8)])
def test_more_directions_than_there_can_be(name, number, most):
    with pytest.raises(ValueError, match=rf"directions .*{name}") as caught:
        SAMPLERS[name].draw(KEY, jnp.zeros(5), number)
    assert f"got {number}" in str(caught.value)
    assert str(most) in str(caught.value)
    SAMPLERS[name].draw(KEY, jnp.zeros(5), most)


def scaled(factor, shape=(4,), dtype=float):
    """A sampler of one's own."""

    def draw(key, like, number):
        return lambda i: factor * jax.random.normal(jax.random.fold_in(key, i), shape, dtype)

    return bx.inner.random_directions.Sampler(draw, gaussian.noise)


@pytest.mark.parametrize("number", [1, 8])
def test_samplers_that_pass_the_check(number):
    for sampler in (*SAMPLERS.values(), scaled(1.0), scaled(-1.0)):
        bx.inner.random_directions.check_sampler(sampler, jnp.zeros(4), min(number, 4))


@pytest.mark.parametrize(
    ("sampler", "says"),
    [
        (scaled(0.5), ["sampler must draw entries of mean square 1", "got 0.2", "Divide v by 0.5"]),
        (scaled(1.3), ["sampler must draw entries of mean square 1", "Divide v by 1.3"]),
        (scaled(jnp.nan), ["sampler must draw entries of mean square 1", "got nan"]),
        (scaled(1.0, (4, 1)), ["v of the sampler must keep its structure and shapes", "(4, 1)", "(4,)"]),
        (scaled(1.0, (3,)), ["v of the sampler must keep its structure and shapes", "(3,)", "(4,)"]),
        (scaled(1.0, dtype=jnp.float32), ["v of the sampler must have the dtype of x", "float32", "float64"]),
        (jax.random.normal, ["sampler must be a Sampler", "bx.inner.random_directions.rademacher"]),
    ],
    ids=["small", "large", "nan", "column", "short", "dtype", "function"],
)
def test_samplers_that_do_not(sampler, says):
    with pytest.raises(ValueError, match="sampler") as caught:
        bx.inner.random_directions.check_sampler(sampler, jnp.zeros(4), 4)
    assert [part for part in says if part not in str(caught.value)] == []


def test_the_check_of_a_sampler_needs_its_numbers():
    """Also where an estimate is traced; a traced factor cannot be judged."""

    def check(factor):
        bx.inner.random_directions.check_sampler(scaled(factor), jnp.zeros(4), 4)
        return factor

    assert jax.jit(check)(3.0) == 3.0
    with pytest.raises(ValueError, match="Divide v by 3"):
        jax.jit(lambda x: x + check(3.0))(1.0)

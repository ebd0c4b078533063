"""The exact Fisher where examples interact: signs remove the products of two outputs, and change nothing elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import KEY, by_perturbation, corrected, make, output_curvature, untapped

from bilevax.curvature import fisher, kronecker

N, D, H, C = 6, 3, 4, 3
X = jnp.asarray(np.linspace(-0.5, 0.5, N))
RANDOM = np.random.default_rng(0)
Y = {
    "head": jnp.asarray(RANDOM.normal(size=(H, C))),
    "hidden": jnp.asarray(RANDOM.normal(size=(D, H))),
    "scale": jnp.asarray(RANDOM.normal(1, 0.2, size=(1, H))),
}
LAYERS = ("hidden", "head")
FEATURES, LABELS = jnp.asarray(RANDOM.normal(size=(N, D))), jnp.asarray(np.arange(N) % C)
GRAPH = {"edges": jnp.asarray(RANDOM.random(size=(N, N))), "features": FEATURES}


def network(between):
    """Two layers, with something between them."""

    def model(y, inputs, observe=untapped):
        a = jax.tree.leaves(inputs)[-1]
        z = observe(a @ y["hidden"], a, y["hidden"])
        a = jnp.tanh(between(z, inputs) * y["scale"])
        return observe(a @ y["head"], a, y["head"])

    return model


def normalised(axis):
    return lambda z, inputs: (z - z.mean(axis, keepdims=True)) / jnp.sqrt(z.var(axis, keepdims=True) + 1e-2)


def mean_of_neighbours(z, inputs):
    return inputs["edges"] @ z / inputs["edges"].sum(1, keepdims=True)


INTERACTING = {
    "batch norm": (network(normalised(axis=0)), (FEATURES, LABELS)),
    "graph network": (network(mean_of_neighbours), (GRAPH, LABELS)),
}
GROUP_NORM = network(normalised(axis=1)), (FEATURES, LABELS)


def measure(model, choice):
    """(key, bases, batch) -> factors B, the diagonal of the scale, and the squares in the bases: an array for each."""
    inner_loss = make(model)

    def all_of(key, bases, batch):
        found = kronecker.factors(key, inner_loss, X, Y, batch, fisher=choice)
        parts = {f"B of {name}": found[name].B for name in bases} | {"scale": found["scale"].diagonal}
        squares = corrected(key, inner_loss, X, Y, batch, bases, choice)
        return parts | {f"squares of {name}": part for name, part in squares.items()}

    return all_of


def eigenbases(model, batch):
    """Of A and B written out."""
    factors = by_perturbation(model, X, Y, batch)
    return {name: kronecker.spectral.decompose(*pair, 0.0) for name, pair in zip(LAYERS, factors, strict=True)}


@functools.partial(jax.jit, static_argnums=0)
def written_out(model, bases, batch):
    """Sums over each example n of the outputs' curvature L in the directions that lead through n alone."""
    rows = []
    outputs = model(Y, batch[0], lambda z, a, w: rows.append(a) or z)
    L = output_curvature(make(model), outputs, X, batch)

    def shifted(shifts, scale):
        left = iter(shifts)
        return model({**Y, "scale": scale}, batch[0], lambda z, a, w: z + next(left)).ravel()

    scales = jnp.repeat(Y["scale"], N, axis=0)
    jacobians, of_scale = jax.jacobian(shifted, argnums=(0, 1))([jnp.zeros((N, H)), jnp.zeros((N, C))], scales)
    sums = {"scale": jnp.einsum("knd,kl,lnd->d", of_scale, L, of_scale)[None]}
    for name, a, J in zip(LAYERS, rows, jacobians, strict=True):
        along = jnp.einsum("knd,dj->knj", J, bases[name].qb)
        sums[f"B of {name}"] = jnp.einsum("knd,kl,lne->de", J, L, J)
        sums[f"squares of {name}"] = jnp.einsum("ni,knj,kl,lnj->ij", (a @ bases[name].qa) ** 2, along, L, along)
    return sums


@pytest.mark.parametrize("choice", [fisher.exact, fisher.sampled(C)], ids=["exact", "sampled"])
@pytest.mark.parametrize("name", INTERACTING)
def test_where_examples_interact_both_are_unbiased(name, choice):
    """Over 2,000 draws of signs, or of labels, against all pairs of outputs written out."""
    model, batch = INTERACTING[name]
    bases = eigenbases(model, batch)
    draw = jax.jit(jax.vmap(measure(model, choice), (0, None, None)))
    draws = jax.device_get(draw(jax.random.split(KEY, 2000), bases, batch))
    expected = written_out(model, bases, batch)
    assert set(draws) == set(expected)
    for part, drawn in draws.items():
        error = drawn.std(0) / np.sqrt(len(drawn))
        np.testing.assert_array_less(np.abs(drawn.mean(0) - expected[part]), 5 * error + 1e-10, err_msg=part)


def without_signs(key, loss, outputs, targets):
    size = outputs[0].size
    return size, lambda k: loss.root(outputs, targets, jnp.broadcast_to(jnp.eye(size)[k], outputs.shape))


def test_where_they_do_not_signs_change_nothing_to_the_bit():
    model, batch = GROUP_NORM
    bases = eigenbases(model, batch)
    signed = jax.jit(measure(model, fisher.exact))
    found = signed(KEY, bases, batch)
    expected = written_out(model, bases, batch)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-12, err_msg=name)
    for other in (signed(jax.random.key(7), bases, batch), jax.jit(measure(model, without_signs))(KEY, bases, batch)):
        jax.tree.map(np.testing.assert_array_equal, other, found)


def test_without_a_key_the_signs_are_the_same_every_time():
    model, batch = INTERACTING["batch norm"]
    find = jax.jit(lambda key: kronecker.factors(key, make(model), X, Y, batch, fisher=fisher.exact)["hidden"].B)
    np.testing.assert_array_equal(find(None), find(None))
    assert np.abs(find(KEY) - find(jax.random.key(1))).max() > 1e-3

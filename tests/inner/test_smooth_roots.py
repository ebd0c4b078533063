"""Derivatives through optimizers where one entry of the gradient is exactly zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.inner._smooth_roots import smooth_roots

X, Y0 = jnp.array([-1.0, 0.5]), jnp.array([0.0, 1.0, 1.0])
OPTIMIZERS = {
    "adabelief": optax.adabelief(0.1, eps_root=0.0),
    "adagrad": optax.adagrad(0.1, initial_accumulator_value=0.0),
    "adam": optax.adam(0.1),
    "adam_in_a_condition": optax.apply_if_finite(optax.adam(0.1), 3),
    "adamw_clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1)),
    "amsgrad": optax.amsgrad(0.1),
    "lamb": optax.lamb(0.1),
    "cube_root": optax.stateless(lambda g, _: jax.tree.map(lambda g: -0.1 * g / (jnp.cbrt(g**2) + 1e-8), g)),
    "multi_steps": optax.MultiSteps(optax.nadam(0.1), 2).gradient_transformation(),
    "novograd": optax.novograd(0.1),
    "radam": optax.radam(0.1),
    "rmsprop": optax.rmsprop(0.1, eps_in_sqrt=False, centered=True),
    "yogi": optax.chain(optax.scale_by_yogi(initial_accumulator_value=0.0), optax.scale(-0.1)),
}


def inner_loss(x, y, batch):
    """The gradient in y[1] is 0 at first, that in y[2] always; without matrices, which compile slowly."""
    return jnp.exp(x[0]) * (y[0] - 2) ** 2 + jnp.exp(x[1]) * (y[0] * y[1]) ** 2


def outer_loss(x, y, batch):
    return (y[0] * y[1] - 0.5) ** 2


def estimates(*solvers):
    def estimate(solver):
        hypergrad = bx.hypergradient(outer_loss, solver)
        return hypergrad.estimate(jax.random.key(0), hypergrad.init(X, Y0), X, bx.Batch(None, None))[0]

    return jax.jit(lambda: [estimate(solver) for solver in solvers])()


def coordinate(optimizer, steps):
    sampler = bx.inner.random_directions.coordinate
    return bx.inner.forward_gradient(inner_loss, optimizer, steps, directions=2, sampler=sampler)


DAILY = ("adam_in_a_condition", "adamw_clipped", "cube_root", "rmsprop")


@pytest.mark.parametrize(
    "name", [name if name in DAILY else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS]
)
def test_cotangents_are_the_transposes_of_tangents(name):
    reverse, forward = estimates(bx.inner.reverse(inner_loss, OPTIMIZERS[name], 4), coordinate(OPTIMIZERS[name], 4))
    assert np.abs(forward).max() > 1e-8
    np.testing.assert_allclose(reverse, forward, rtol=1e-6, atol=0)


def test_every_solver_with_cotangents_has_the_derivative_of_the_run():
    def run(x):
        y, state = Y0, adam.init(Y0)
        for _ in range(4):
            updates, state = adam.update(jax.grad(inner_loss, 1)(x, y, None), state, y)
            y = optax.apply_updates(y, updates)
        return outer_loss(x, y, None)

    adam = optax.adam(0.1)
    reverse = bx.inner.reverse(inner_loss, adam, 4, checkpoint=bx.inner.store_products(every=2))
    last = bx.inner.reverse(inner_loss, adam, 2)
    solve = bx.differentiable(bx.inner.reverse(inner_loss, adam, 4, checkpoint=bx.inner.two_level))
    program, h = jax.jit(run), 1e-5 * jnp.eye(2)
    expected = [(program(X + step) - program(X - step)) / 2e-5 for step in h]
    results = estimates(reverse, bx.inner.chain(coordinate(adam, 2), last), bx.inner.chain(last, last))
    results.append(jax.jit(jax.grad(lambda x: outer_loss(x, solve(x, Y0, None), None)))(X))
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=0)


def test_second_derivatives_pass_a_parameter_without_gradient():
    """As if it were not there, in both orders."""
    solve = bx.differentiable(bx.inner.reverse(inner_loss, optax.adam(0.1), 2))
    y = jnp.array([0.5, 1.0])

    def outer(x, y):
        return outer_loss(x, solve(x, y, None), None)

    expected = jax.jit(jax.hessian(outer))(X, y)
    more = jnp.append(y, 1.0)
    for derivative in (jax.hessian(outer), jax.jacrev(jax.grad(outer))):
        np.testing.assert_allclose(jax.jit(derivative)(X, more), expected, rtol=1e-9, atol=0)


# In the parts of a program.

ROOTS = {
    "sqrt": (jnp.sqrt, 0.5),
    "rsqrt": (jax.lax.rsqrt, -0.5),
    "cbrt": (jnp.cbrt, 1 / 3),
    "power": (lambda s: s**0.75, 0.75),
    "negative_power": (lambda s: s**-2, -2),
}
WITHIN = {
    "nothing": lambda root: root,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "cond": lambda root: lambda s: jax.lax.cond(jnp.sum(s) >= 0, root, lambda s: s, s),
    "scan": lambda root: lambda s: jax.lax.scan(lambda c, row: (c + row, root(row)), s[0], s)[1],
    "map_in_jit": lambda root: jax.jit(lambda s: jax.lax.map(root, s)),
    "while": lambda root: lambda s: jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (1, root(c[1])), (0, s))[1],
}
S = jnp.array([0.0, 0.0, 0.25, 1.0])


@pytest.mark.parametrize(
    ("root", "within"),
    [(root, "nothing") for root in ROOTS] + [("sqrt", within) for within in WITHIN if within != "nothing"],
)
def test_zero_stays_zero_and_infinity_infinity(root, within):
    """Tangents and cotangents are 0, 1, 1, 0 at 0, 0, 1/4, 1: only the second of them is infinite."""
    function, power = ROOTS[root]
    smooth = smooth_roots(WITHIN[within](function))

    @jax.jit
    def both(s, along):
        value, tangent = jax.jvp(smooth, (s,), (along,))
        if within == "while":  # which JAX cannot reverse
            return value, tangent, tangent
        return value, tangent, jax.vmap(jax.vjp(smooth, s)[1])(along[None])[0][0]

    value, *derivatives = both(S, jnp.array([0.0, 1, 1, 0]))
    np.testing.assert_array_equal(value, jax.jit(function)(S))
    for derivative in derivatives:
        np.testing.assert_allclose(derivative, [0, np.sign(power) * np.inf, power * 0.25 ** (power - 1), 0], rtol=1e-15)


def test_third_derivatives_are_those_of_jax():
    def function(s):
        return jnp.sum(jnp.where(s > 2, 1 / s, jnp.sqrt(s) * s / (s + 1)))

    def derivatives(function):
        second = jax.jacfwd(jax.grad(function))
        return jax.jit(lambda s: (jax.grad(function)(s), second(s), jax.jacrev(jax.jacrev(jax.grad(function)))(s)))

    results, expected = (derivatives(f)(jnp.array([0.3, 3.0])) for f in (smooth_roots(function), function))
    jax.tree.map(lambda result, other: np.testing.assert_allclose(result, other, rtol=1e-13), results, expected)


def test_what_is_not_selected_has_the_derivative_zero():
    def clipped(g):
        length = jnp.sqrt(jnp.sum(g**2))
        return jnp.where(length < 1, g, g / length)

    plain, smooth = (jax.jit(jax.jacrev(function)) for function in (clipped, smooth_roots(clipped)))
    assert np.isnan(plain(jnp.zeros(3))).any()
    np.testing.assert_array_equal(smooth(jnp.zeros(3)), np.eye(3))


def test_functions_with_rules_of_their_own_keep_them():
    @jax.custom_jvp
    def root(s):
        return jnp.sqrt(s)

    root.defjvp(lambda primals, tangents: (root(*primals), 7 * tangents[0]))
    np.testing.assert_array_equal(jax.grad(lambda s: smooth_roots(root)(s).sum())(S), 7)

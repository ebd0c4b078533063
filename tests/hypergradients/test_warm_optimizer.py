"""The optimizer of y goes on over the outer steps, as in a loop by hand that keeps its state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

STEPS, OUTER = 3, 4
KEY = jax.random.key(0)
Y = jnp.array([0.5, -1.0, 2.0])
X = jnp.array(-1.0)
DATA = jax.random.normal(jax.random.key(1), (5, 3))
BATCH = bx.Batch(None, DATA)

OPTIMIZERS = {
    "momentum": optax.sgd(optax.linear_schedule(0.2, 0.02, 9), momentum=0.8),
    "adamw": optax.adamw(optax.warmup_cosine_decay_schedule(0.01, 0.2, 4, 12), weight_decay=1e-2, eps_root=1e-6),
    "multisteps": optax.MultiSteps(optax.adam(0.1, eps_root=1e-6), 2).gradient_transformation(),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.2), 0.2, b1=0.9),
}


def inner_loss(x, y, batch):
    return jnp.mean((batch @ y - 1) ** 2) + jnp.exp(x) * jnp.sum(y**2)


def outer_loss(x, y, batch):
    return jnp.sum((y - 1) ** 2)


def row(key, t, data):  # whose draw depends on the key and on the running t
    return data * (1 + 0.1 * jnp.sin(t) + 0.1 * jax.random.uniform(key))


def make(kind, optimizer, steps=STEPS, sample=row):
    build = functools.partial(kind, inner_loss, optimizer, sample=sample)
    if kind is bx.inner.forward_gradient:
        return build(steps=steps, directions=1, sampler=bx.inner.random_directions.coordinate)
    return build(steps=steps)


def chained(inner_loss, optimizer, steps, sample):
    first = bx.inner.no_gradient(inner_loss, optimizer, steps - 1, sample=sample)
    return bx.inner.chain(first, bx.inner.reverse(inner_loss, optimizer, 1, sample=sample))


def advance(optimizer, x, z, key, steps=STEPS, sample=row):
    """The same steps by hand."""
    key = bx.inner.step_keys(key).steps

    def step(z, _):
        y, opt_state, t = z
        gradient = jax.grad(inner_loss, 1)(x, y, sample(jax.random.fold_in(key, t), t, DATA))
        updates, opt_state = optimizer.update(gradient, opt_state, y)
        return (optax.apply_updates(y, updates), opt_state, t + 1), None

    return jax.lax.scan(step, z, length=steps)[0]


@functools.cache
def by_hand(name):
    """What a loop that keeps the state sees: y, optimizer states and derivatives of all outer steps."""
    optimizer = OPTIMIZERS[name]

    def outer_step(carry, key):
        x, z = carry

        def value(x):
            after = advance(optimizer, x, z, key)
            return outer_loss(x, after[0], None), after

        grad, z = jax.grad(value, has_aux=True)(x)
        return (x + 0.1, z), (grad, z)

    z = Y, optimizer.init(Y), jnp.zeros((), jnp.int32)
    return jax.jit(lambda: jax.lax.scan(outer_step, (X, z), jax.random.split(KEY, OUTER))[1])()


def run(hypergrad, state, batch=BATCH, outer=OUTER):
    """Gradients and states of all outer steps."""

    def outer_step(carry, key):
        x, state = carry
        grad, state, _ = hypergrad.estimate(key, state, x, batch)
        return (x + 0.1, state), (grad, state)

    keys = jax.random.split(KEY, outer)
    return jax.jit(lambda state: jax.lax.scan(outer_step, (X, state), keys)[1])(state)


def close(got, expected, rtol=1e-14):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "kind",
    [bx.inner.reverse, bx.inner.forward_gradient, bx.inner.implicit, bx.inner.no_gradient, chained],
    ids=lambda kind: kind.__name__,
)
def test_y_and_optimizer_go_on_as_in_a_loop_by_hand(kind, name):
    hypergrad = bx.hypergradient(outer_loss, make(kind, OPTIMIZERS[name]))
    grads, states = run(hypergrad, hypergrad.init(X, Y))
    expected, (y, opt_state, t) = by_hand(name)
    close((states.y, states.opt_state, states.t), (y, opt_state, t))
    if kind in (bx.inner.reverse, bx.inner.forward_gradient):
        same_mode = kind is bx.inner.reverse or name != "multisteps"  # whose jvp and vjp by JAX differ by 2e-8
        close(grads, expected, rtol=1e-13 if same_mode else 1e-7)


def test_the_forward_pass_is_the_scan_by_hand_to_the_bit():
    optimizer = OPTIMIZERS["adamw"]
    hypergrad = bx.hypergradient(outer_loss, make(bx.inner.no_gradient, optimizer))
    state, z = hypergrad.init(X, Y), (Y, optimizer.init(Y), jnp.zeros((), jnp.int32))
    estimate, steps = jax.jit(hypergrad.estimate), jax.jit(functools.partial(advance, optimizer))
    for key in jax.random.split(KEY, OUTER):
        state, z = estimate(key, state, X, BATCH)[1], steps(X, z, key)
        assert all(map(np.array_equal, jax.tree.leaves((state.y, state.opt_state, state.t)), jax.tree.leaves(z)))

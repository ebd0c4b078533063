"""Inner solvers against hand-written unrolls, and against each other."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

KEY = jax.random.key(3)
DATA = {
    "inputs": jnp.asarray(np.random.default_rng(0).normal(size=(12, 3))),
    "targets": jnp.asarray(np.random.default_rng(1).normal(size=12)),
}
X = {"log_l2": jnp.array(-1.0), "scale": jnp.array([0.9, 1.1, 0.7])}
Y = {"weights": jnp.array([0.3, -0.2, 0.5]), "bias": jnp.array(0.1)}


def inner_loss(x, y, batch):
    prediction = jnp.tanh(batch["inputs"] * x["scale"][None, :] @ y["weights"] + y["bias"])
    return jnp.mean((prediction - batch["targets"]) ** 2) + jnp.exp(x["log_l2"]) * jnp.sum(y["weights"] ** 2)


def outer_loss(x, y, batch):
    return jnp.sum(jnp.cos(batch * y["weights"])) * y["bias"] + jnp.sum(x["scale"] ** 2)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov-cosine": optax.sgd(optax.cosine_decay_schedule(0.1, 20), momentum=0.9, nesterov=True),
    "adam": optax.adam(0.05),
    "clip-adamw": optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(0.05)),
    "learned": lambda x: optax.adam(x["scale"][0] * 0.1, b1=0.5),
    "learned-in-state": lambda x: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1 * x["scale"][1], momentum=0.5),
}


def make_optimizer(optimizer, x):
    return optimizer if isinstance(optimizer, optax.GradientTransformation) else optimizer(x)


def hand_unroll(x, y, optimizer, steps, freeze=0):
    """A Python loop; the derivative of the first `freeze` steps is stopped."""
    transformation = make_optimizer(optimizer, x)
    opt_state = transformation.init(y)
    for t in range(steps):
        updates, opt_state = transformation.update(jax.grad(inner_loss, 1)(x, y, DATA), opt_state, y)
        y = optax.apply_updates(y, updates)
        if t + 1 == freeze:
            y, opt_state = jax.lax.stop_gradient((y, opt_state))
    return y


def truncated(x, name, tail, initial):
    y = hand_unroll(x, initial(x), OPTIMIZERS[name], 6, freeze=6 - tail)
    return outer_loss(x, y, 2.0), y


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def by_hand(name, tail=6, initial=lambda x: Y):
    """Gradient and y of six steps of which the last ones are differentiated, written out."""
    return jax.grad(truncated, has_aux=True)(X, name, tail, initial)


@functools.cache
def by_reverse(name, sample=bx.sampling.full, checkpoint=bx.inner.every_step, steps=6):
    return estimate(
        bx.inner.reverse(inner_loss, OPTIMIZERS[name], steps, sample=sample, checkpoint=checkpoint), key=KEY
    )


def estimate(solver, x=X, y=Y, key=None):
    hypergrad = bx.hypergradient(outer_loss, solver)
    return jax.jit(hypergrad.estimate)(key, hypergrad.init(x, y), x, bx.Batch(outer=2.0, inner=DATA))


def assert_trees_close(got, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected)


DAILY = ("nesterov-cosine", "clip-adamw", "learned-in-state")  # what the others do is a part of what these do


def often(name, *values):
    return pytest.param(name, *values, id=name, marks=[] if name in DAILY else pytest.mark.slow)


@pytest.mark.parametrize("name", [often(name) for name in OPTIMIZERS])
def test_reverse_is_the_gradient_of_a_hand_written_unroll(name):
    expected, y = by_hand(name)
    grad, state, _ = by_reverse(name)
    assert_trees_close(grad, expected, rtol=1e-12, atol=1e-14)
    assert_trees_close(state.y, y, rtol=1e-12)


@pytest.mark.parametrize(
    "checkpoint",
    [bx.inner.every_step, bx.inner.two_level, bx.inner.store_products(), bx.inner.store_products(every=3)],
    ids=["every_step", "two_level", "store_products", "store_products_3"],
)
@pytest.mark.parametrize("steps", [0, 1, 7, 9])
def test_checkpointed_is_plain(checkpoint, steps):
    plain, _, _ = by_reverse("momentum", checkpoint=bx.inner.store_all, steps=steps)
    grad, _, _ = by_reverse("momentum", checkpoint=checkpoint, steps=steps)
    assert_trees_close(grad, plain, rtol=1e-13, atol=1e-15)


@pytest.mark.usefixtures("uncached")
def test_checkpoints_save_memory():
    big = {"inputs": jnp.ones((200, 3)), "targets": jnp.ones(200)}

    def temporary_bytes(checkpoint, steps=256):
        hypergrad = bx.hypergradient(
            outer_loss, bx.inner.reverse(inner_loss, OPTIMIZERS["adam"], steps, checkpoint=checkpoint)
        )
        lowered = jax.jit(hypergrad.estimate).lower(None, hypergrad.init(X, Y), X, bx.Batch(2.0, big))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    store_all, products, third, every_step, two_level = map(
        temporary_bytes,
        [
            bx.inner.store_all,
            bx.inner.store_products(),
            bx.inner.store_products(every=3),
            bx.inner.every_step,
            bx.inner.two_level,
        ],
    )
    assert every_step < 0.3 * store_all
    assert 1.1 * every_step < third < 0.9 * products < 0.8 * store_all
    assert two_level < 0.6 * every_step


@pytest.mark.parametrize(
    ("name", "sample"),
    [
        *(often(name, bx.sampling.full) for name in OPTIMIZERS),
        pytest.param("momentum", bx.sampling.minibatch(4), id="momentum-minibatch"),
    ],
)
def test_chain_of_reverses_is_reverse_of_the_sum(name, sample):
    reverse = lambda steps: bx.inner.reverse(inner_loss, OPTIMIZERS[name], steps, sample=sample)  # noqa: E731
    grad, state, info = estimate(bx.inner.chain(reverse(2), reverse(4)), key=KEY)
    expected, expected_state, expected_info = by_reverse(name, sample)
    assert_trees_close(grad, expected, rtol=1e-13, atol=1e-15)
    assert_trees_close(state.y, expected_state.y, rtol=1e-14)
    np.testing.assert_allclose(info.inner.gradient_norm, expected_info.inner.gradient_norm, rtol=1e-13)


@pytest.mark.parametrize(
    ("name", "tail"),
    [("sgd", 0), ("momentum", 1), ("nesterov-cosine", 4), ("adam", 2), ("clip-adamw", 3), ("learned", 4)],
)
def test_chain_of_no_gradient_and_reverse_is_the_truncated_unroll(name, tail):
    optimizer = OPTIMIZERS[name]
    solver = bx.inner.chain(
        bx.inner.no_gradient(inner_loss, optimizer, 6 - tail), bx.inner.reverse(inner_loss, optimizer, tail)
    )
    grad, state, _ = estimate(solver)
    expected, y = by_hand(name, tail)
    assert_trees_close(grad, expected, rtol=1e-12, atol=1e-14)
    assert_trees_close(state.y, y, rtol=1e-12)


def test_truncated_unroll_is_the_last_terms_of_the_sum():
    eta, h, a, x = 0.1, np.array([1.0, 3.0]), np.array([2.0, -1.0]), jnp.array([1.0, 4.0])
    loss = lambda x, y, batch: 0.5 * h @ y**2 - x @ y  # noqa: E731
    first = bx.inner.no_gradient(loss, optax.sgd(eta), 17)
    hypergrad = bx.hypergradient(
        lambda x, y, batch: 0.5 * jnp.sum((y - a) ** 2),
        bx.inner.chain(first, bx.inner.reverse(loss, optax.sgd(eta), 3)),
    )
    grad, state, _ = jax.jit(hypergrad.estimate)(None, hypergrad.init(x, jnp.zeros(2)), x, bx.Batch(None, None))
    terms = eta * sum((1 - eta * h) ** k for k in range(3))
    np.testing.assert_allclose(grad, terms * (state.y - a), rtol=1e-13)


def test_initial_sends_the_derivative_of_the_first_iterate():
    initial = lambda x: {"weights": x["scale"], "bias": x["log_l2"] ** 2}  # noqa: E731
    for name in ["adam", "learned-in-state"]:
        optimizer = OPTIMIZERS[name]
        solvers = [
            bx.inner.reverse(inner_loss, optimizer, 6, initial=initial),
            bx.inner.chain(
                bx.inner.reverse(inner_loss, optimizer, 1, initial=initial), bx.inner.reverse(inner_loss, optimizer, 5)
            ),
        ]
        expected, _ = by_hand(name, initial=initial)
        for solver in solvers:
            assert_trees_close(estimate(solver)[0], expected, rtol=1e-12, atol=1e-14)


def test_first_order_takes_the_derivative_in_y0_for_the_identity():
    """∇_y f at y_T for the start, through `initial` and through the earlier link of a chain too; nothing for x."""

    def initial(x):
        return {"weights": x["scale"] ** 2, "bias": x["log_l2"]}

    last = bx.inner.first_order(inner_loss, OPTIMIZERS["sgd"], 4)
    made = bx.inner.first_order(inner_loss, OPTIMIZERS["sgd"], 4, initial=initial)
    chained = bx.inner.chain(bx.inner.reverse(inner_loss, OPTIMIZERS["sgd"], 2), last)
    hypergrad = bx.hypergradient(outer_loss, made)

    @jax.jit
    def run(x, y):
        def solved(solver):
            return jax.grad(lambda x, y: outer_loss(X, bx.differentiable(solver)(x, y, DATA), 2.0), (0, 1))(x, y)

        by_hand, at = jax.vjp(lambda y: hand_unroll(x, y, OPTIMIZERS["sgd"], 2), y)
        y_bar = [
            jax.grad(outer_loss, 1)(X, hand_unroll(x, start, OPTIMIZERS["sgd"], 4), 2.0)
            for start in (y, by_hand, initial(x))
        ]
        estimate = hypergrad.estimate(None, hypergrad.init(x, y), x, bx.Batch(2.0, DATA))[0]
        through = jax.vjp(initial, x)[1](y_bar[2])[0]
        direct = jax.grad(outer_loss)(x, y, 2.0)
        return (
            (solved(last), (jax.tree.map(jnp.zeros_like, x), y_bar[0])),
            (solved(chained)[1], at(y_bar[1])[0]),
            (estimate, jax.tree.map(jnp.add, through, direct)),
        )

    for got, expected in run(X, Y):
        chex.assert_trees_all_close(got, expected, rtol=1e-5)


def test_per_step_reads_one_batch_for_each_step():
    stacked = jax.tree.map(lambda leaf: leaf.reshape(4, 3, *leaf.shape[1:]), DATA)
    solver = bx.inner.reverse(inner_loss, optax.sgd(0.1), steps=4, sample=bx.sampling.per_step)

    @jax.jit
    def by_loop(y):
        for t in range(4):
            gradient = jax.grad(inner_loss, 1)(X, y, jax.tree.map(lambda leaf: leaf[t], stacked))  # noqa: B023
            y = jax.tree.map(lambda p, g: p - 0.1 * g, y, gradient)
        return y

    assert_trees_close(jax.jit(bx.differentiable(solver))(X, Y, stacked), by_loop(Y), rtol=1e-13)
    longer = bx.inner.reverse(inner_loss, optax.sgd(0.1), steps=5, sample=bx.sampling.per_step)
    assert np.isnan(jax.jit(bx.differentiable(longer))(X, Y, stacked)["bias"])


def test_minibatch_draws_rows_and_lets_scalars_and_keys_through():
    data = {"rows": jnp.arange(10.0), "more": jnp.arange(20.0).reshape(10, 2), "l2": 0.5, "key": jax.random.key(7)}
    batch = jax.jit(bx.sampling.minibatch(6))(jax.random.key(0), 0, data)
    np.testing.assert_array_equal(batch["more"][:, 0], 2 * batch["rows"])
    assert batch["rows"].shape == (6,)
    assert batch["l2"] == 0.5
    assert batch["key"] == data["key"]
    draw = jax.jit(jax.vmap(lambda key: bx.sampling.minibatch(6)(key, 0, data)["rows"]))
    draws = np.asarray(draw(jax.random.split(jax.random.key(1), 4000)))
    np.testing.assert_allclose(draws.mean(), 4.5, atol=5 * 2.9 / np.sqrt(draws.size))


def test_any_optimizer_runs_also_one_with_a_line_search():
    solver = bx.inner.implicit(inner_loss, optax.lbfgs(), steps=30, ihvp=bx.ihvp.exact())
    _, _, info = estimate(solver)
    assert info.inner.gradient_norm < 1e-6


def test_every_solver_reports_the_gradient_norm_at_the_returned_y():
    optimizer = optax.sgd(0.1)
    solvers = [
        bx.inner.implicit(inner_loss, optimizer, 5),
        bx.inner.reverse(inner_loss, optimizer, 5),
        bx.inner.no_gradient(inner_loss, optimizer, 5),
        bx.inner.chain(bx.inner.no_gradient(inner_loss, optimizer, 2), bx.inner.reverse(inner_loss, optimizer, 3)),
    ]

    @jax.jit
    def last():
        value, gradient = jax.value_and_grad(inner_loss, 1)(X, hand_unroll(X, Y, optimizer, 5), DATA)
        return value, optax.tree.norm(gradient)

    value, norm = last()
    for solver in solvers:
        _, _, info = estimate(solver)
        np.testing.assert_allclose(info.inner.gradient_norm, norm, rtol=1e-12)
        np.testing.assert_allclose(info.inner.inner_loss, value, rtol=1e-12)


def test_implicit_without_warm_start_keeps_no_v():
    solver = bx.inner.implicit(inner_loss, optax.sgd(0.1), 5, ihvp=bx.ihvp.cg(maxiter=1), warm_start=False)
    _, state, _ = estimate(solver)
    assert state.solver.v is None
    _, state, _ = estimate(bx.inner.implicit(inner_loss, optax.sgd(0.1), 5, ihvp=bx.ihvp.cg(maxiter=1)))
    assert optax.tree.norm(state.solver.v) > 0

"""docs/recipes.md, run as it stands: each section in a namespace of its own, and its numbers against a truth apart."""

import functools
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import bilevax as bx

PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "recipes.md"
SETUP, *SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
SECTIONS = {section.partition("\n")[0]: section for section in SECTIONS}


@functools.cache
def run(title):
    """The names that a section leaves behind; its code runs once."""
    namespace = {"__name__": title}
    for code in re.findall(r"^```python\n(.*?)^```$", SETUP + SECTIONS[title], re.MULTILINE | re.DOTALL):
        exec(compile(code, f"{PAGE.name}: {title}", "exec"), namespace)
    return types.SimpleNamespace(**namespace)


def close(got, expected, rtol=1e-6, atol=0.0):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), got, expected)


def squared_error(prediction, data):
    return jnp.mean((prediction - data[1]) ** 2)


def squared_norm(tree):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))


def dense_hypergradient(page, predict, y):
    """∇_x f − ∇²_xy g [∇²_yy g]⁻¹ ∇_y f of ridge regression with `predict(y, inputs)`, the Hessian written out."""
    flat, unravel = ravel_pytree(y)

    def f(flat):
        return squared_error(predict(unravel(flat), page.validation[0]), page.validation)

    def g(x, flat):
        return squared_error(predict(unravel(flat), page.train[0]), page.train) + jnp.exp(x) * jnp.sum(flat**2)

    @jax.jit
    def evaluate(x, flat):
        v = jnp.linalg.solve(jax.hessian(g, argnums=1)(x, flat), jax.grad(f)(flat))
        return -jnp.vdot(jax.jacobian(jax.grad(g, argnums=1))(x, flat), v)

    return evaluate(page.x, flat)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


# Your own training loop


@pytest.mark.compiles(90)  # a page as it stands
def test_a_training_goes_on_with_the_optimizer_that_it_had():
    page = run("Your own training loop")
    assert (page.state.t, page.train_state.step) == (15, 20)
    assert abs(page.new_x - page.x) > 0.1
    assert page.train_state.opt_state[0].count == 20

    @jax.jit
    def descend(y, opt_state, loss=page.inner_loss):
        for _ in range(5):
            updates, opt_state = page.train_state.tx.update(jax.grad(loss, 1)(page.x, y, page.train), opt_state, y)
            y = optax.apply_updates(y, updates)
        return y, opt_state

    first = page.hypergrad.init(page.x, page.params)
    _, after, _ = page.estimate(None, first, page.x, bx.Batch(page.validation, page.train))
    close(after.y, descend(page.params, page.train_state.tx.init(page.params))[0], rtol=1e-5, atol=1e-7)
    kept, expected = nnx.state(page.model), page.nnx_state.y
    close(kept, expected, rtol=0)
    assert page.nnx_state.t == 5
    outputs = jax.vmap(page.trained)(page.inputs)
    assert error_falls(page, outputs, jax.vmap(page.module)(page.inputs))


def error_falls(page, after, before):
    return squared_error(after[:40], page.train) < squared_error(before[:40], page.train)


# A rate and a decay for each layer


@pytest.mark.compiles(80)  # a page as it stands
def test_rates_by_layer_take_at_most_twenty_lines_and_lower_the_loss_of_the_same_training():
    title = "A rate and a decay for each layer"
    code = re.findall(r"^```python\n(.*?)^```$", SECTIONS[title], re.MULTILINE | re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    with jax.enable_x64(False):
        page = run(title)
        state = page.hypergrad.init(page.first_x, bx.inner.Carried(page.params, page.rest))
        for key in jax.random.split(jax.random.key(3), 10):
            _, state, info = page.estimate(key, state, page.first_x, bx.Batch(page.validation, page.train))
        assert page.losses[-1] < info.outer_loss
        assert {float(jnp.sign(page.x[layer]["rate"] - np.log(1e-3))) for layer in page.layers} <= {-1.0, 1.0}
        assert not page.info.inner.breakdown


# Checkpoints


@pytest.mark.compiles(60)  # a page as it stands
def test_what_is_read_is_what_was_written():
    page = run("Checkpoints")
    assert page.read.step == 4
    close(page.read.state, page.carry, rtol=0)
    assert page.carry[1].t == 20
    on, again = page.run(steps=6), page.run(steps=6)  # resumed from 4, and from 6
    assert on[1].t == 30
    close(again, on, rtol=0)


# Several devices


def test_shards_of_y_change_no_number():
    page = run("Several devices")
    close(page.grads[0], page.grads[1], rtol=1e-6)
    assert page.grads[0].sharding.is_fully_replicated


# Agents that skip most of their derivatives


def test_agents_that_skip_learn_the_best_penalty_with_a_tenth_of_the_evaluations():
    page = run("Agents that skip most of their derivatives")

    def error(x):
        a, b = page.few
        y = jnp.linalg.solve(a.T @ a / len(a) + jnp.exp(x) * jnp.eye(a.shape[1]), a.T @ b / len(a))
        return squared_error(page.train[0] @ y, page.train)

    grid = jnp.linspace(-6, 6, 120_001)
    values = jax.jit(jax.vmap(error))(grid)
    best = grid[values.argmin()]
    assert -5 < best < 5
    close(page.state.x, jnp.full(4, best), rtol=0, atol=2e-4)
    close(page.learnt, page.state.x[0])
    close(page.info.calls.hessian_products.sum(0), jnp.full(4, 100.0), rtol=0, atol=1)


# Constraints and kinks in y


def test_solutions_with_constraints_are_differentiated_like_those_of_numpy():
    page = run("Constraints and kinks in y")
    (A, b), (C, d) = ((np.asarray(part[0]), np.asarray(part[1])[:, 0]) for part in (page.train, page.validation))
    gram, target = 2 * A.T @ A / len(A), 2 * A.T @ b / len(A)

    def onto_simplex(y):
        return np.maximum(y - bisect(lambda m: np.maximum(y - m, 0).sum() - 1, -10, 10), 0)

    def soft(z, x):
        return np.sign(z) * np.maximum(np.abs(z) - 0.3 * np.exp(x), 0)

    moves = {
        "nonnegative": lambda x, y: np.maximum(y - 0.3 * (gram @ y - target + 2 * np.exp(x) * y), 0),
        "simplex": lambda x, y: onto_simplex(y - 0.3 * (gram @ y - target + 2 * np.exp(x) * y)),
        "lasso": lambda x, y: soft(y - 0.3 * (gram @ y - target), x),
    }
    for name, (grad, state, info) in page.found.items():

        def final(x, move=moves[name]):
            y = np.full(4, 0.25)
            for _ in range(200):
                y = move(x, y)
            return np.mean((C @ y - d) ** 2), y

        x, h = float(page.x), 1e-4
        close(state.y, final(x)[1], rtol=0, atol=1e-7)
        close(grad, (final(x + h)[0] - final(x - h)[0]) / (2 * h), rtol=1e-4)
        assert (np.abs(state.y) < 1e-12).any(), f"{name} must be active"
        assert not info.inner.breakdown


# A layer in equilibrium


def test_an_equilibrium_is_many_layers():
    page = run("A layer in equilibrium")

    @jax.jit
    @jax.grad
    def unrolled_layers(weights):
        z, _ = jax.lax.scan(lambda z, _: (page.layer(weights, z, page.train[0]), None), jnp.zeros((40, 5)), length=60)
        return squared_error(z.mean(axis=1, keepdims=True), page.train)

    close(page.grads, unrolled_layers(page.weights), rtol=1e-6, atol=1e-9)


# Newton's method on hyperparameters, three levels


def test_newton_doubles_the_digits():
    page = run("Newton's method on hyperparameters")
    assert page.norms[0] > 1e-2
    assert page.norms[-1] < 1e-9

    def exact(x):
        (A, b), (C, d) = page.train, page.validation
        y = jnp.linalg.solve(A.T @ A / len(A) + jnp.diag(jnp.exp(x)), A.T @ b[:, 0] / len(A))
        return jnp.mean((C @ y - d[:, 0]) ** 2) + 0.01 * jnp.sum(x**2)

    close(jax.jit(jax.grad(exact))(page.each), np.zeros(4), atol=1e-8)


def test_three_levels_are_the_closed_form():
    page = run("Three levels")  # y = (4 − x) / 5
    close((page.state.y, page.grad), (0.6, -0.24), rtol=1e-5)


# First-order MAML, and Reptile


def test_first_order_maml_and_reptile_are_those_of_a_loop():
    page = run("First-order MAML, and Reptile")

    @jax.jit
    def by_hand(w, tasks):
        def one(task):
            y, slope = w, jax.grad(page.support_loss, 1)
            for _ in range(5):
                y = y - 0.1 * slope(None, y, task)
            return slope(None, y, task), w - y

        return jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(one)(tasks))

    close((page.maml, page.reptile), by_hand(page.w, page.tasks), rtol=1e-6)


# Frozen parts of y


def ridge_regression(page):
    """The trained head on the frozen features of the body, and the derivative of F, in closed form."""

    def head(x):
        features = jnp.tanh(page.train[0] @ page.params["body"])
        gram = features.T @ features / len(features) + jnp.exp(x) * jnp.eye(8)
        return jnp.linalg.solve(gram, features.T @ page.train[1] / len(features))

    def error(x):
        return squared_error(jnp.tanh(page.validation[0] @ page.params["body"]) @ head(x), page.validation), head(x)

    grad, solution = jax.jit(jax.grad(error, has_aux=True))(page.x)
    return solution, grad


@pytest.mark.compiles(60)  # a page as it stands
def test_freezing_by_parts_is_right_and_in_the_optimizer_alone_only_for_reverse():
    page = run("Frozen parts of y")
    head, grad = ridge_regression(page)
    close((page.head_state.y, page.head_grad), (head, grad))
    close((page.mask_state.y, page.mask_grad), ({"body": None, "head": head}, grad))
    close(page.merge(page.mask_state.y, page.masked_batch.inner[1]), page.params | {"head": head})
    close((page.right_state.y["head"], page.right_grad), (head, grad))
    as_if_trained = dense_hypergradient(page, page.network, page.params | {"head": head})
    close(page.wrong_grad, as_if_trained, rtol=1e-5)
    assert abs(page.wrong_grad - grad) > 0.5 * abs(grad)
    assert page.wrong_info.inner.breakdown
    assert page.wrong_info.inner.gradient_norm > 0.1
    assert page.head_info.inner.gradient_norm < 1e-8
    ones = jax.tree.map(np.ones_like, page.params)
    masked = optax.masked(optax.sgd(0.2), page.mask)
    close(masked.update(ones, masked.init(ones))[0], {"body": ones["body"], "head": -0.2 * ones["head"]})


@pytest.mark.usefixtures("uncached")
def test_a_frozen_part_in_the_batch_is_sampled_apart_and_no_constant_of_the_program():
    page = run("Frozen parts of y")
    (inputs, targets), body = page.sample(jax.random.key(0), 0, page.batch.inner)
    assert (inputs.shape, targets.shape) == ((8, 4), (8, 1))
    assert set(np.ravel(targets)) <= set(np.ravel(page.train[1]))
    assert body is page.body
    with pytest.raises(ValueError, match="one common leading axis"):
        page.rows(jax.random.key(0), 0, page.batch.inner)

    def constants(loss, batch):
        hypergrad = bx.hypergradient(loss, bx.inner.reverse(loss, optax.sgd(0.1), 2))
        state = hypergrad.init(page.x, page.params["head"])
        text = jax.jit(hypergrad.estimate).lower(None, state, page.x, bx.Batch(batch, batch)).as_text()
        return re.findall(r"stablehlo.constant dense<[^>]{30,}> : tensor<4x8xf64>", text)

    assert constants(lambda x, y, data: page.outer_loss(x, y, (data, page.body)), page.train)
    assert not constants(page.outer_loss, (page.train, page.body))


def test_lora_equals_the_factors_by_hand():
    page = run("Frozen parts of y")
    kernel, inputs = page.lora_batch.inner[1]["kernel"][...], page.train[0]
    lora = page.lora_state.y["lora"]
    y = tuple(lora[name][...].astype(float) for name in ("lora_a", "lora_b"))
    expected = dense_hypergradient(page, lambda y, inputs: inputs @ (kernel + y[0] @ y[1]), y)
    assert np.linalg.norm(y[0] @ y[1]) > 0.1, "the adapter must have left its saddle"
    assert page.lora_info.inner.gradient_norm < 1e-5
    close(page.lora_grad, expected, rtol=1e-4)
    close(page.model(inputs), inputs @ (kernel + y[0] @ y[1]), rtol=1e-5, atol=1e-5)
    close(nnx.state(page.model, nnx.Not(nnx.LoRAParam)), page.lora_batch.inner[1], rtol=0)

    def fit(y):
        return squared_error(inputs @ (kernel + y[:4, None] * y[4]), page.train)

    best = np.linalg.lstsq(inputs, page.train[1] - inputs @ kernel)[0]
    curvature = np.linalg.eigvalsh(jax.jit(jax.hessian(fit))(np.append(best, 1.0)))
    close(curvature[0], 0.0, atol=1e-10)
    assert curvature[1] > 0.1, "without a penalty, the one flat direction is the scale of the factors"


# Losses with has_aux


@pytest.mark.usefixtures("uncached")
def test_aux_is_that_of_the_returned_y_at_no_cost():
    page = run("Losses with `has_aux`")
    close(page.aux["prediction"], np.tanh(page.train[0] @ page.state.y))
    close(page.grad, dense_hypergradient(page, lambda y, inputs: jnp.tanh(inputs @ y), page.state.y), rtol=1e-5)
    args = page.hypergrad.init(page.x, page.y), page.x, page.batch
    alone = flops(lambda *args: page.hypergrad.estimate(None, *args), *args)
    evaluation = flops(page.loss_and_aux, page.x, page.y, page.train)
    assert evaluation > 100
    assert flops(page.step, *args) - alone < 0.1 * evaluation


# Batch statistics


def normalized_network(y, inputs, statistics=None):
    hidden = inputs @ y["in"]
    mean, variance = (hidden.mean(0), hidden.var(0)) if statistics is None else statistics
    hidden = (hidden - mean[None]) / jnp.sqrt(variance + 1e-5)[None] * y["scale"][None] + y["shift"][None]
    return jnp.tanh(hidden) @ y["out"] + y["bias"][None], (mean, variance)


@functools.partial(jax.jit, static_argnames="unbiased")
def five_steps(x, y, running, train, validation, unbiased=1.0):
    """The derivative of f after five inner steps, and the running statistics that f reads, as constants."""

    def inner_loss(x, y):
        prediction, statistics = normalized_network(y, train[0])
        return squared_error(prediction, train) + jnp.exp(x) * squared_norm(y), statistics

    def outer_loss(x):
        def descend(carry, _):
            y, running = carry
            slope, (mean, variance) = jax.grad(inner_loss, argnums=1, has_aux=True)(x, y)
            running = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, running, (mean, unbiased * variance))
            return (jax.tree.map(lambda a, b: a - 0.1 * b, y, slope), jax.lax.stop_gradient(running)), None

        (trained, moved), _ = jax.lax.scan(descend, (y, running), length=5)
        return squared_error(normalized_network(trained, validation[0], moved)[0], validation), moved

    return jax.grad(outer_loss, has_aux=True)(x)


@pytest.mark.compiles(110)  # a page as it stands
def test_batch_statistics_of_linen_and_equinox_equal_a_batch_norm_by_hand_and_those_of_nnx_move():
    with jax.enable_x64(False):
        page = run("Batch statistics")
        first, norm, last = (page.linen_y.params[name] for name in ("Dense_0", "BatchNorm_0", "Dense_1"))
        y = {"in": first["kernel"], "scale": norm["scale"], "shift": norm["bias"]}
        y |= {"out": last["kernel"], "bias": last["bias"]}
        start = np.zeros(8, "f"), np.ones(8, "f")
        grad, running = five_steps(page.x, y, start, page.train, page.validation)
        close(page.linen_grad, grad, rtol=1e-3)
        got = page.linen_state.y.carried["BatchNorm_0"]
        close((got["mean"], got["var"]), running, rtol=1e-4, atol=1e-5)

        first, norm, _, last = page.eqx_y.params.layers
        y = {"in": first.weight.T, "scale": norm.weight, "shift": norm.bias, "out": last.weight.T, "bias": last.bias}
        grad, _ = five_steps(page.x, y, start, page.train, page.validation, unbiased=40 / 39)
        assert np.sign(page.eqx_grad) == np.sign(grad)  # its average of the first step is another one
        assert np.isfinite(page.eqx_grad)

        moved = nnx.to_pure_dict(page.state.y.carried)
        assert moved["norm"]["mean"].any()
        assert moved["dropout"]["rngs"]["count"] == 15  # masks of their own, in three outer steps
        np.testing.assert_array_equal(page.trained.norm.mean[...], moved["norm"]["mean"])


# Mixed precision


@pytest.mark.usefixtures("uncached")
def test_bfloat16_inside_keeps_float32_outside_and_stays_close():
    with jax.enable_x64(False):
        page = run("Mixed precision")
        assert {leaf.dtype for leaf in (page.grad, page.state.y, page.state.solver.v)} == {jnp.dtype("float32")}
        expected = dense_hypergradient(page, page.network, page.state.y)
        close(page.grad, expected, rtol=0.03)
        assert abs(page.grad - expected) > 1e-6 * abs(expected), "half precision must have left its trace"
        hypergrad = bx.hypergradient(page.outer_loss, page.solver)
        text = jax.jit(hypergrad.estimate).lower(None, page.state, page.x, page.batch).as_text()
        dots = re.findall(r"stablehlo\.dot_general.*: \(tensor<\d+x\d+x(\w+)>, tensor<\d+x\d+x(\w+)>\)", text)
        assert len(dots) >= 4
        assert {dtype for pair in dots for dtype in pair} == {"bf16"}


# Constraints on x


def bisect(excess, low, high):
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return middle


def minima(a, b):
    """Minima of ½‖x ∘ a − b‖²: coordinate by coordinate, and by the multiplier of the sum and of the norm."""

    def on_simplex(multiplier):
        return np.maximum((a * b - multiplier) / a**2, 0)

    def in_ball(multiplier):
        return a * b / (a**2 + multiplier)

    return {
        "nonnegative": np.maximum(b / a, 0),
        "box": np.clip(b / a, 0.1, 0.6),
        "simplex": on_simplex(bisect(lambda m: on_simplex(m).sum() - 1, -10, 10)),
        "ball": in_ball(bisect(lambda m: np.linalg.norm(in_ball(m)) - 0.5, 0, 10)),
    }


@pytest.mark.compiles(60)  # a page as it stands
def test_projection_and_reparametrisation_reach_the_constrained_minimum():
    page = run("Constraints on x")
    scale, goal, inside = map(np.asarray, (page.scale, page.goal, page.inside))
    expected = minima(scale, goal)
    for name, minimum in expected.items():
        assert np.abs(minimum - goal / scale).max() > 0.05, "the constraint must be active"
        close(getattr(page, name), minimum, rtol=0, atol=1e-6)
    close(np.linalg.norm(page.wrong_ball), 0.5)
    assert np.abs(page.wrong_ball - expected["ball"]).max() > 0.05

    free = minima(scale, inside)
    for name, case in {"exp": "nonnegative", "softplus": "nonnegative", "box": "box", "simplex": "simplex"}.items():
        close(getattr(page, f"free_{name}"), free[case], rtol=0, atol=1e-4)
    assert expected["nonnegative"][1] == 0
    close(page.boundary, expected["nonnegative"], rtol=0, atol=0.05)
    assert page.boundary[1] > 1e-6, "a boundary is only approached"


# Random keys and learning rates


@jax.jit
def unrolled(x, rate, masks, y, train, validation):
    """F after one inner step for each mask of the hidden units."""

    def inner_loss(x, y, mask):
        return squared_error(mask * jnp.tanh(train[0] @ y["first"]) @ y["last"], train) + jnp.exp(x) * squared_norm(y)

    def descend(y, mask):
        return jax.tree.map(lambda a, b: a - rate * b, y, jax.grad(inner_loss, argnums=1)(x, y, mask)), None

    y, _ = jax.lax.scan(descend, y, masks)
    return squared_error(jnp.tanh(validation[0] @ y["first"]) @ y["last"], validation)


def test_keys_of_their_own_equal_the_unrolled_loop():
    page = run("Random keys and learning rates")
    root = jax.random.key(3)
    masks, one_mask = (
        jnp.stack([2.0 * jax.random.bernoulli(key, 0.5, (40, 8)) for key in keys])
        for keys in ([jax.random.fold_in(root, t) for t in range(5)], [root] * 5)
    )
    own, same = (
        jax.grad(unrolled)(page.x, 0.1, masks, page.y, page.train, page.validation) for masks in (masks, one_mask)
    )
    close((page.grad, page.per_step_grad), (own, own))
    assert abs(same - own) > 0.01 * abs(own)


def test_the_derivative_of_a_learning_rate_is_that_of_the_unrolled_loop_and_zero_for_implicit():
    page = run("Random keys and learning rates")
    (ridge, rate), h = page.hyper.values(), 1e-5

    def error(ridge, rate):
        return unrolled(ridge, jnp.exp(rate), jnp.ones((5, 40, 8)), page.y, page.train, page.validation)

    expected = {
        "ridge": (error(ridge + h, rate) - error(ridge - h, rate)) / (2 * h),
        "rate": (error(ridge, rate + h) - error(ridge, rate - h)) / (2 * h),
    }
    close(page.hyper_grad, expected, rtol=1e-5)
    solver = bx.inner.implicit(
        page.rate_inner_loss, lambda x: optax.sgd(jnp.exp(x["rate"])), steps=1, ihvp=bx.ihvp.identity(1.0)
    )
    grad, *_ = page.one_hypergradient(page.outer_loss, solver, page.hyper, page.y, page.rate_batch)
    assert grad["rate"] == 0
    assert grad["ridge"] != 0

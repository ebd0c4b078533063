"""Forward gradients: exact with enough directions, unbiased with fewer, in memory that does not grow with the steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from directional_cases import (
    CLEANING,
    DIRECT,
    KEY,
    NO_DATA,
    QUADRATIC,
    QUADRATIC_GRADIENT,
    QUADRATIC_SGD,
    TRAIN,
    VALID,
    WEIGHTS,
    Y0,
    N,
    assert_mean,
    cleaning_estimate,
    cleaning_loss,
    estimate,
    flat,
    from_x,
    linear_loss,
    probe,
    quadratic_estimate,
    rows,
    signs,
    tracking_loss,
    unrolled,
    validation_loss,
)

import bilevax as bx
from bilevax.inner import chain, forward_gradient, no_gradient, reverse
from bilevax.inner.random_directions import coordinate, gaussian, hadamard, orthogonal, rademacher, sphere
from bilevax.testing import executed_dots

MOMENTUM = optax.sgd(0.3, momentum=0.9)
OPTIMIZERS = {
    "sgd": optax.sgd(0.3),
    "momentum": MOMENTUM,
    "nesterov_cosine": optax.sgd(optax.cosine_decay_schedule(0.3, 12), momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "clip_adamw": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1, weight_decay=0.01)),
}


def quadratic(directions=1, optimizer=QUADRATIC_SGD, steps=2, **options):
    return forward_gradient(QUADRATIC.inner_loss, optimizer, steps, directions=directions, **options)


def cleaning(directions=N, optimizer=MOMENTUM, steps=6, sampler=orthogonal, **options):
    return forward_gradient(cleaning_loss, optimizer, steps, directions=directions, sampler=sampler, **options)


# A quadratic whose numbers are known.


def test_each_of_the_four_vectors_of_signs():
    def one(V):
        return quadratic_estimate(quadratic(sampler=rows(V)))

    V = signs(2)
    grads, state, info = jax.vmap(one)(V[:, None, :])
    grads = np.asarray(grads)
    derivatives = {(1, 1): -5 / 16, (1, -1): 19 / 16}  # along v; −v has the opposite one
    expected = [derivatives.get(tuple(v), -derivatives.get(tuple(-v), 0)) * v for v in V]
    np.testing.assert_allclose(grads, expected, atol=1e-12)
    np.testing.assert_allclose(grads.mean(axis=0), QUADRATIC_GRADIENT, atol=1e-12)
    np.testing.assert_allclose(np.sum((grads - QUADRATIC_GRADIENT) ** 2, axis=1), 193 / 256, atol=1e-12)
    np.testing.assert_allclose(state.y, np.broadcast_to([7, 3], (4, 2)), atol=1e-12)
    np.testing.assert_allclose(info.outer_loss, 5 / 2, atol=1e-12)


@pytest.mark.parametrize("sampler", [orthogonal, hadamard, coordinate])
def test_two_directions_are_exact_for_every_key(sampler):
    keys = jax.random.split(KEY, 5)
    grads, _, info = jax.vmap(lambda key: quadratic_estimate(quadratic(2, sampler=sampler), key=key))(keys)
    np.testing.assert_allclose(grads, np.broadcast_to(QUADRATIC_GRADIENT, (5, 2)), atol=1e-12)
    np.testing.assert_array_equal(info.inner.detail.variance, 0)
    np.testing.assert_array_equal(info.inner.detail.step_scale, 1)


@pytest.mark.parametrize(
    ("changed", "y", "gradient", "tolerance"),
    [
        ({"optimizer": optax.sgd(1 / 4, momentum=1 / 2)}, [9, 4], [27 / 16, -1 / 2], 1e-12),
        ({"initial": lambda x: x}, [16, 5], [10, 0], 1e-12),
        ({"steps": 40}, [16, 4], [10, -1 / 2], 3e-4),
        ({"steps": 0}, [0, 0], [0, 0], 1e-12),
        ({"steps": 0, "initial": lambda x: 2 * x}, [32, 16], [52, 22], 1e-12),
    ],
    ids=["momentum", "initial", "long", "none", "initial_alone"],
)
def test_momentum_initial_and_steps(changed, y, gradient, tolerance):
    grad, state, _ = quadratic_estimate(quadratic(2, sampler=orthogonal, **changed))
    np.testing.assert_allclose(state.y, y, atol=tolerance)
    np.testing.assert_allclose(grad, gradient, atol=tolerance)


def test_a_learning_rate_as_x():
    """The implicit gradient of it is zero."""
    loss = lambda x, y, batch: y**2 / 2  # noqa: E731
    solver = forward_gradient(loss, lambda x: optax.sgd(x), 2, directions=1)
    grad, state, info = estimate(solver, loss, jnp.array(1 / 4), jnp.array(1.0))
    assert grad == pytest.approx(-27 / 32, abs=1e-12)
    assert (state.y, info.outer_loss) == (9 / 16, 81 / 512)


# As many directions as there are numbers in x.


DAILY = ("nesterov_cosine", "clip_adamw")  # what the others do is a part of what these do


@pytest.mark.parametrize(
    "name", [name if name in DAILY else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS]
)
def test_is_the_derivative_of_the_unroll_by_hand(name):
    """For every optimizer, its moments and its counts, with another minibatch at each step."""
    picks = np.random.default_rng(1).integers(0, 24, size=(12, 8))
    batches = {name: leaf[picks] for name, leaf in TRAIN.items()}
    solver = cleaning(optimizer=OPTIMIZERS[name], steps=12, sample=bx.sampling.per_step)
    grad, _, info = cleaning_estimate(solver, batch=bx.Batch(VALID, batches))
    value, expected = jax.jit(jax.value_and_grad(unrolled(OPTIMIZERS[name], batches)))(WEIGHTS)
    np.testing.assert_allclose(flat(grad), flat(expected), rtol=0, atol=1e-10)
    np.testing.assert_allclose(info.outer_loss, value, rtol=1e-12)
    assert not info.inner.breakdown
    assert np.linalg.norm(flat(expected) - DIRECT) > 1e-2


def test_minibatches_initial_and_chunks_against_reverse():
    """The same key draws the same minibatches; 8 does not divide 29, nor does 3 divide 10."""
    shared = {"initial": from_x, "sample": bx.sampling.minibatch(8)}
    expected, expected_state, _ = cleaning_estimate(reverse(cleaning_loss, MOMENTUM, 6, **shared))
    for chunk in (None, 8):
        grad, state, _ = cleaning_estimate(cleaning(chunk=chunk, **shared))
        np.testing.assert_allclose(flat(grad), flat(expected), rtol=0, atol=1e-10)
        np.testing.assert_allclose(flat(state.y), flat(expected_state.y), rtol=1e-12)
    assert np.linalg.norm(flat(expected) - DIRECT) > 1e-2


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_no_number(chunk):
    u = jnp.array([1.0, -2.0, 3.0, 0.5, 4.0])
    grad, _, info = probe(7, u)
    other, _, other_info = probe(7, u, chunk=chunk)
    np.testing.assert_allclose(other, grad, rtol=1e-12)
    np.testing.assert_allclose(other_info.inner.detail.variance, info.inner.detail.variance, rtol=1e-12)


def scaling(directions, length, **options):
    """y_T = (x · 1) y0: a step that costs nothing, whose tangents are as large as one likes; what an estimate asks."""
    solve = lambda x, y, batch: jnp.sum(x) * y  # noqa: E731
    solver = forward_gradient(None, solve=solve, directions=directions, **options)
    return solver, linear_loss, jnp.array([1.0, 2.0, 4.0]), jnp.linspace(0, 1, length), bx.Batch(jnp.ones(length), None)


@pytest.mark.parametrize(
    ("directions", "length", "backend", "solves"),
    [(9, 60_000, "cpu", 1 + 3), (9, 60_000, "gpu", 1), (9, 50_000, "cpu", 1), (7, 100_000, "cpu", 1)],
    ids=["large", "another_backend", "small", "few"],
)
def test_a_cpu_pushes_four_at_once_where_all_are_large(monkeypatch, directions, length, backend, solves):
    """9 tangents of 60,000 doubles take 4.1 MiB, of 50,000 3.4 MiB."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    solver, outer_loss, x, y, batch = scaling(directions, length)
    hypergrad, found = bx.hypergradient(outer_loss, solver), []
    state = hypergrad.init(x, y, batch)
    jax.eval_shape(lambda: found.append(hypergrad.estimate(KEY, state, x, batch)[2].inner.detail.solves))
    assert found == [solves]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="all are pushed at once on other backends")
def test_four_at_once_change_no_number_and_devices_count_their_own():
    grad, _, info = estimate(*scaling(9, 60_000))
    expected, _, whole = estimate(*scaling(9, 60_000, chunk=9))
    np.testing.assert_allclose(grad, expected, rtol=1e-12)
    np.testing.assert_allclose(info.inner.detail.variance, whole.inner.detail.variance, rtol=1e-12)
    assert (info.inner.detail.solves, whole.inner.detail.solves) == (4, 2)
    _, outer_loss, x, y, batch = scaling(9, 60_000)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("directions",))
    hypergrad = bx.parallel.shard_directions(
        lambda axis: bx.hypergradient(outer_loss, scaling(9, 60_000, axis=axis)[0]), mesh
    )
    shared, _, info = jax.jit(hypergrad.estimate)(KEY, hypergrad.init(x, y, batch), x, batch)
    np.testing.assert_allclose(shared, expected, rtol=1e-12)
    assert info.inner.detail.solves == 4


def test_first_link_of_a_chain():
    """The hybrid of forward and reverse: the cotangent of the moments meets their tangents."""
    momentum = optax.sgd(1 / 4, momentum=1 / 2)
    last = reverse(QUADRATIC.inner_loss, momentum, 1)
    grad, state, _ = quadratic_estimate(chain(quadratic(2, momentum, 1, sampler=orthogonal), last))
    np.testing.assert_allclose(state.y, [9, 4], atol=1e-12)
    np.testing.assert_allclose(grad, [27 / 16, -1 / 2], atol=1e-12)
    adam, sample = optax.adam(0.1), bx.sampling.minibatch(8)
    last = reverse(cleaning_loss, adam, 2, sample=sample)
    grad, _, info = cleaning_estimate(chain(cleaning(optimizer=adam, steps=4, initial=from_x, sample=sample), last))
    expected, _, _ = cleaning_estimate(reverse(cleaning_loss, adam, 6, initial=from_x, sample=sample))
    np.testing.assert_allclose(flat(grad), flat(expected), rtol=0, atol=1e-10)
    assert info.inner.detail[0].detail.tangents == N


@pytest.mark.parametrize(
    "optimizer", [optax.adamw(0.1), optax.apply_if_finite(optax.adam(0.1), 3)], ids=["adamw", "within_a_condition"]
)
def test_an_unused_parameter_under_adam(optimizer):
    """Its second moment is exactly zero, where the square root has no derivative."""
    y = Y0 | {"unused": jnp.ones(3)}
    solvers = [cleaning(optimizer=optimizer, steps=4), reverse(cleaning_loss, optimizer, 4)]
    (grad, state, info), (expected, _, _) = (
        estimate(solver, validation_loss, WEIGHTS, y, CLEANING) for solver in solvers
    )
    assert np.isfinite(flat((grad, state.y))).all()
    assert not info.inner.breakdown
    np.testing.assert_allclose(flat(grad), flat(expected), rtol=0, atol=1e-10)


# Any solver.


def until_converged(x, y, batch):
    """Gradient steps up to a tolerance."""

    def gradient(y):
        return jax.grad(QUADRATIC.inner_loss, 1)(x, y, batch)

    return jax.lax.while_loop(lambda y: jnp.linalg.norm(gradient(y)) > 2e-4, lambda y: y - gradient(y) / 4, y)


def test_a_loop_of_unknown_length():
    """4e-6 of ‖x‖ is left of the gradient, hence a relative error of about 2e-5 is left of the hypergradient."""
    solver = forward_gradient(None, directions=2, sampler=orthogonal, solve=until_converged)
    grad, state, info = quadratic_estimate(solver)
    implicit = np.array([10, -1 / 2])
    assert np.linalg.norm(grad - implicit) / np.linalg.norm(implicit) < 1e-4
    np.testing.assert_allclose(state.y, [16, 4], atol=3e-4)
    assert info.inner.inner_loss is None
    assert not info.inner.breakdown
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(lambda x: jnp.sum(until_converged(x, QUADRATIC.y, None)))(QUADRATIC.x)


def test_a_solve_with_a_loss_and_a_start():
    """The loss is only reported; the start is differentiated with the rest."""
    one_step = lambda x, y, batch: y - (QUADRATIC.h * y - x) / 4  # noqa: E731
    options = {"sampler": orthogonal, "solve": one_step, "initial": lambda x: 2 * x}
    grad, state, info = quadratic_estimate(forward_gradient(QUADRATIC.inner_loss, directions=2, **options))
    jacobian = 2 - (2 * QUADRATIC.h - 1) / 4
    np.testing.assert_allclose(state.y, jacobian * QUADRATIC.x, atol=1e-12)
    np.testing.assert_allclose(grad, jacobian * (state.y - QUADRATIC.a), atol=1e-12)
    assert info.inner.inner_loss == pytest.approx(float(QUADRATIC.inner_loss(QUADRATIC.x, state.y, None)), rel=1e-12)


# A pure function.


@pytest.mark.compiles(100)  # operation by operation
def test_jit_is_eager_and_one_trace_serves_all_estimates():
    hypergrad = bx.hypergradient(QUADRATIC.outer_loss, quadratic(3))
    state = hypergrad.init(QUADRATIC.x, QUADRATIC.y)
    expected, *_ = hypergrad.estimate(KEY, state, QUADRATIC.x, NO_DATA)
    step = jax.jit(chex.assert_max_traces(hypergrad.estimate, n=1))
    grad, state, _ = step(KEY, state, QUADRATIC.x, NO_DATA)
    np.testing.assert_allclose(grad, expected, rtol=1e-12)
    step(jax.random.key(1), state, grad, NO_DATA)


def test_vmap_over_points_and_keys_is_a_loop_and_so_is_the_differentiable_solve():
    """With momentum, a first y that depends on x, and a direct part that is exact in both."""
    solver = quadratic(1, optax.sgd(1 / 4, momentum=1 / 2), initial=lambda x: x**2)
    solve = bx.differentiable(solver)
    points, keys = jnp.array([[16.0, 8.0], [1.0, -1.0], [0.3, 0.2]]), jax.random.split(KEY, 3)

    def outer_loss(x, y, batch):
        return jnp.sum(jnp.cos(x)) + QUADRATIC.outer_loss(x, y, batch)

    def one(x, key):
        grad = estimate(solver, outer_loss, x, QUADRATIC.y, key=key)[0]
        return grad, jax.grad(lambda x: outer_loss(x, solve(x, QUADRATIC.y, None, key), None))(x)

    vectorized, compiled = jax.jit(jax.vmap(one))(points, keys), jax.jit(one)
    looped = [compiled(*pair) for pair in zip(points, keys, strict=True)]
    np.testing.assert_allclose(vectorized[0], [pair[0] for pair in looped], rtol=1e-12)
    np.testing.assert_allclose(vectorized[1], vectorized[0], rtol=1e-12)
    np.testing.assert_allclose([pair[1] for pair in looped], vectorized[0], rtol=1e-12)


def dots(function, *arguments):
    return sorted(executed_dots(jax.jit(function).lower(*arguments).compile().as_text(), unknown_trips=1))


@pytest.mark.usefixtures("uncached")
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="reads HLO text as it is printed since jax 0.10")
def test_products_of_the_compiled_program():
    """No tangent is pushed without a derivative; with one, b of them go through the step at once."""
    random = np.random.default_rng(0)
    x, y, A, B = (random.normal(size=shape) / 3 for shape in (5, 11, (7, 11), (11, 5)))

    def inner_loss(x, y, batch):
        return jnp.sum(jax.nn.softplus(A @ jnp.tanh(y))) + y @ (B @ x)

    forward = forward_gradient(inner_loss, optax.sgd(0.1), 4, directions=3)
    plain = no_gradient(inner_loss, optax.sgd(0.1), 4)
    solves = [bx.differentiable(solver) for solver in (forward, plain)]
    alone, expected = (dots(lambda x, y, solve=solve: solve(x, y, None, KEY), x, y) for solve in solves)
    assert alone == expected
    assert sum(dot.times for dot in alone) >= 4
    outer_loss = lambda x, y, batch: jnp.sum(y**2)  # noqa: E731
    hypergrad = bx.hypergradient(outer_loss, forward)
    state = hypergrad.init(x, y)
    all_dots = dots(lambda x, state: hypergrad.estimate(KEY, state, x, NO_DATA)[::2], x, state)
    _, _, info = jax.jit(hypergrad.estimate)(KEY, state, x, NO_DATA)
    gradients = sum(dot.times * np.prod(dot.returned) // 11 for dot in all_dots if dot.contracted == 7)
    calls = info.inner.calls
    assert gradients == calls.inner_gradients + calls.hessian_products
    assert calls.hessian_products == calls.cross_products == 3 * 4


# Unbiased, with the variance that is declared.


SAMPLERS = {"rademacher": rademacher, "gaussian": gaussian, "sphere": sphere} | {
    "orthogonal": orthogonal,
    "hadamard": hadamard,
    "coordinate": coordinate,
}


def over_keys(number, estimate):
    """Gradients [keys, N] and infos for as many keys."""
    grads, _, info = jax.vmap(estimate)(jax.random.split(jax.random.key(5), number))
    return flat(grads, axes=1), info.inner.detail


def check_noise(grads, detail, u, noise):
    assert_mean(np.sum((grads - u) ** 2, axis=1), noise * (u @ u))
    assert_mean(detail.variance, noise * (u @ u))
    np.testing.assert_allclose(detail.relative_error, np.sqrt(noise), rtol=1e-12)
    np.testing.assert_allclose(detail.step_scale, 1 / (1 + noise), rtol=1e-12)
    assert detail.cosine is None
    assert (detail.tangents == 4).all()
    assert (detail.solves == 1).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_of_each_sampler(name):
    """The variance that each estimate reports is the measured one in the mean."""
    u, sampler = np.array([1.0, -2.0, 3.0, 0.5, 4.0]), SAMPLERS[name]
    grads, detail = over_keys(4000, lambda key: probe(4, jnp.asarray(u), key=key, sampler=sampler))
    assert_mean(grads, u)
    check_noise(grads, detail, u, sampler.noise(5, 4))


def test_noise_of_an_unroll():
    """The direct part of the gradient is exact, and takes no part in the noise."""
    exact = flat(cleaning_estimate(reverse(cleaning_loss, MOMENTUM, 6))[0])
    grads, detail = over_keys(2000, lambda key: cleaning_estimate(cleaning(4, sampler=rademacher), key=key))
    assert_mean(grads, exact)
    check_noise(grads - DIRECT, detail, exact - DIRECT, (N - 1) / 4)


def test_the_step_scale_contracts_as_it_should():
    """On ½‖x‖² the best step is 1 / (1 + (N − 1) / b), and shrinks the mean square by 1 − b / (b + N − 1)."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=50))
    solver = forward_gradient(tracking_loss, optax.sgd(1.0), 1, directions=5)
    outer_loss = lambda x, y, batch: jnp.sum(y**2) / 2  # noqa: E731

    def ratio(key):
        grad, _, info = estimate(solver, outer_loss, x, jnp.zeros(50), key=key)
        return jnp.sum((x - info.inner.detail.step_scale * grad) ** 2) / jnp.sum(x**2), info.inner.detail.step_scale

    ratios, scales = jax.vmap(ratio)(jax.random.split(KEY, 2000))
    np.testing.assert_allclose(scales, 1 / (1 + 49 / 5), rtol=1e-12)
    assert ratios.mean() == pytest.approx(1 - 5 / 54, abs=0.005)


def test_enumeration_of_all_signs():
    """Unbiased with (N − 1)‖u‖² of noise, to the last digit: N = 5, one direction, 32 of them."""
    u = np.array([1.0, -2.0, 3.0, 0.5, 4.0])
    grads, _, info = jax.vmap(lambda V: probe(1, u, sampler=rows(V)))(signs(5)[:, None, :])
    grads = np.asarray(grads)
    np.testing.assert_allclose(grads.mean(axis=0), u, atol=1e-12)
    squared_errors = np.sum((grads - u) ** 2, axis=1)
    assert squared_errors.mean() == pytest.approx(4 * (u @ u), rel=1e-12)
    assert info.inner.detail.variance.mean() == pytest.approx(4 * (u @ u), rel=1e-12)


# Memory.


DATA = np.random.default_rng(4).normal(size=(12, 16))


def regression_loss(x, y, batch):
    """x of 4 numbers, y of 16."""
    return jnp.mean(jnp.cosh(batch @ y)) + jnp.exp(x).sum() * jnp.sum(y**2) + x @ y[:4]


def temporary_bytes(gradient, steps):
    compiled = jax.jit(gradient(steps)).lower(jnp.zeros(4)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def gradient_of(make, optimizer, **options):
    def gradient(steps):
        hypergrad = bx.hypergradient(linear_loss, make(regression_loss, optimizer, steps, **options))
        state, batch = hypergrad.init(jnp.zeros(4), jnp.ones(16)), bx.Batch(jnp.ones(16), DATA)
        return lambda x: hypergrad.estimate(KEY, state, x, batch)[0]

    return gradient


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        pytest.param(optax.sgd(0.1), {"directions": 4}, marks=pytest.mark.slow),
        (MOMENTUM, {"directions": 4, "sampler": hadamard, "sample": bx.sampling.minibatch(8)}),
        (optax.adam(0.1), {"directions": 5, "sample": bx.sampling.minibatch(8), "chunk": 2}),
        (optax.sgd(0.1), {"directions": 4, "initial": lambda x: jnp.tile(x, 4), "guide": bx.inner.guides.blocks(2)}),
    ],
    ids=["sgd", "momentum_minibatch", "adam_minibatch_chunk", "initial_guide"],
)
def test_memory_is_constant_in_the_number_of_steps(optimizer, options):
    gradient = gradient_of(forward_gradient, optimizer, **options)
    assert temporary_bytes(gradient, 64) == temporary_bytes(gradient, 1024)


@pytest.mark.usefixtures("uncached")
def test_memory_of_chunks_is_constant_in_the_number_of_directions():
    few, many = (
        temporary_bytes(gradient_of(forward_gradient, optax.sgd(0.1), directions=number, chunk=2), 64)
        for number in (4, 64)
    )
    assert many - few < 60 * 16 * 8 / 2, "no copy of y for each direction"


def linearized(steps):
    """What must not be done: all of the loop linearized at once, its tangents vectorized afterwards."""

    def solve(x):
        def step(y, _):
            return y - 0.1 * jax.grad(regression_loss, 1)(x, y, DATA), None

        return jax.lax.scan(step, jnp.ones(16), length=steps)[0]

    def gradient(x):
        V = jax.vmap(rademacher.draw(KEY, x, 4))(jnp.arange(4))
        _, push = jax.linearize(solve, x)
        return jax.vmap(push)(V).sum(axis=1) @ V

    return gradient


@pytest.mark.usefixtures("uncached")
def test_memory_of_reverse_mode_and_of_a_linearized_loop_grows():
    """By one copy of y a step at the least."""
    for gradient in (gradient_of(reverse, optax.sgd(0.1)), linearized):
        assert temporary_bytes(gradient, 1024) - temporary_bytes(gradient, 64) >= 960 * 16 * 8


# Mistakes.


LINK = reverse(QUADRATIC.inner_loss, QUADRATIC_SGD, 2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: quadratic(0), ["directions must be", "got 0"]),
        (lambda: quadratic(-3), ["directions must be", "got -3"]),
        (lambda: quadratic(1.5), ["directions must be a static Python int", "got float"]),
        (lambda: quadratic(2, chunk=0), ["chunk must be", "got 0"]),
        (lambda: quadratic(2, guide=0.5), ["guide must be a Guide", "got 0.5"]),
        (lambda: quadratic(2, control_variate=0.5), ["control_variate must be a Guide", "got 0.5"]),
        (lambda: quadratic(steps=-1), ["steps must be", "got -1"]),
        (
            lambda: forward_gradient(QUADRATIC.inner_loss, optax.sgd(0.1)),
            ["optimizer and steps must be given", "steps=None"],
        ),
        (lambda: forward_gradient(QUADRATIC.inner_loss, steps=3), ["optimizer and steps must be given"]),
        (lambda: forward_gradient(QUADRATIC.inner_loss), ["optimizer and steps must be given"]),
        (lambda: forward_gradient(None, optax.sgd(0.1), 3), ["inner_loss must be a function"]),
        (lambda: quadratic(solve=until_converged), ["solve replaces"]),
        (lambda: chain(LINK, quadratic()), ["last must send a derivative back", "Make it the first link"]),
        (lambda: chain(LINK, chain(quadratic(), LINK)), ["last must send a derivative back"]),
        (lambda: forward_gradient(None, solve=lambda x: x), ["solve must be a function (x, y0, batch)"]),
        (lambda: forward_gradient(QUADRATIC.inner_loss, optax.sgd, 3), ["optimizer must be an optax", "sgd"]),
        (lambda: forward_gradient(QUADRATIC.inner_loss, 0.1, 3), ["optimizer must be an optax", "0.1"]),
    ],
)
def test_mistakes_of_construction(make, says):
    with pytest.raises(ValueError, match=r"must|replaces") as caught:
        make()
    assert [part for part in says if part not in str(caught.value)] == []


def sampler_of(draw):
    return bx.inner.random_directions.Sampler(draw, lambda N, b: (N - 1) / b)


@pytest.mark.parametrize(
    ("solver", "point", "says"),
    [
        (quadratic(3, sampler=orthogonal), {}, ["directions", "got 3", "orthogonal"]),
        (quadratic(3, sampler=coordinate), {}, ["directions", "got 3", "coordinate"]),
        (quadratic(3, sampler=hadamard), {}, ["directions", "got 3", "hadamard"]),
        (quadratic(2, sampler=rademacher.draw), {}, ["sampler must be a Sampler"]),
        (quadratic(2), {"key": None}, ["key must be", "got None"]),
        (quadratic(2), {"key": 3}, ["key must be one jax.random.key"]),
        (quadratic(2), {"x": jnp.arange(2)}, ["x must hold floating-point arrays only", "got int64"]),
        (quadratic(2, sampler=sampler_of(lambda key, like, b: lambda i: jnp.ones(3))), {}, ["sampler", "(3,)"]),
        (quadratic(2, sampler=sampler_of(lambda key, like, b: lambda i: {"a": like})), {}, ["sampler", "'a'"]),
        (
            quadratic(2, sampler=sampler_of(lambda key, like, b: lambda i: jax.random.normal(key, (2,)) / 2)),
            {},
            ["sampler"],
        ),
        (quadratic(2, axis="devices"), {}, ["axis must be the name of a device axis", "got 'devices'"]),
        (
            forward_gradient(None, solve=lambda x, y0, batch: jnp.zeros(3)),
            {},
            ["y under solve must keep its structure and shapes", "(3,)"],
        ),
    ],
    ids=[
        "orthogonal",
        "coordinate",
        "hadamard",
        "function",
        "no_key",
        "key",
        "x",
        "shape",
        "tree",
        "variance",
        "axis",
        "solve",
    ],
)
def test_mistakes_of_use(solver, point, says):
    with pytest.raises(ValueError, match=r"must|replaces") as caught:
        quadratic_estimate(solver, **point)
    assert [part for part in says if part not in str(caught.value)] == []


def test_no_derivative_with_respect_to_the_first_y():
    solve = bx.differentiable(quadratic(2))
    with pytest.raises(ValueError, match="y0"):
        jax.grad(lambda y0: jnp.sum(solve(QUADRATIC.x, y0, None, KEY)))(QUADRATIC.y)

"""Finite differences of black boxes: right up to the order of the difference, with the solves that are declared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from directional_cases import (
    CLEANING,
    KEY,
    NO_DATA,
    QUADRATIC,
    QUADRATIC_GRADIENT,
    QUADRATIC_SGD,
    WEIGHTS,
    Y0,
    N,
    assert_mean,
    cleaning_estimate,
    cleaning_loss,
    estimate,
    flat,
    quadratic_estimate,
    rows,
    signs,
    validation_loss,
)
from scipy.integrate import solve_ivp

import bilevax as bx
from bilevax.inner import central, no_gradient, one_sided, reverse, zeroth_order
from bilevax.inner.random_directions import coordinate, hadamard, orthogonal

BOTH = pytest.mark.parametrize("difference", [one_sided, central], ids=["one_sided", "central"])
two_steps = bx.differentiable(no_gradient(QUADRATIC.inner_loss, QUADRATIC_SGD, 2))
five_steps = bx.differentiable(no_gradient(cleaning_loss, optax.sgd(0.3), 5))


def estimated(hypergrad, x, y, batch=NO_DATA, key=KEY):
    return jax.jit(hypergrad.estimate)(key, hypergrad.init(x, y), x, batch)


# A quadratic whose numbers are known.


def test_numbers_of_the_quadratic():
    """The inner solution is linear in x: only the one-sided difference of F itself is off, by 85 μ / 512."""
    mu, derivatives = 0.1, np.array([5 / 16, 19 / 16, -19 / 16, -5 / 16])  # along (−1, −1), (1, −1), (−1, 1), (1, 1)

    def one(V):
        half = [
            quadratic_estimate(zeroth_order(two_steps, directions=1, mu=mu, difference=difference, sampler=rows(V)))
            for difference in (one_sided, central)
        ]
        full = [
            bx.hypergradients.full_zeroth_order(
                QUADRATIC.outer_loss, two_steps, directions=1, mu=mu, difference=difference, sampler=rows(V)
            )
            for difference in (one_sided, central)
        ]
        return [grad for grad, *_ in half + [estimated(method, QUADRATIC.x, QUADRATIC.y) for method in full]]

    V = signs(2)
    got = [(grads * V).sum(axis=1) / 2 for grads in jax.jit(jax.vmap(one))(V[:, None, :])]
    for derivative, error in zip(got, [0, 0, 85 * mu / 512, 0], strict=True):
        np.testing.assert_allclose(derivative, derivatives + error, atol=1e-9)


# As many directions as there are numbers in x.


@pytest.fixture(scope="module")
def exact():
    return flat(cleaning_estimate(reverse(cleaning_loss, optax.sgd(0.3), 5))[0])


def half_form(mu, difference, **options):
    return bx.hypergradient(
        validation_loss, zeroth_order(five_steps, directions=N, mu=mu, difference=difference, **options)
    )


def full_form(mu, difference, **options):
    return bx.hypergradients.full_zeroth_order(
        validation_loss, five_steps, directions=N, mu=mu, difference=difference, **options
    )


@pytest.mark.parametrize("directions", [1, 2, 3])
def test_one_or_two_directions_have_central_differences_by_default(directions):
    x, mu = jnp.array(0.3), 0.01
    solver = zeroth_order(lambda x, y0, batch: jnp.exp(2 * x), directions=directions, mu=mu)
    grad, _, info = estimated(bx.hypergradient(lambda x, y, batch: y, solver), x, x)
    exact, few = 2 * np.exp(0.6), directions <= 2
    assert info.inner.detail.solves == (2 * directions if few else directions) + 1
    error = abs(grad - exact) / exact
    assert error < (1.01 * (2 * mu) ** 2 / 6 if few else 1.02 * mu)


@BOTH
@pytest.mark.parametrize("form", [half_form, full_form])
def test_order_of_the_error(form, difference, exact):
    """Halving μ halves the error of the one, and quarters that of the other."""
    order = {one_sided: 1, central: 2}[difference]

    @jax.jit
    def run(mu):
        hypergrad = form(mu, difference, sampler=coordinate)
        return hypergrad.estimate(KEY, hypergrad.init(WEIGHTS, Y0), WEIGHTS, CLEANING)[0]

    errors = [np.linalg.norm(flat(run(mu)) - exact) for mu in (0.02, 0.01, 0.005, 1e-5)]
    np.testing.assert_allclose(np.divide(errors[:2], errors[1:3]), 2**order, rtol=0.1)
    assert errors[-1] < 1e-4 * np.linalg.norm(exact)


def test_mean_over_many_keys(exact):
    """Unbiased up to the order of the difference; the direct part is exact, and the noise is the declared one."""
    solver = zeroth_order(five_steps, directions=4, mu=1e-4, difference=central, sampler=hadamard)
    grads, _, info = jax.vmap(lambda key: cleaning_estimate(solver, key=key))(jax.random.split(KEY, 1000))
    assert_mean(flat(grads, axes=1), exact)
    squared_errors = np.sum((flat(grads, axes=1) - exact) ** 2, axis=1)
    assert_mean(squared_errors - info.inner.detail.variance, 0)
    u = exact - flat(WEIGHTS) / 10
    assert_mean(squared_errors, hadamard.noise(N, 4) * (u @ u))


# Black boxes.


def counted(function):
    """The function, and the list of its calls."""
    calls = []

    def noted(x, y, batch):
        calls.append(None)
        assert isinstance(jax.tree.leaves(x)[0], np.ndarray)
        return function(x, y, batch)

    return noted, calls


@BOTH
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_solves_are_counted(difference, chunk):
    """b + 1 and 2 b + 1: as many as the black box really answers."""
    function, calls = counted(lambda x, y, batch: x / np.array([1.0, 2.0]))
    solver = zeroth_order(bx.inner.black_box(function), directions=3, mu=0.1, difference=difference, chunk=chunk)
    grad, state, info = quadratic_estimate(solver)
    jax.block_until_ready(grad)
    np.testing.assert_allclose(state.y, [16, 4], rtol=1e-14)
    assert len(calls) == info.inner.detail.solves == {one_sided: 4, central: 7}[difference]
    assert info.inner.detail.tangents == 3
    assert info.inner.calls == bx.problem.Calls(outer_gradients=1)
    assert info.inner.inner_loss is None


def test_an_equation_solved_by_scipy():
    """y' = −x₀ y + x₁, observed three times, against its closed form."""
    times, x = np.array([0.3, 0.7, 1.0]), jnp.array([1.5, 0.5])

    def integrate(x, y, batch):
        solution = solve_ivp(lambda t, y: -x[0] * y + x[1], (0, 1), [batch], t_eval=times, rtol=1e-10, atol=1e-12)
        assert solution.success
        return solution.y[0]

    def closed_form(x, y, batch):
        return x[1] / x[0] + (batch - x[1] / x[0]) * jnp.exp(-x[0] * times)

    def outer_loss(x, y, target):
        return jnp.sum((y - target) ** 2) + 0.1 * jnp.sum(x**2)

    batch, y = bx.Batch(jnp.array([1.0, 0.2, 0.3]), jnp.array(2.0)), jnp.zeros(3)
    expected = jax.jit(jax.grad(lambda x: outer_loss(x, closed_form(x, y, batch.inner), batch.outer)))(x)
    solver = zeroth_order(
        bx.inner.black_box(integrate), directions=2, mu=1e-4, difference=central, sampler=orthogonal, chunk=1
    )
    grad, state, info = estimate(solver, outer_loss, x, y, batch)
    np.testing.assert_allclose(state.y, closed_form(x, y, batch.inner), rtol=1e-8)
    np.testing.assert_allclose(grad, expected, rtol=1e-5)
    assert not info.inner.breakdown
    # The outer loss as another black box.
    cost = bx.inner.black_box(
        lambda x, y, batch: np.sum((y - batch) ** 2) + 0.1 * x @ x, returns=lambda x, y, batch: 0.0
    )
    hypergrad = bx.hypergradients.full_zeroth_order(
        cost, bx.inner.black_box(integrate), directions=2, mu=1e-4, sampler=orthogonal
    )
    grad, state, info = estimated(hypergrad, x, y, batch)
    np.testing.assert_allclose(grad, expected, rtol=1e-5)
    assert info.outer_loss == pytest.approx(float(outer_loss(x, state.y, batch.outer)), rel=1e-12)
    assert info.inner.detail.solves == 5


def test_common_random_numbers():
    """A key in the batch gives every evaluation the same noise, which is a thousand times the difference."""

    def noisy(x, y, batch):
        return x * QUADRATIC.h + jax.random.normal(batch["key"], (2,))

    def by_numpy(x, y, batch):
        return x * np.array([1.0, 2.0]) + np.random.default_rng(batch["key"]).normal(size=2)

    for solve in (noisy, bx.inner.black_box(by_numpy)):
        solver = zeroth_order(solve, directions=2, mu=1e-3, sampler=orthogonal)
        batch = bx.Batch(None, {"key": jax.random.key(8)})
        grad, state, _ = estimate(solver, QUADRATIC.outer_loss, QUADRATIC.x, QUADRATIC.y, batch)
        np.testing.assert_allclose(grad, QUADRATIC.h * (state.y - QUADRATIC.a), rtol=1e-8)
        assert np.abs(state.y - QUADRATIC.x * QUADRATIC.h).min() > 0.01


def test_a_first_y_that_depends_on_x():
    for initial, jacobian in ((lambda x: x, (1, 5 / 8)), (lambda x: jnp.zeros(2), (7 / 16, 3 / 8))):
        solver = zeroth_order(two_steps, directions=2, mu=0.1, sampler=orthogonal, initial=initial)
        grad, state, _ = quadratic_estimate(solver)
        np.testing.assert_allclose(grad, np.array(jacobian) * (state.y - QUADRATIC.a), atol=1e-9)
        full = bx.hypergradients.full_zeroth_order(
            QUADRATIC.outer_loss, two_steps, directions=2, mu=0.1, sampler=orthogonal, initial=initial
        )
        other, full_state, _ = estimated(full, QUADRATIC.x, QUADRATIC.y)
        np.testing.assert_allclose(other, grad, atol=1e-9)
        np.testing.assert_allclose(full_state.y, state.y, atol=1e-12)


def test_guides_and_control_variates():
    """As for exact tangents: a guess in the right direction leaves nothing to chance."""
    u = jnp.asarray(QUADRATIC_GRADIENT)[None]
    for options in ({"guide": bx.inner.guides.fixed(5 * u)}, {"control_variate": bx.inner.guides.fixed(u)}):
        grad, _, info = quadratic_estimate(zeroth_order(two_steps, directions=2, mu=0.1, **options))
        np.testing.assert_allclose(grad, QUADRATIC_GRADIENT, atol=1e-9)
        assert info.inner.detail.relative_error < 1e-9
    grad, state, info = quadratic_estimate(
        zeroth_order(two_steps, directions=2, mu=0.1, guide=bx.inner.guides.running_mean(0.5))
    )
    np.testing.assert_allclose(state.solver.guide, grad / 2, rtol=1e-12)
    assert info.inner.detail.solves == 5  # two directions, on both sides
    assert info.inner.detail.cosine == 0  # of a mean that is still zero


def test_a_loss_that_is_only_reported():
    _, state, info = quadratic_estimate(zeroth_order(two_steps, directions=2, mu=0.1, inner_loss=QUADRATIC.inner_loss))
    np.testing.assert_allclose(state.y, [7, 3], rtol=1e-14)
    assert info.inner.inner_loss == pytest.approx(float(QUADRATIC.inner_loss(QUADRATIC.x, state.y, None)), rel=1e-12)
    assert info.inner.gradient_norm == pytest.approx(np.hypot(9, 2), rel=1e-12)
    assert info.inner.calls == bx.problem.Calls(outer_gradients=1, inner_gradients=2)


def test_the_differentiable_solve_and_the_second_phase():
    solver = zeroth_order(
        bx.inner.black_box(lambda x, y, batch: x / np.array([1.0, 2.0])), directions=2, mu=0.1, sampler=coordinate
    )
    solve = bx.differentiable(solver)
    grad = jax.jit(jax.grad(lambda x: QUADRATIC.outer_loss(x, solve(x, QUADRATIC.y, None, KEY), None)))(QUADRATIC.x)
    np.testing.assert_allclose(grad, [10, -1 / 2], atol=1e-9)
    second = bx.hypergradient(QUADRATIC.outer_loss, solver)
    implicit = bx.inner.implicit(QUADRATIC.inner_loss, QUADRATIC_SGD, 2, ihvp=bx.ihvp.exact())
    hypergrad = bx.two_phase(1, bx.hypergradient(QUADRATIC.outer_loss, implicit), second)

    def step(state, key):
        grad, state, info = hypergrad.estimate(key, state, QUADRATIC.x, NO_DATA)
        return state, (grad, info.phase)

    state, (grads, phases) = jax.lax.scan(step, hypergrad.init(QUADRATIC.x, QUADRATIC.y), jax.random.split(KEY, 2))
    np.testing.assert_array_equal(phases, [0, 1])
    np.testing.assert_allclose(grads, [[1, -1], [10, -1 / 2]], atol=1e-9)
    np.testing.assert_allclose(state.y, [16, 4], rtol=1e-14)


# What goes wrong.


@pytest.mark.parametrize("where", ["everywhere", "ahead"])
def test_numbers_that_are_not_finite_are_a_breakdown(where):
    """Also where the solution itself is fine and only an evaluation next to it fails."""

    def fails(x, y, batch):
        broken = where == "everywhere" or not np.allclose(x, QUADRATIC.x)
        return np.where(broken, np.nan, x)

    grad, state, info = quadratic_estimate(zeroth_order(bx.inner.black_box(fails), directions=2, mu=0.1))
    assert info.inner.breakdown
    assert np.isnan(grad).any()
    assert np.isnan(state.y).all() == (where == "everywhere")
    full = bx.hypergradients.full_zeroth_order(QUADRATIC.outer_loss, bx.inner.black_box(fails), directions=2, mu=0.1)
    assert estimated(full, QUADRATIC.x, QUADRATIC.y)[2].inner.breakdown


STRUCTURES = {
    "shape": (lambda x, y, batch: np.zeros(3), "(3,)"),
    "tree": (lambda x, y, batch: {"y": x}, "'y'"),
    "scalar": (lambda x, y, batch: 1.0, "[()]"),
    "nothing": (lambda x, y, batch: None, "None"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_black_box_of_another_structure(name):
    function, says = STRUCTURES[name]
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="result of the black box must keep") as caught:
        jax.block_until_ready(quadratic_estimate(zeroth_order(bx.inner.black_box(function), directions=2)))
    assert says in str(caught.value)
    if name != "nothing":
        as_jax = lambda x, y, batch: jax.tree.map(jnp.asarray, function(x, y, batch))  # noqa: E731
        with pytest.raises(ValueError, match="y under solve must keep its structure and shapes") as caught:
            quadratic_estimate(zeroth_order(as_jax, directions=2))
        assert says in str(caught.value)


def test_what_a_black_box_raises_is_not_swallowed():
    def fails(x, y, batch):
        raise FloatingPointError("the mesh is too coarse")

    with pytest.raises(jax.errors.JaxRuntimeError, match="the mesh is too coarse"):
        jax.block_until_ready(quadratic_estimate(zeroth_order(bx.inner.black_box(fails), directions=2)))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: zeroth_order(two_steps, directions=2, mu=0.0), ["mu must be a finite number > 0", "got 0.0"]),
        (lambda: zeroth_order(two_steps, directions=2, mu=-1e-3), ["mu must be a finite number > 0", "got -0.001"]),
        (lambda: zeroth_order(two_steps, directions=2, mu=jnp.nan), ["mu must be a finite number > 0", "got nan"]),
        (lambda: zeroth_order(two_steps, directions=2, mu=jnp.ones(2)), ["mu must be one number", "shape (2,)"]),
        (lambda: zeroth_order(two_steps, directions=0), ["directions must be", "got 0"]),
        (lambda: zeroth_order(two_steps, directions=2, chunk=0), ["chunk must be", "got 0"]),
        (
            lambda: zeroth_order(two_steps, directions=2, difference="central"),
            ["difference must be a Difference", "'central'"],
        ),
        (lambda: zeroth_order(lambda x: x), ["solve must be a function (x, y0, batch)"]),
        (lambda: zeroth_order(None), ["solve must be a function (x, y0, batch)", "got None"]),
        (
            lambda: quadratic_estimate(zeroth_order(two_steps, directions=3, sampler=coordinate)),
            ["directions", "got 3"],
        ),
        (lambda: quadratic_estimate(zeroth_order(two_steps), key=None), ["key must be", "got None"]),
        (lambda: quadratic_estimate(zeroth_order(two_steps), x=jnp.arange(2)), ["x must hold floating-point", "int64"]),
        (lambda: bx.inner.black_box(lambda x: x), ["function must be a function (x, y, batch)"]),
        (lambda: bx.inner.black_box(two_steps, returns=0.0), ["returns must be a function (x, y, batch)", "got 0.0"]),
        (
            lambda: bx.hypergradients.full_zeroth_order(QUADRATIC.outer_loss, two_steps, directions=2, mu=0.0),
            ["mu must be", "got 0.0"],
        ),
        (
            lambda: bx.hypergradients.full_zeroth_order(QUADRATIC.outer_loss, two_steps, directions=0),
            ["directions must be", "got 0"],
        ),
        (
            lambda: bx.hypergradients.full_zeroth_order(3.0, two_steps),
            ["outer_loss must be a function (x, y, batch)", "got 3.0"],
        ),
        (
            lambda: estimated(
                bx.hypergradients.full_zeroth_order(lambda x, y, batch: y, two_steps), QUADRATIC.x, QUADRATIC.y
            ),
            ["outer_loss must return a scalar", "(2,)"],
        ),
    ],
)
def test_mistakes(make, says):
    with pytest.raises(ValueError, match="must") as caught:
        make()
    assert [part for part in says if part not in str(caught.value)] == []


@pytest.mark.parametrize(("dtype", "scale"), [(jnp.bfloat16, 1.0), (jnp.float32, 1e5)])
def test_a_step_that_rounding_swallows_is_reported(dtype, scale):
    x = jnp.full(3, scale, dtype)
    grad, _, info = estimated(bx.hypergradient(lambda x, y, batch: jnp.sum(y), zeroth_order(lambda x, y0, _: x)), x, x)
    assert np.isnan(grad.astype(float)).all()
    assert info.inner.breakdown


def test_a_black_box_returns_real_numbers():
    solve = bx.inner.black_box(lambda x, y, batch: x + 1j)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="black box must hold float64; got complex128"):
        jax.block_until_ready(solve(jnp.ones(2), jnp.ones(2), None))

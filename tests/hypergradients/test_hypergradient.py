"""Hypergradients against closed forms, dense solves and central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

NO_DATA = bx.Batch(None, None)


def gradient(outer_loss, solver, x, y, batch=NO_DATA):
    hypergrad = bx.hypergradient(outer_loss, solver)
    return jax.jit(hypergrad.estimate)(jax.random.key(0), hypergrad.init(x, y), x, batch)[0]


def central_differences(function, x, step=1e-5):
    values = jax.jit(jax.vmap(lambda column: function(x + column) - function(x - column)))
    return values(jnp.eye(x.size) * step) / (2 * step)


class TestWorkedQuadratic:
    """g = ½ yᵀdiag(h)y − xᵀy, f = ½‖y − a‖², two steps of SGD from zero; every number is an exact fraction."""

    h, a, x, y0 = jnp.array([1.0, 2.0]), jnp.array([6.0, 5.0]), jnp.array([16.0, 8.0]), jnp.zeros(2)

    def inner_loss(self, x, y, batch):
        return 0.5 * self.h @ y**2 - x @ y

    def outer_loss(self, x, y, batch):
        return 0.5 * jnp.sum((y - self.a) ** 2)

    def check(self, solver, expected_gradient, expected_y):
        hypergrad = bx.hypergradient(self.outer_loss, solver)
        grad, state, _ = jax.jit(hypergrad.estimate)(None, hypergrad.init(self.x, self.y0), self.x, NO_DATA)
        np.testing.assert_allclose(state.y, expected_y, rtol=1e-15)
        np.testing.assert_allclose(grad, expected_gradient, rtol=1e-14)

    def test_sgd(self):
        self.check(bx.inner.reverse(self.inner_loss, optax.sgd(0.25), 2), [7 / 16, -3 / 4], [7, 3])

    def test_momentum_carries_the_cotangent_of_its_state(self):
        optimizer = optax.sgd(0.25, momentum=0.5)
        self.check(bx.inner.reverse(self.inner_loss, optimizer, 2), [27 / 16, -1 / 2], [9, 4])
        link = bx.inner.reverse(self.inner_loss, optimizer, 1)
        self.check(bx.inner.chain(link, link), [27 / 16, -1 / 2], [9, 4])

    def test_initial(self):
        self.check(bx.inner.reverse(self.inner_loss, optax.sgd(0.25), 2, initial=lambda x: x), [10, 0], [16, 5])

    def test_truncated(self):
        link = bx.inner.reverse(self.inner_loss, optax.sgd(0.25), 1)
        first = bx.inner.no_gradient(self.inner_loss, optax.sgd(0.25), 1)
        self.check(bx.inner.chain(first, link), [1 / 4, -1 / 2], [7, 3])

    @pytest.mark.parametrize("ihvp", [bx.ihvp.exact(), bx.ihvp.cg(tol=1e-14)])
    def test_implicit(self, ihvp):
        self.check(bx.inner.implicit(self.inner_loss, optax.sgd(0.25), 2, ihvp=ihvp), [1, -1], [7, 3])

    def test_one_step(self):
        self.check(
            bx.inner.implicit(self.inner_loss, optax.sgd(0.25), 2, ihvp=bx.ihvp.identity(0.25)), [1 / 4, -1 / 2], [7, 3]
        )

    def test_no_gradient_leaves_the_direct_part(self):
        self.check(bx.inner.no_gradient(self.inner_loss, optax.sgd(0.25), 2), [0, 0], [7, 3])

    def test_many_steps_approach_the_implicit_gradient(self):
        grad = gradient(self.outer_loss, bx.inner.reverse(self.inner_loss, optax.sgd(0.25), 40), self.x, self.y0)
        np.testing.assert_allclose(grad, [10, -0.5], atol=3e-4)


def test_learned_step_size():
    loss = lambda x, y, batch: 0.5 * y**2  # noqa: E731
    grad = gradient(loss, bx.inner.reverse(loss, lambda x: optax.sgd(x), 2), jnp.array(0.25), jnp.array(1.0))
    np.testing.assert_allclose(grad, -27 / 32, rtol=1e-15)
    grad = gradient(loss, bx.inner.implicit(loss, lambda x: optax.sgd(x), 2), jnp.array(0.25), jnp.array(1.0))
    assert grad == 0


def test_quadratic_bilevel_problem_at_random_points():
    rng = np.random.default_rng(0)
    a, q, b, s = (rng.normal(size=shape) for shape in [(5, 5), (5, 5), (5, 3), (3, 5)])
    a, q = a @ a.T + np.eye(5), q @ q.T
    c, e, r = (rng.normal(size=size) for size in [5, 5, 3])
    inner_loss = lambda x, y, batch: 0.5 * y @ a @ y - y @ (b @ x + c)  # noqa: E731
    outer_loss = lambda x, y, batch: 0.5 * y @ q @ y - e @ y + 0.5 * x @ x + r @ x + x @ s @ y  # noqa: E731
    solve_a = lambda rhs: np.linalg.solve(a, rhs)  # noqa: E731
    # F is quadratic: its gradient is G x + h (closed form of the inner solution inserted into f).
    big_g = np.eye(3) + s @ solve_a(b) + solve_a(b).T @ (q @ solve_a(b) + s.T)
    h = r + s @ solve_a(c) + solve_a(b).T @ (q @ solve_a(c) - e)
    solver = bx.inner.implicit(
        inner_loss,
        ihvp=bx.ihvp.cg(tol=1e-14),
        solve=lambda x, y0, batch: jnp.linalg.solve(a, b @ x + c),
        warm_start=False,
    )
    hypergrad = bx.hypergradient(outer_loss, solver)
    estimate = jax.jit(hypergrad.estimate)
    for x in [rng.normal(size=3), -np.linalg.solve(big_g, h)]:
        grad, _, _ = estimate(None, hypergrad.init(x, np.zeros(5)), x, NO_DATA)
        np.testing.assert_allclose(grad, big_g @ x + h, atol=1e-10)


def test_ridge_hyperparameter():
    rng = np.random.default_rng(1)
    train, valid = ((rng.normal(size=(20, 4)), rng.normal(size=20)) for _ in range(2))
    inner_loss = lambda x, y, batch: 0.5 * jnp.sum((batch[0] @ y - batch[1]) ** 2) + 0.5 * jnp.exp(x) * y @ y  # noqa: E731
    outer_loss = lambda x, y, batch: 0.5 * jnp.mean((batch[0] @ y - batch[1]) ** 2)  # noqa: E731
    x, lam = jnp.array(0.3), np.exp(0.3)
    gram = train[0].T @ train[0] + lam * np.eye(4)
    y = np.linalg.solve(gram, train[0].T @ train[1])
    residual = valid[0].T @ (valid[0] @ y - valid[1]) / 20
    expected = -lam * residual @ np.linalg.solve(gram, y)
    for ihvp in [bx.ihvp.exact(), bx.ihvp.cg(tol=1e-14), bx.ihvp.neumann(terms=2000, step_size=0.02)]:
        solver = bx.inner.implicit(inner_loss, ihvp=ihvp)  # steps=0: y comes from outside
        np.testing.assert_allclose(gradient(outer_loss, solver, x, y, bx.Batch(valid, train)), expected, rtol=1e-10)


def test_weighted_ridge_and_proximal_worked_examples():
    a, t = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])
    weighted = lambda x, y, batch: jnp.mean(x * (a * y - t) ** 2) / 2 + 0.25 * y**2  # noqa: E731
    solver = bx.inner.implicit(weighted, ihvp=bx.ihvp.exact())
    grad = gradient(lambda x, y, batch: y**2 / 2, solver, jnp.array([1.0, 0.5]), jnp.array(0.5))
    np.testing.assert_allclose(grad, [1 / 16, 0], atol=1e-15)
    proximal = lambda x, y, batch: jnp.mean((a * y - t) ** 2) / 2 + 0.25 * (y - x) ** 2  # noqa: E731
    solver = bx.inner.implicit(proximal, ihvp=bx.ihvp.exact())
    grad = gradient(lambda x, y, batch: (y - 1) ** 2 / 2, solver, jnp.array(0.0), jnp.array(0.5))
    np.testing.assert_allclose(grad, -1 / 12, rtol=1e-14)


def softmax_problem():
    rng = np.random.default_rng(2)
    images, labels = jnp.asarray(rng.normal(size=(30, 5))), jnp.asarray(rng.integers(0, 3, size=30))
    train, valid = (images[:20], labels[:20]), (images[20:], labels[20:])

    def cross_entropies(y, batch):
        return optax.softmax_cross_entropy_with_integer_labels(batch[0] @ y["w"] + y["b"][None, :], batch[1])

    def inner_loss(x, y, batch):
        l2 = 0.05 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))
        return jnp.mean(jax.nn.sigmoid(x) * cross_entropies(y, batch)) + l2

    def outer_loss(x, y, batch):
        return jnp.mean(cross_entropies(y, batch))

    return outer_loss, inner_loss, bx.Batch(outer=valid, inner=train)


def test_softmax_regression_against_the_exact_inverse_and_central_differences():
    outer_loss, inner_loss, batch = softmax_problem()
    x, y0 = jnp.asarray(np.random.default_rng(3).normal(size=20)), {"w": jnp.zeros((5, 3)), "b": jnp.zeros(3)}

    def newton(x, y0, data):
        exact = bx.ihvp.exact()

        def step(y, _):
            apply, _ = exact.prepare(None, (), inner_loss, (x, y, data))
            return optax.tree.sub(y, apply(jax.grad(inner_loss, 1)(x, y, data))[0]), None

        return jax.lax.scan(step, y0, length=8)[0]

    differences = central_differences(lambda x: outer_loss(x, newton(x, y0, batch.inner), batch.outer), x)
    make = lambda ihvp: bx.inner.implicit(inner_loss, ihvp=ihvp, solve=newton)  # noqa: E731
    exact = gradient(outer_loss, make(bx.ihvp.exact()), x, y0, batch)
    np.testing.assert_allclose(exact, differences, atol=1e-9)
    cg = gradient(outer_loss, make(bx.ihvp.cg(maxiter=60, tol=1e-14)), x, y0, batch)
    np.testing.assert_allclose(cg, exact, atol=1e-10)
    reverse = bx.inner.reverse(inner_loss, optax.sgd(1.0, momentum=0.8), steps=400)
    np.testing.assert_allclose(gradient(outer_loss, reverse, x, y0, batch), exact, atol=1e-10)


@pytest.mark.parametrize("tail_steps", [0, 1, 5, 20])
def test_unroll_with_an_exact_tail_is_the_exact_hypergradient_of_a_quadratic(tail_steps):
    rng = np.random.default_rng(4)
    root = rng.normal(size=(6, 6))
    h, b = root @ root.T + 0.1 * np.eye(6), rng.normal(size=(6, 3))
    eta = 0.5 / np.linalg.eigvalsh(h)[-1]
    inner_loss = lambda x, y, batch: 0.5 * y @ h @ y - y @ (b @ x)  # noqa: E731
    outer_loss = lambda x, y, batch: jnp.sum(jnp.sin(y))  # noqa: E731
    x, y = jnp.array([1.0, -1.0, 2.0]), jnp.zeros(6)

    def tailed(ihvp):
        return bx.inner.chain(
            bx.inner.implicit(inner_loss, optax.sgd(eta), 7, ihvp=ihvp),
            bx.inner.reverse(inner_loss, optax.sgd(eta), tail_steps),
        )

    hypergrad = bx.hypergradient(outer_loss, tailed(bx.ihvp.exact()))
    grad, state, _ = jax.jit(hypergrad.estimate)(None, hypergrad.init(x, y), x, NO_DATA)
    exact = b.T @ np.linalg.solve(h, np.cos(state.y))
    np.testing.assert_allclose(grad, exact, atol=1e-12)
    # With an inexact tail the error is that of the tail, carried through the unrolled steps.
    scale = eta
    approximate = gradient(outer_loss, tailed(bx.ihvp.identity(scale)), x, y)
    carried = np.linalg.matrix_power(np.eye(6) - eta * h, tail_steps) @ np.cos(state.y)
    error = b.T @ (scale * carried - np.linalg.solve(h, carried))
    np.testing.assert_allclose(approximate - exact, error, atol=1e-12)


def test_y_and_v_stay_warm_and_lead_to_the_exact_hypergradient():
    outer_loss, inner_loss, batch = softmax_problem()
    x, y = jnp.zeros(20), {"w": jnp.zeros((5, 3)), "b": jnp.zeros(3)}
    hypergrad = bx.hypergradient(
        outer_loss,
        bx.inner.implicit(inner_loss, optax.sgd(0.5, momentum=0.5), 20, ihvp=bx.ihvp.cg(maxiter=2, tol=1e-12)),
    )

    def step(state, _):
        grad, state, info = hypergrad.estimate(None, state, x, batch)
        return state, (grad, info.inner.gradient_norm)

    _, (grads, norms) = jax.jit(lambda state: jax.lax.scan(step, state, length=100))(hypergrad.init(x, y))
    solver = bx.inner.implicit(inner_loss, optax.sgd(0.5, momentum=0.5), 2000, ihvp=bx.ihvp.exact())
    exact = gradient(outer_loss, solver, x, y, batch)
    assert norms[-1] < 1e-10
    np.testing.assert_allclose(grads[-1], exact, atol=1e-8)
    assert np.linalg.norm(np.asarray(grads)[0] - exact) > 1e-4


class TestDifferentiable:
    """The same solver as one pure function."""

    inner = staticmethod(lambda x, y, batch: jnp.sum(batch * jnp.cosh(y - jnp.sin(x))) + 0.5 * jnp.sum(y**2))
    outer = staticmethod(lambda x, y, batch: jnp.sum(y**3) + x @ x)
    x, y = jnp.array([0.3, 1.2]), jnp.array([0.1, -0.4])
    batch = jnp.array([1.0, 2.0])

    @pytest.mark.parametrize(
        "make",
        [
            lambda loss: bx.inner.implicit(loss, optax.sgd(0.2), 10, ihvp=bx.ihvp.exact()),
            lambda loss: bx.inner.implicit(loss, optax.adam(0.2), 10, ihvp=bx.ihvp.cg(maxiter=3)),
            lambda loss: bx.inner.reverse(loss, optax.adam(0.2), 5),
            lambda loss: bx.inner.reverse(loss, optax.sgd(0.2), 5, initial=lambda x: x),
            lambda loss: bx.inner.reverse(loss, lambda x: optax.sgd(x[0], momentum=0.5), 5),
            lambda loss: bx.inner.reverse(loss, lambda x: optax.inject_hyperparams(optax.sgd)(x[0]), 5),
            lambda loss: bx.inner.chain(
                bx.inner.no_gradient(loss, optax.adam(0.2), 5), bx.inner.reverse(loss, optax.adam(0.2), 2)
            ),
        ],
        ids=["exact", "cg", "reverse", "initial", "learned", "learned_in_state", "truncated"],
    )
    def test_is_the_backward_of_the_hypergradient(self, make):
        solver = make(self.inner)
        solve = bx.differentiable(solver)
        value, grad = jax.jit(jax.value_and_grad(lambda x: self.outer(x, solve(x, self.y, self.batch), None)))(self.x)
        hypergrad = bx.hypergradient(self.outer, solver)
        expected, _, info = jax.jit(hypergrad.estimate)(
            None, hypergrad.init(self.x, self.y), self.x, bx.Batch(None, self.batch)
        )
        np.testing.assert_allclose(grad, expected, rtol=1e-13)
        np.testing.assert_allclose(value, info.outer_loss, rtol=1e-14)

    def unrolled(self, x, y):
        for _ in range(4):
            y = y - 0.2 * jax.grad(self.inner, 1)(x, y, self.batch)
        return y

    def test_derivatives_in_x_and_in_y0(self):
        solve = bx.differentiable(bx.inner.reverse(self.inner, optax.sgd(0.2), 4))
        got = jax.jit(jax.jacobian(lambda x, y: solve(x, y, self.batch), (0, 1)))(self.x, self.y)
        expected = jax.jit(jax.jacobian(self.unrolled, (0, 1)))(self.x, self.y)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)
        implicit = bx.differentiable(bx.inner.implicit(self.inner, optax.sgd(0.2), 4))
        np.testing.assert_array_equal(jax.jit(jax.jacobian(lambda y: implicit(self.x, y, self.batch)))(self.y), 0)

    def test_only_a_part_of_the_solution_is_used(self):
        loss = lambda x, y, batch: jnp.sum((y["a"] - x) ** 2) + jnp.sum((y["b"] - 2 * x) ** 2)  # noqa: E731
        solve = bx.differentiable(bx.inner.implicit(loss, ihvp=bx.ihvp.exact()))
        y = {"a": jnp.array(1.0), "b": jnp.array(2.0)}
        assert jax.jit(jax.grad(lambda x: solve(x, y, None)["b"]))(1.0) == pytest.approx(2.0, rel=1e-14)

    def test_second_derivatives(self):
        solve = bx.differentiable(bx.inner.reverse(self.inner, optax.sgd(0.2), 4))
        scalar = lambda unroll: lambda x: jnp.sum(unroll(x) ** 2)  # noqa: E731
        got = jax.jit(jax.jacobian(jax.grad(scalar(lambda x: solve(x, self.y, self.batch)))))(self.x)
        expected = jax.jit(jax.hessian(scalar(lambda x: self.unrolled(x, self.y))))(self.x)
        np.testing.assert_allclose(got, expected, rtol=1e-11)

    def test_vmap_over_tasks_is_a_loop(self):
        support, query = jnp.array([[1.0, 2.0], [0.5, 0.1], [2.0, 2.0]]), jnp.array([1.0, -1.0, 0.5])
        for solver in [
            bx.inner.reverse(self.inner, optax.sgd(0.2), 3),
            bx.inner.implicit(self.inner, optax.sgd(0.2), 3, ihvp=bx.ihvp.cg(maxiter=2)),
        ]:
            solve = bx.differentiable(solver)

            def meta_loss(x, support, query, solve=solve):
                return query * jnp.sum(solve(x, x, support) ** 2)

            mean_loss = lambda x, loss=meta_loss: jax.vmap(loss, (None, 0, 0))(x, support, query).mean()  # noqa: E731
            vectorized = jax.jit(jax.grad(mean_loss))(self.x)
            grad = jax.jit(jax.grad(meta_loss))
            looped = sum(grad(self.x, s, q) for s, q in zip(support, query, strict=True)) / 3
            np.testing.assert_allclose(vectorized, looped, rtol=1e-13)

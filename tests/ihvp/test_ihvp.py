"""Inverse-Hessian-vector products against dense solves, and CG where well-known ones fail."""

import functools

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

import bilevax as bx


def quadratic(h):
    """An inner loss with Hessian h, over an inner variable split into a dict."""

    def loss(x, y, batch):
        flat = jnp.concatenate([y["a"].ravel(), y["b"]])
        return 0.5 * flat @ h @ flat - x * jnp.sum(flat)

    return loss


def split_like_y(flat):
    return {"a": flat[:4].reshape(2, 2), "b": flat[4:]}


def joined(tree):
    return jnp.concatenate([tree["a"].ravel(), tree["b"]])


def spd(n, condition, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return q @ np.diag(np.geomspace(1.0, condition, n)) @ q.T


H = spd(9, 50.0)
B = np.random.default_rng(1).normal(size=9)
POINT = (1.0, split_like_y(np.ones(9)), None)


def solve(ihvp, b=B, h=H, v0=None):
    """As NumPy arrays, of which no operation compiles a program of its own."""
    return jax.device_get(compiled_solve(ihvp, b, h, v0))


@functools.partial(jax.jit, static_argnums=0)
def compiled_solve(ihvp, b, h, v0):
    return traced_solve(ihvp, b, h, v0)


def traced_solve(ihvp, b, h, v0):
    apply, _ = ihvp.prepare(jax.random.key(0), ihvp.init(*POINT), quadratic(h), POINT)
    v, info = apply(split_like_y(b), None if v0 is None else split_like_y(v0))
    return joined(v), info


@pytest.mark.parametrize(
    "make",
    [
        bx.ihvp.exact,
        lambda damping: bx.ihvp.cg(maxiter=30, tol=1e-14, damping=damping),
        lambda damping: bx.ihvp.cg(maxiter=30, tol=1e-14, damping=damping, preconditioner=bx.ihvp.exact(damping=0.1)),
        lambda damping: bx.ihvp.cg(
            maxiter=30, tol=1e-14, damping=damping, preconditioner=bx.ihvp.neumann(terms=2, step_size=0.02)
        ),
        lambda damping: bx.ihvp.cg(
            maxiter=30, tol=1e-14, damping=damping, preconditioner=bx.ihvp.nystrom(rank=4, damping=0.1)
        ),
        lambda damping: bx.ihvp.neumann(terms=3000, step_size=0.03, damping=damping),
        lambda damping: bx.ihvp.sgd(steps=3000, step_size=0.03, sample=bx.sampling.full, damping=damping),
        lambda damping: bx.ihvp.lineax(lineax.GMRES(1e-13, 1e-13), damping=damping),
        lambda damping: bx.ihvp.lineax(lineax.BiCGStab(1e-13, 1e-13), damping=damping),
        lambda damping: bx.ihvp.lineax(lineax.Cholesky(), damping=damping),
    ],
    ids=["exact", "cg", "cg+exact", "cg+neumann", "cg+nystrom", "neumann", "sgd", "gmres", "bicgstab", "cholesky"],
)
def test_equals_the_dense_solve(make):
    """From a cold, a warm and a stale start, plain and damped."""
    run = jax.jit(lambda damping, v0: traced_solve(make(damping=damping), B, H, v0))
    for damping in (0.0, 0.3):
        for v0 in (None, 0.9 * np.linalg.solve(H, B), np.arange(9.0)):
            v, info = run(damping, v0)
            np.testing.assert_allclose(v, np.linalg.solve(H + damping * np.eye(9), B), rtol=0, atol=1e-10)
            assert not info.breakdown
            assert info.residual < 1e-10


def test_identity_scales():
    v, info = solve(bx.ihvp.identity(0.25))
    np.testing.assert_array_equal(v, 0.25 * B)
    assert info.residual is None
    assert info.products == 0


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_neumann_is_its_truncated_series(steps):
    eta, damping = 0.03, 0.1
    contraction = np.eye(9) - eta * (H + damping * np.eye(9))
    series = eta * sum(np.linalg.matrix_power(contraction, k) for k in range(steps + 1))
    v, info = solve(bx.ihvp.neumann(terms=steps, step_size=eta, damping=damping))
    np.testing.assert_allclose(v, series @ B, rtol=1e-12)
    assert info.products == steps
    assert not info.breakdown
    before_last_term = v - eta * np.linalg.matrix_power(contraction, steps) @ B
    residual = np.linalg.norm(B - (H + damping * np.eye(9)) @ before_last_term) / np.linalg.norm(B)
    np.testing.assert_allclose(info.residual, residual, rtol=1e-12)
    v0 = 0.9 * np.linalg.solve(H, B) + 0.01
    warm, info = solve(bx.ihvp.neumann(terms=steps, step_size=eta, damping=damping), v0=v0)
    np.testing.assert_allclose(warm, v0 + series @ (B - (H + damping * np.eye(9)) @ v0), rtol=1e-11)
    assert info.products == steps + 1


def test_a_random_term_of_the_series_is_right_in_the_mean_and_over_batches():
    """E over p and over the matrices of the factors, which are H ± D with the mean H."""
    terms, eta, damping = 4, 0.03, 5.0
    spread = 0.3 * np.diag(np.arange(1.0, 10.0))
    rows = jnp.asarray(np.stack([H - spread, H + spread]))

    def loss(x, y, batch):
        return 0.5 * joined(y) @ batch @ joined(y)

    def draw(key):
        sample = lambda key, t, data: data[jax.random.randint(key, (), 0, 2)]  # noqa: E731
        ihvp = bx.ihvp.random_neumann(terms=terms, step_size=eta, sample=sample, damping=damping)
        apply, _ = ihvp.prepare(key, (), loss, (*POINT[:2], rows))
        v, info = apply(split_like_y(B))
        return joined(v), info.products, info.breakdown

    v, products, breakdown = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 4_000))
    contraction = np.eye(9) - eta * (H + damping * np.eye(9))
    series = eta * sum(np.linalg.matrix_power(contraction, k) for k in range(terms))
    np.testing.assert_allclose(v.mean(0), series @ B, atol=5 * float(v.std(0).max()) / 4_000**0.5)
    assert set(products.tolist()) == {0, 1, 2, 3}
    assert not breakdown.any()
    _, info = solve(bx.ihvp.random_neumann(terms=40, step_size=0.1))  # 0.1 > 2 / 50
    assert info.breakdown == (info.products > 0)
    with pytest.raises(ValueError, match="key must be"):
        bx.ihvp.random_neumann(terms=2, step_size=eta).prepare(None, (), loss, POINT)
    with pytest.raises(ValueError, match="terms must be"):
        bx.ihvp.random_neumann(terms=0, step_size=eta)


def test_neumann_reports_divergence_even_in_one_direction():
    h = np.diag(np.array([1.0] * 8 + [25.0]))
    _, info = solve(bx.ihvp.neumann(terms=10, step_size=0.1), b=np.ones(9), h=h)  # 0.1 > 2 / 25
    assert info.breakdown


def test_cg_stops_where_its_preconditioner_breaks_down():
    h = np.diag(np.array([-1.0, *range(1, 9)]))
    _, info = solve(bx.ihvp.cg(preconditioner=bx.ihvp.exact()), h=h)
    assert info.breakdown


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("preconditioner", [bx.ihvp.identity(1e-15), bx.ihvp.identity(1e15)], ids=["tiny", "huge"])
def test_cg_does_not_depend_on_the_scale_of_its_preconditioner(preconditioner, scale):
    with jax.enable_x64(False):
        eigenvalues = np.linspace(1.0, 4.0, 10, dtype=np.float32)
        b = np.full(10, scale, np.float32)
        v, info = diagonal_solve(bx.ihvp.cg(maxiter=20, preconditioner=preconditioner), eigenvalues, b)
        assert not info.breakdown
        np.testing.assert_allclose(v / scale, 1 / eigenvalues, rtol=1e-5)


@pytest.mark.parametrize(
    "ihvp",
    [
        bx.ihvp.exact(),
        bx.ihvp.neumann(terms=40, step_size=0.3),
        bx.ihvp.identity(2.0),
        bx.ihvp.sgd(steps=40, step_size=0.3, sample=bx.sampling.full),
        bx.ihvp.nystrom(rank=4),
        bx.ihvp.lineax(lineax.GMRES(1e-5, 1e-5)),
    ],
    ids=["exact", "neumann", "identity", "sgd", "nystrom", "linear"],
)
def test_reports_do_not_depend_on_the_size_of_b_in_float32(ihvp):
    with jax.enable_x64(False):
        eigenvalues, sizes = np.linspace(1.0, 4.0, 10, dtype=np.float32), np.array([1, 1e-30, 1e20, 1e30], np.float32)
        b = jnp.asarray(np.repeat(sizes[:, None], 10, axis=1))
        info = jax.jit(jax.vmap(lambda b: diagonal_solve(ihvp, eigenvalues, b)[1]))(b)
        assert not info.breakdown.any()
        for number, tolerance in ((info.residual, {"atol": 1e-6}), (info.curvature, {"rtol": 1e-5})):
            if number is not None:
                np.testing.assert_allclose(number, np.full(4, number[0]), **tolerance)


def test_neumann_reports_divergence():
    _, info = solve(bx.ihvp.neumann(terms=20, step_size=0.1))  # 0.1 > 2 / 50
    assert info.breakdown
    assert info.residual > 1


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_cg_iterates_minimize_over_the_krylov_space(iterations):
    v, info = solve(bx.ihvp.cg(maxiter=iterations, tol=0.0))
    basis = np.linalg.qr(np.stack([np.linalg.matrix_power(H, k) @ B for k in range(iterations)], 1))[0]
    np.testing.assert_allclose(v, basis @ np.linalg.solve(basis.T @ H @ basis, basis.T @ B), rtol=1e-8)
    assert info.iterations == iterations
    np.testing.assert_allclose(info.residual, np.linalg.norm(B - H @ v) / np.linalg.norm(B), rtol=1e-8)


def test_cg_preconditioned_by_the_exact_inverse_needs_one_iteration():
    v, info = solve(bx.ihvp.cg(maxiter=10, tol=1e-10, preconditioner=bx.ihvp.exact()))
    assert info.iterations == 1
    np.testing.assert_allclose(v, np.linalg.solve(H, B), rtol=1e-12)


def test_cg_stops_at_its_tolerance_and_a_solved_warm_start_costs_one_product():
    v, info = solve(bx.ihvp.cg(maxiter=50, tol=0.3))
    assert 1 <= info.iterations < 9
    assert info.residual <= 0.3
    v, info = solve(bx.ihvp.cg(), v0=np.linalg.solve(H, B))
    assert info.iterations == 0
    assert info.products == 1
    np.testing.assert_allclose(v, np.linalg.solve(H, B), rtol=1e-12)


def test_cg_stops_at_negative_curvature_with_the_best_v_and_says_so():
    h = np.diag(np.array([-1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]))
    v, info = solve(bx.ihvp.cg(maxiter=20, tol=0.0), b=np.ones(9), h=h)
    assert info.breakdown
    assert info.curvature < 0
    steps = [solve(bx.ihvp.cg(maxiter=number, tol=0.0), b=np.ones(9), h=h) for number in range(1, int(info.iterations))]
    assert not any(before.breakdown for _, before in steps)
    residuals = [1.0] + [np.linalg.norm(1 - h @ earlier) / 3 for earlier, _ in steps]
    np.testing.assert_allclose(np.linalg.norm(1 - h @ v) / 3, min(residuals), rtol=1e-10)
    np.testing.assert_allclose(info.residual, min(residuals), rtol=1e-10)


def test_where_b_itself_has_negative_curvature_v_is_a_scaled_b():
    ihvp = bx.ihvp.cg()
    h, b = np.diag([-1.0, 2.0, *np.ones(7)]), 3 * np.eye(9)[0] + np.eye(9)[1]
    v, info = solve(ihvp, b=b, h=h)
    assert info.breakdown
    assert info.curvature < 0
    np.testing.assert_allclose(v / np.linalg.norm(v), b / np.linalg.norm(b), atol=1e-15)
    assert np.linalg.norm(v) <= np.linalg.norm(b)  # no eigenvalue is smaller than 1
    warm, info = solve(ihvp, b=b, h=h, v0=np.eye(9)[1] / 2)  # which solves one of the two equations: it is kept
    assert info.breakdown
    np.testing.assert_array_equal(warm, np.eye(9)[1] / 2)


FEWER = np.random.default_rng(3).normal(size=(5, 9))  # equations than unknowns
BROKEN = {
    "cg": bx.ihvp.cg(maxiter=50, tol=0.0),
    "preconditioned": bx.ihvp.cg(maxiter=50, tol=0.0, preconditioner=bx.ihvp.identity(0.5)),
    "lineax": bx.ihvp.lineax(lineax.CG(1e-12, 1e-12, max_steps=50)),
}


@pytest.mark.parametrize("ihvp", BROKEN.values(), ids=BROKEN)
def test_after_a_breakdown_v_is_no_worse_than_zero(ihvp):
    h = FEWER.T @ FEWER
    for v0 in (None, 0.3 * B):
        v, info = solve(ihvp, h=h, v0=v0)
        assert info.breakdown
        assert info.residual >= 0
        assert np.linalg.norm(B - h @ v) <= (1 + 1e-10) * np.linalg.norm(B)


@pytest.mark.parametrize(
    "ihvp",
    [bx.ihvp.neumann(terms=40, step_size=0.9), bx.ihvp.sgd(steps=40, step_size=0.9, sample=bx.sampling.full)],
    ids=["neumann", "sgd"],
)
def test_a_series_that_diverges_leaves_no_hypergradient(ihvp):
    h = FEWER.T @ FEWER
    loss = lambda x, y, batch: 0.5 * y @ h @ y - y @ x  # noqa: E731
    hypergrad = bx.hypergradient(lambda x, y, batch: B @ y, bx.inner.implicit(loss, ihvp=ihvp))
    grad, state, info = jax.jit(hypergrad.estimate)(None, hypergrad.init(B, B), B, bx.Batch(None, None))
    assert info.inner.breakdown
    assert info.inner.detail.residual > 1e6
    np.testing.assert_array_equal((grad, state.solver.v), 0)


UNREAD = {
    "cg": bx.ihvp.cg(tol=1e-12),
    "exact": bx.ihvp.exact(),
    "lineax": bx.ihvp.lineax(lineax.GMRES(1e-12, 1e-12)),
    "neumann": bx.ihvp.neumann(terms=200, step_size=0.3),
    "nystrom": bx.ihvp.cg(tol=1e-12, preconditioner=bx.ihvp.nystrom(rank=2, damping=1.0)),
}


@pytest.mark.parametrize("ihvp", UNREAD.values(), ids=UNREAD)
def test_a_leaf_that_the_inner_loss_does_not_read_has_no_part_in_the_hypergradient(ihvp):
    weights = jnp.array([1.0, 2.0])

    @jax.jit
    def residuals(known, other):  # the leaf goes in, and is not read
        return known

    def inner_loss(x, y, batch):
        return 0.5 * jnp.sum(weights * (residuals(y["known"], y["other"]) - x) ** 2)

    def outer_loss(x, y, batch):
        return jnp.sum(y["known"] ** 2) + jnp.sum(y["other"])

    x, y = jnp.array([1.0, 2.0]), {"known": jnp.array([1.0, 2.0]), "other": jnp.ones(1)}
    solver = bx.inner.implicit(inner_loss, ihvp=ihvp)
    hypergrad = bx.hypergradient(outer_loss, solver)
    state, batch = hypergrad.init(x, y), bx.Batch(None, None)
    grad, state, _ = jax.jit(hypergrad.estimate)(jax.random.key(0), state, x, batch)
    np.testing.assert_allclose(grad, 2 * x, rtol=1e-9)
    np.testing.assert_array_equal(state.solver.v["other"], 0)
    solve = bx.differentiable(solver)
    pulled = jax.jit(jax.grad(lambda x: outer_loss(x, solve(x, y, None, jax.random.key(0)), None)))(x)
    np.testing.assert_allclose(pulled, 2 * x, rtol=1e-9)


def test_cg_reports_a_singular_direction_instead_of_dividing_by_it():
    v, info = solve(bx.ihvp.cg(maxiter=20, tol=0.0), b=np.eye(9)[0], h=np.diag(np.arange(9.0)))
    assert info.breakdown
    np.testing.assert_array_equal(v, 0)


def test_cg_reports_a_preconditioner_that_is_not_positive_definite():
    identity = bx.ihvp.identity()

    def prepare(*arguments):
        apply, state = identity.prepare(*arguments)
        return lambda b: (jax.tree.map(jnp.negative, b), apply(b)[1]), state

    negative = identity._replace(prepare=prepare)
    v, info = solve(bx.ihvp.cg(preconditioner=negative))
    assert info.breakdown
    np.testing.assert_array_equal(v, 0)


def test_exact_inverts_an_indefinite_hessian_and_says_so():
    h = H - 10 * np.eye(9)
    v, info = solve(bx.ihvp.exact(), h=h)
    np.testing.assert_allclose(v, np.linalg.solve(h, B), rtol=1e-10)
    assert info.breakdown
    np.testing.assert_allclose(info.curvature, 1.0 - 10.0, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_cg_does_not_depend_on_the_size_of_b(scale):
    for preconditioner in [None, bx.ihvp.exact(damping=0.1)]:
        v, info = solve(bx.ihvp.cg(maxiter=30, tol=1e-12, preconditioner=preconditioner), b=scale * B)
        np.testing.assert_allclose(v / scale, np.linalg.solve(H, B), rtol=1e-9)
        assert not info.breakdown


def with_nan(array, index):
    array = array.copy()
    array[index] = np.nan
    return array


def test_cg_of_zero_is_zero_and_of_nan_is_nan():
    for v0 in [None, np.ones(9)]:
        v, info = solve(bx.ihvp.cg(), b=np.zeros(9), v0=v0)
        np.testing.assert_array_equal(v, 0)
        assert not info.breakdown
        v, info = solve(bx.ihvp.cg(), b=with_nan(B, 3), v0=v0)
        assert np.isnan(v).all()
        assert info.breakdown
    v, info = solve(bx.ihvp.cg(), h=with_nan(H, (0, 0)))
    assert np.isnan(v).all()
    assert info.breakdown


@pytest.mark.parametrize("v0", [np.full(9, np.nan), np.full(9, 1e200)], ids=["nan", "huge"])
@pytest.mark.parametrize(
    "ihvp", [bx.ihvp.cg(maxiter=3), bx.ihvp.neumann(terms=3, step_size=0.03)], ids=["cg", "neumann"]
)
def test_a_useless_warm_start_is_replaced_by_a_cold_one(ihvp, v0):
    v, info = solve(ihvp, v0=v0)
    cold, cold_info = solve(ihvp)
    np.testing.assert_allclose(v, cold, rtol=1e-14)
    assert info.products == cold_info.products + 1


def test_warm_starts_do_not_amplify_an_indefinite_hessian_from_step_to_step():
    h, shifts = H - 3 * jnp.eye(9), jnp.asarray(np.random.default_rng(5).normal(size=(30, 9)))
    loss = lambda x, y, batch: 0.5 * y @ h @ y - x * jnp.sum(y)  # noqa: E731
    solver = bx.inner.implicit(loss, ihvp=bx.ihvp.cg(maxiter=6))

    def step(state, shift):
        _, residual, state = solver.forward(None, state, 1.0, solver.start(1.0, jnp.zeros(9)), None)
        _, state, info = solver.backward(residual, state, bx.problem.Iterate(B + 0.1 * shift))
        return state, (info.breakdown, jnp.linalg.norm(state.v))

    _, (breakdowns, sizes) = jax.lax.scan(step, solver.init(1.0, np.zeros(9)), shifts)
    assert breakdowns.any()
    assert sizes.max() < 100 * np.linalg.norm(np.linalg.solve(h, B))


def test_warm_starts_add_up_on_an_ill_conditioned_hessian():
    eigenvalues = np.geomspace(1.0, 1e5, 50)
    loss = lambda x, y, batch: 0.5 * jnp.sum(eigenvalues * y**2)  # noqa: E731

    @jax.jit
    def apply(v0):
        return bx.ihvp.cg(maxiter=20).prepare(None, (), loss, (0.0, np.zeros(50), None))[0](np.ones(50), v0)

    def error(v):
        return np.linalg.norm(v - 1 / eigenvalues) / np.linalg.norm(1 / eigenvalues)

    v, info = apply(None)
    assert info.residual > 1  # CG decreases the energy, not the residual
    assert error(v) > 0.5
    for _ in range(40):
        v, _ = apply(v)
    assert error(v) < 0.2


def diagonal_solve(ihvp, eigenvalues, b):
    loss = lambda x, y, batch: 0.5 * jnp.sum(batch * y**2)  # noqa: E731
    point = lambda h, b: (0.0, jnp.zeros_like(b), h)  # noqa: E731
    run = jax.jit(lambda h, b: ihvp.prepare(jax.random.key(0), ihvp.init(0.0, b), loss, point(h, b))[0](b))
    return run(eigenvalues, b)


def test_cg_in_float32_at_a_million_unknowns():
    with jax.enable_x64(False):
        b = jax.random.normal(jax.random.key(0), (1_000_000,), jnp.float32)
        for eigenvalues in [jnp.ones_like(b), jnp.linspace(1.0, 100.0, b.size, dtype=jnp.float32)]:
            v, info = diagonal_solve(bx.ihvp.cg(maxiter=100, tol=1e-6), eigenvalues, b)
            assert v.dtype == jnp.float32
            assert not info.breakdown
            assert jnp.linalg.norm(v - b / eigenvalues) < 1e-5 * jnp.linalg.norm(b / eigenvalues)


def test_cg_in_float32_at_condition_1e5_solves_the_symmetric_system():
    with jax.enable_x64(False):
        eigenvalues = np.geomspace(1.0, 1e5, 50, dtype=np.float32)
        v, info = diagonal_solve(bx.ihvp.cg(maxiter=400, tol=1e-6), eigenvalues, np.ones(50, np.float32))
        assert not info.breakdown
        assert np.linalg.norm(v - 1 / eigenvalues) < 1e-3 * np.linalg.norm(1 / eigenvalues)


@pytest.mark.parametrize("preconditioner", [None, bx.ihvp.identity(0.5)])
def test_cg_in_float32_with_a_tiny_b(preconditioner):
    with jax.enable_x64(False):
        eigenvalues = np.linspace(1.0, 4.0, 10, dtype=np.float32)
        b = np.full(10, 1e-30, np.float32)
        v, info = diagonal_solve(bx.ihvp.cg(maxiter=20, preconditioner=preconditioner), eigenvalues, b)
        assert not info.breakdown
        np.testing.assert_allclose(v * 1e30, 1 / eigenvalues, rtol=1e-5)


# Stochastic gradient descent.


def rows_loss(x, y, rows):
    """Hessian mean of rᵀr over the rows."""
    return 0.5 * jnp.mean((rows @ joined(y)) ** 2)


ROWS = np.asarray(np.random.default_rng(3).normal(size=(40, 9)))


def test_sgd_takes_one_batch_for_each_step():
    steps, eta, damping = 6, 0.05, 0.2
    batches = ROWS[:36].reshape(steps, 6, 9)
    expected = np.zeros(9)
    for rows in batches:
        expected = expected - eta * (rows.T @ rows / 6 @ expected + damping * expected - B)
    ihvp = bx.ihvp.sgd(steps=steps, step_size=eta, sample=bx.sampling.per_step, damping=damping)
    v, info = jax.jit(lambda b: ihvp.prepare(None, (), rows_loss, (0.0, POINT[1], batches))[0](b))(split_like_y(B))
    np.testing.assert_allclose(joined(v), expected, rtol=1e-12)
    assert info.products == info.iterations == steps
    assert not info.breakdown


def test_sgd_with_minibatches_is_right_in_the_mean():
    """E v_T is the Neumann series of the mean Hessian."""
    steps, eta, keys = 5, 0.1, 4000

    def solve(key):
        apply, _ = bx.ihvp.sgd(steps=steps, step_size=eta, sample=bx.sampling.minibatch(4)).prepare(
            key, (), rows_loss, (0.0, POINT[1], ROWS)
        )
        return joined(apply(split_like_y(B))[0])

    draws = np.asarray(jax.jit(jax.vmap(solve))(jax.random.split(jax.random.key(0), keys)))
    series, _ = compiled_solve(bx.ihvp.neumann(terms=steps - 1, step_size=eta), B, ROWS.T @ ROWS / len(ROWS), None)
    standard_error = draws.std(axis=0) / keys**0.5
    assert (np.abs(draws.mean(axis=0) - series) < 4.5 * standard_error).all()


@pytest.mark.parametrize("eta", [0.03, 0.05])
def test_sgd_reports_divergence(eta):
    assert bool(solve(bx.ihvp.sgd(steps=20, step_size=eta, sample=bx.sampling.full))[1].breakdown) == (eta > 2 / 50)


def test_sgd_reports_negative_curvature():
    h = H - 5 * np.eye(9)
    assert solve(bx.ihvp.sgd(steps=300, step_size=0.03, sample=bx.sampling.full), h=h)[1].breakdown


# Nyström.


def low_rank(n, rank):
    q, _ = np.linalg.qr(np.random.default_rng(4).normal(size=(n, rank)))
    return np.asarray(q @ np.diag(np.geomspace(1.0, 30.0, rank)) @ q.T)


def test_nystrom_is_exact_where_the_sketch_holds_the_range():
    """Whatever the random directions are: (H + damping I)⁻¹ b for an H of rank 3."""
    h, damping = low_rank(9, 3), 0.1
    expected = np.linalg.solve(h + damping * np.eye(9), B)
    for rank in (3, 5, 9, 20):
        v, info = solve(bx.ihvp.nystrom(rank=rank, damping=damping, tail=lambda eigenvalues: 0.0), h=h)
        np.testing.assert_allclose(v, expected, rtol=1e-8)
        assert not info.breakdown
        assert info.setup_products == min(rank, 9)
        assert info.products == 0


def test_nystrom_assumes_its_smallest_eigenvalue_outside():
    """With one direction ω: U = Hω / |Hω|, Λ = |Hω|² / ωᵀHω."""
    ihvp = bx.ihvp.nystrom(rank=1, damping=0.5)
    matrix = np.stack([solve(ihvp, b)[0] for b in np.eye(9)])
    eigenvalues = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(eigenvalues, eigenvalues[0], rtol=1e-10)
    assert 1.0 < 1 / eigenvalues[0] - 0.5 <= 50.0 * (1 + 1e-10)


def test_nystrom_preconditions_a_decaying_spectrum():
    n = 200
    q, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(n, n)))
    h = np.asarray(q @ np.diag(1e4 * np.exp(-np.arange(n) / 4) + 1e-2) @ q.T)
    b = np.asarray(np.random.default_rng(6).normal(size=n))

    def residual(preconditioner):
        ihvp = bx.ihvp.cg(maxiter=30, tol=1e-14, preconditioner=preconditioner)
        loss = lambda x, y, batch: 0.5 * y @ h @ y  # noqa: E731
        key, point = jax.random.key(0), (0.0, jnp.zeros(n), None)
        v, info = jax.jit(lambda b: ihvp.prepare(key, (), loss, point)[0](b))(b)
        assert not info.breakdown
        return np.linalg.norm(b - h @ v) / np.linalg.norm(b)

    assert residual(bx.ihvp.nystrom(rank=60, damping=1e-2)) < 1e-3 * residual(None)


def test_nystrom_reports_negative_curvature_and_needs_a_key():
    v, info = solve(bx.ihvp.nystrom(rank=9, damping=0.1), h=H - 5 * np.eye(9))
    assert info.breakdown
    assert info.curvature < 0
    assert np.isfinite(v).all()
    with pytest.raises(ValueError, match=r"key must be a jax.random.key for ihvp.nystrom.* got None"):
        bx.ihvp.nystrom(rank=3).prepare(None, (), quadratic(H), POINT)


@pytest.mark.usefixtures("uncached")
def test_nystrom_stores_no_hessian():
    n = 3000

    def run(y, b):
        loss = lambda x, y, batch: jnp.sum(jnp.cosh(y)) + jnp.sum(y) ** 2  # noqa: E731
        apply, _ = bx.ihvp.nystrom(rank=4, damping=0.1).prepare(jax.random.key(0), (), loss, (0.0, y, None))
        return apply(b)

    compiled = jax.jit(run).lower(jnp.ones(n), jnp.ones(n)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * n * 8 / 10


# lineax.


def test_linear_reports_a_solver_that_gives_up():
    _, info = solve(bx.ihvp.lineax(lineax.GMRES(1e-12, 1e-12, max_steps=2, restart=2)))
    assert info.breakdown
    assert info.residual > 1e-3
    assert info.iterations == 2
    assert info.products is None


M = np.array([[2.0, 1.0, 0.0], [0.0, 1.5, 0.7], [-0.5, 0.0, 1.0]])


@pytest.mark.parametrize(
    "solver", [lineax.GMRES(1e-12, 1e-12), lineax.LSMR(1e-12, 1e-12), lineax.LU(), lineax.AutoLinearSolver(None)]
)
def test_linear_takes_a_curvature_that_is_not_symmetric(solver):
    ihvp = bx.ihvp.lineax(solver, curvature=lambda *point: lambda v: M @ v, tags=())
    loss, point, b = lambda x, y, batch: jnp.sum(y), (0.0, np.ones(3), None), np.array([1.0, 2.0, 3.0])
    v, info = jax.jit(lambda b: ihvp.prepare(None, (), loss, point)[0](b))(b)
    np.testing.assert_allclose(v, np.linalg.solve(M, b), rtol=1e-8)
    assert not info.breakdown


@pytest.mark.parametrize("solver", [lineax.GMRES(1e-9, 1e-9), lineax.BiCGStab(1e-9, 1e-9), lineax.CG(1e-9, 1e-9)])
def test_linear_returns_a_warm_start_that_solves_the_system(solver):
    h = np.array([1.0, 0.5, 0.25, 0.125])
    loss, point = lambda x, y, batch: 0.5 * jnp.sum(h * y**2), (0.0, np.ones(4), None)
    run = jax.jit(lambda b, v0: bx.ihvp.lineax(solver).prepare(None, (), loss, point)[0](b, v0))
    for b in (np.zeros(4), np.array([1.0, 2.0, 3.0, 4.0])):
        v, info = run(b, b / h)
        np.testing.assert_allclose(v, b / h, rtol=1e-14)
        assert not info.breakdown


def test_linear_takes_a_warm_start():
    ihvp = bx.ihvp.lineax(lineax.GMRES(1e-8, 1e-8))
    exact = np.linalg.solve(H, B)
    assert solve(ihvp, v0=exact)[1].iterations < solve(ihvp)[1].iterations
    assert not solve(ihvp, b=np.zeros(9))[1].breakdown

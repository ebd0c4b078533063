"""Solutions of y = T(x, y) and r(x, y) = 0, also where y is no stationary point of a loss."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

rng = np.random.default_rng(0)
A, b = rng.normal(size=(15, 6)), rng.normal(size=15)
C, d = rng.normal(size=(10, 6)), rng.normal(size=10)
RATE = 0.9 / np.linalg.norm(A, 2) ** 2
NONE = bx.Batch(None, None)


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def ridge(x, y, batch):
    return 0.5 * jnp.sum((A @ y - b) ** 2) + 0.5 * jnp.exp(x) * jnp.sum(y**2)


def outer(x, y, batch):
    return 0.5 * jnp.sum((C @ y - d) ** 2)


def projected(project):
    return lambda x, y, batch: project(y - 0.5 * RATE * jax.grad(ridge, 1)(x, y, batch))


def ista(x, y, batch):
    z = y - RATE * A.T @ (A @ y - b)
    return jnp.sign(z) * jnp.maximum(jnp.abs(z) - RATE * jnp.exp(x), 0)


STEPS = {  # of T; those of l1 make some entries exactly zero
    "nonnegative": projected(optax.projections.projection_non_negative),
    "box": projected(lambda y: optax.projections.projection_box(y, -0.1, 0.2)),
    "simplex": projected(lambda y: optax.projections.projection_simplex(y, 0.3)),
    "l1_ball": projected(lambda y: optax.projections.projection_l1_ball(y, 0.5)),
    "l1": ista,
}


def estimate(solver, *xs, y=None, f=outer):
    """(grad, state, info) at each x in turn, by one program."""
    hypergrad = bx.hypergradient(f, solver)
    state, run, found = None, jax.jit(hypergrad.estimate), []
    for x in map(jnp.asarray, xs):
        state = hypergrad.init(x, jnp.zeros(6) if y is None else y) if state is None else state
        found.append(run(None, state, x, NONE))
        state = found[-1][1]
    return found


def often(names, daily):
    return [name if name in daily else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", often(STEPS, ("nonnegative", "l1")))
def test_constraints_and_kinks_have_the_derivative_of_the_solution(name):
    solver = bx.inner.fixed_point(STEPS[name], inner_loss=ridge, maxiter=5000, tol=1e-13)
    (grad, state, info), *beside = estimate(solver, -0.5, -0.5 + 1e-4, -0.5 - 1e-4)
    ahead, behind = (info.outer_loss for _, _, info in beside)
    np.testing.assert_allclose(grad, (ahead - behind) / 2e-4, rtol=1e-6)
    assert not info.inner.breakdown
    assert info.inner.detail.residual < 1e-12
    assert info.inner.gradient_norm > 0.1, "no stationary point of g"
    assert 0 < np.sum(np.isin(state.y, [0.0, -0.1, 0.2])) < 6


rng = np.random.default_rng(1)
W = rng.normal(size=(5, 5))
LAYER = {"W": 0.6 * W / np.linalg.norm(W, 2), "U": rng.normal(size=(5, 3))}
TARGET, INPUT = rng.normal(size=5), rng.normal(size=3)


def layer(x, y, batch):
    return {"z": jnp.tanh(x["W"] @ y["z"] + x["U"] @ INPUT)}


def distance(x, y, batch):
    return 0.5 * jnp.sum((y["z"] - TARGET) ** 2)


def anderson(x, y0, batch, memory=4, steps=25):
    """Mixes the last residuals so that their sum is smallest."""

    def step(carry, _):
        ys, fs = carry
        r = fs - ys
        gram = r @ r.T + 1e-14 * jnp.eye(memory)
        weights = jnp.linalg.solve(gram, jnp.ones(memory))
        y = (weights / weights.sum()) @ fs
        f = layer(x, {"z": y}, batch)["z"]
        return (jnp.concatenate([ys[1:], y[None]]), jnp.concatenate([fs[1:], f[None]])), None

    f = lambda y: layer(x, {"z": y}, batch)["z"]  # noqa: E731
    ys = [y0["z"]]
    for _ in range(memory - 1):
        ys.append(f(ys[-1]))
    start = jnp.stack(ys)
    return {"z": jax.lax.scan(step, (start, jax.vmap(f)(start)), length=steps)[0][1][-1]}


def dense(product, b, u0):
    """A linear solver of one's own."""
    flat, unravel = jax.flatten_util.ravel_pytree(b)
    rows = jax.jacobian(lambda u: jax.flatten_util.ravel_pytree(product(unravel(u)))[0])(flat)
    return unravel(jnp.linalg.solve(rows, flat))


def krylov(product, b, u0):
    return jax.scipy.sparse.linalg.bicgstab(product, b, u0, tol=1e-12)[0]


def gmres(product, b, u0):
    import lineax

    operator = lineax.FunctionLinearOperator(product, jax.eval_shape(lambda: b))
    return lineax.linear_solve(operator, b, lineax.GMRES(rtol=1e-12, atol=1e-12)).value


DEQ = {
    "built_in": {},
    "relaxed": {"rate": 0.8},
    "anderson": {"solve": anderson},
    "dense": {"linear_solve": dense},
    "bicgstab": {"linear_solve": krylov, "warm_start": False},
    "lineax": {"linear_solve": gmres},
}


@pytest.mark.parametrize("name", often(DEQ, ("built_in", "relaxed", "anderson", "bicgstab")))
def test_a_layer_in_equilibrium(name):
    """W is not symmetric: gradients of all weights, against the closed form."""
    solver = bx.inner.fixed_point(layer, tol=1e-13, **DEQ[name])
    x, y = jax.tree.map(jnp.asarray, LAYER), {"z": jnp.zeros(5)}
    hypergrad = bx.hypergradient(distance, solver)
    grad, state, info = jax.jit(hypergrad.estimate)(None, hypergrad.init(x, y), x, NONE)
    z = np.asarray(state.y["z"])
    np.testing.assert_allclose(z, np.tanh(LAYER["W"] @ z + LAYER["U"] @ INPUT), atol=1e-12)
    D = np.diag(1 - z**2)
    u = D @ np.linalg.solve((np.eye(5) - D @ LAYER["W"]).T, z - TARGET)
    chex.assert_trees_all_close(grad, {"W": np.outer(u, z), "U": np.outer(u, INPUT)}, rtol=1e-10)
    assert not info.inner.breakdown
    assert info.inner.detail.adjoint_residual < 1e-11


def kkt(x, y, batch):
    """Least squares under a linear constraint: stationarity and feasibility, stacked."""
    primal = A.T @ (A @ y["primal"] - b) + C[:2].T @ y["dual"]
    return {"primal": primal, "dual": C[:2] @ y["primal"] - x}


def solve_kkt(x, y0, batch):
    flat, unravel = jax.flatten_util.ravel_pytree(y0)
    residual = lambda y: jax.flatten_util.ravel_pytree(kkt(x, unravel(y), batch))[0]  # noqa: E731
    return unravel(flat - jnp.linalg.solve(jax.jacobian(residual)(flat), residual(flat)))


def test_conditions_of_a_constrained_optimum_are_a_root():
    x, y = jnp.array([0.3, -1.0]), {"primal": jnp.zeros(6), "dual": jnp.zeros(2)}
    solver = bx.inner.root(kkt, solve_kkt, tol=1e-12)
    ((grad, _, info),) = estimate(solver, x, y=y, f=lambda x, y, batch: outer(x, y["primal"], batch))
    expected = jax.jit(jax.grad(lambda x: outer(x, solve_kkt(x, y, None)["primal"], None)))(x)
    np.testing.assert_allclose(grad, expected, rtol=1e-9)
    assert info.inner.gradient_norm == info.inner.detail.residual < 1e-10
    assert info.inner.detail.products > 1
    assert not info.inner.breakdown


def test_y_and_u_are_warm():
    """The second estimate at one x needs no iteration, and one product to see that u is right."""
    (_, _, first), (_, _, second) = estimate(bx.inner.fixed_point(ista, maxiter=5000, tol=1e-9), -0.5, -0.5)
    assert first.inner.detail.iterations > 100
    assert first.inner.detail.products > 2
    assert (second.inner.detail.iterations, second.inner.detail.products) == (0, 1)


@pytest.mark.parametrize(
    ("options", "residual"),
    [({"maxiter": 3}, True), ({"solve": lambda x, y0, batch: y0 + 1.0}, True), ({"rate": 0.5, "maxiter": 4000}, False)],
)
def test_an_equation_that_is_not_solved_is_a_breakdown(options, residual):
    ((_, _, info),) = estimate(bx.inner.fixed_point(ista, **options), -0.5)
    assert bool(info.inner.breakdown) == residual
    assert bool(info.inner.detail.residual > 1e-3) == residual


def test_an_adjoint_that_is_singular_is_a_breakdown_and_leaves_no_u():
    """T(y) = y + x: I − ∂T is zero."""
    solver = bx.inner.fixed_point(lambda x, y, batch: y + x, solve=lambda x, y0, batch: y0)
    ((_, state, info),) = estimate(solver, 0.0)
    assert info.inner.breakdown
    assert info.inner.detail.adjoint_residual == 1
    np.testing.assert_array_equal(state.solver.u, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen(bad):
    ((grad, _, info),) = estimate(bx.inner.fixed_point(lambda x, y, batch: bad * x * y + 0.1), 1.0)
    assert info.inner.breakdown
    assert not np.isfinite(grad)


def test_gmres_beyond_one_cycle_and_in_single_precision():
    """Fifty unknowns, far from symmetric."""
    M = np.random.default_rng(2).normal(size=(50, 50)) / np.sqrt(50) + 1.5 * np.eye(50)
    solve = lambda x, y0, batch: jnp.linalg.solve(M.astype(x.dtype), jnp.broadcast_to(x, 50))  # noqa: E731
    for dtype, tol in ((jnp.float64, 1e-11), (jnp.float32, 1e-5)):
        solver = bx.inner.root(lambda x, y, batch: M.astype(x.dtype) @ y - x, solve, tol=tol)
        x, y = jnp.asarray(1.0, dtype), jnp.zeros(50, dtype)
        hypergrad = bx.hypergradient(lambda x, y, batch: jnp.sum(y[:9]), solver)
        grad, _, info = jax.jit(hypergrad.estimate)(None, hypergrad.init(x, y), x, NONE)
        assert grad.dtype == dtype
        np.testing.assert_allclose(grad, np.linalg.solve(M, np.ones(50))[:9].sum(), rtol=100 * tol)
        assert not info.inner.breakdown
        assert 20 < info.inner.detail.products < 60


@pytest.mark.parametrize("maxiter", [1, 20, 25])
def test_gmres_stops_after_so_many_products(maxiter):
    """One more for the residual after each cycle of 20."""
    M = jnp.asarray(np.random.default_rng(3).normal(size=(60, 60)) + 3 * np.eye(60))
    solver = bx.inner.root(lambda x, y, batch: M @ y - x, lambda x, y0, batch: y0, maxiter=maxiter, tol=1e-13)
    x = jnp.asarray(0.0)
    hypergrad = bx.hypergradient(lambda x, y, batch: jnp.sum(y), solver)
    _, _, info = jax.jit(hypergrad.estimate)(None, hypergrad.init(x, jnp.zeros(60)), x, NONE)
    assert maxiter < info.inner.detail.products <= maxiter + 2
    assert info.inner.detail.adjoint_residual < 1
    assert info.inner.breakdown


def test_tasks_under_vmap():
    solve = bx.differentiable(bx.inner.fixed_point(lambda x, y, batch: {"y": batch * jnp.sin(y["y"]) + x}, tol=1e-13))

    def loss(x, a):
        return solve(x, {"y": jnp.zeros(())}, a)["y"] ** 2

    a = jnp.array([0.1, 0.5, -0.4])
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(jnp.asarray(0.7), a)
    y = jax.jit(jax.vmap(lambda a: solve(jnp.asarray(0.7), {"y": jnp.zeros(())}, a)["y"]))(a)
    np.testing.assert_allclose(grads, 2 * y / (1 - a * jnp.cos(y)), rtol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bx.inner.fixed_point(ista, rate=1.5), r"rate must be in \(0, 1\]; got 1.5"),
        (lambda: bx.inner.fixed_point(ista, maxiter=0), r"maxiter must be an int >= 1; got 0"),
        (lambda: bx.inner.fixed_point(ista, tol=-1.0), r"tol must be a finite number >= 0; got -1.0"),
        (lambda: bx.inner.fixed_point(lambda y: y), r"step must be a function \(x, y, batch\)"),
        (lambda: bx.inner.fixed_point(ista, linear_solve=3), r"linear_solve must be a function \(product, b, u0\)"),
        (lambda: bx.inner.root(kkt, lambda x, y0: y0), r"solve must be a function \(x, y0, batch\)"),
        (
            lambda: estimate(bx.inner.fixed_point(lambda x, y, batch: y[:2]), 1.0),
            "y under step must keep",
        ),
        (
            lambda: estimate(bx.inner.root(lambda x, y, batch: y[:2], lambda x, y, batch: y), 1.0),
            "y under residual must",
        ),
        (
            lambda: estimate(bx.inner.root(ista, lambda x, y, batch: y[:2]), 1.0),
            "y under solve must keep",
        ),
        (
            lambda: estimate(bx.inner.fixed_point(ista, linear_solve=lambda product, b, u0: b[:2]), 1.0),
            "u of linear_solve must keep its structure",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


NONNEGATIVE = optax.chain(optax.sgd(RATE), optax.keep_params_nonnegative())


def descended(x, y0, batch):
    return jax.lax.fori_loop(0, 3000, lambda _, y: STEPS["nonnegative"](x, y, batch), y0)


def free(x, y0, batch):
    return jnp.linalg.solve(A.T @ A + jnp.exp(x) * jnp.eye(6), A.T @ b)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: bx.inner.implicit(ridge, NONNEGATIVE, 3000), [True, True]),
        (lambda: bx.inner.implicit(ridge, solve=descended), [False, True]),
        (lambda: bx.inner.implicit(ridge, optax.sgd(RATE), 3000), [False, False]),
        (lambda: bx.inner.implicit(ridge, optax.sgd(RATE), 1), [False, False]),
        (lambda: bx.inner.implicit(ridge, solve=free), [False, False]),
        (lambda: bx.inner.implicit(ridge), [False, False]),
    ],
    ids=["steps", "solve", "free_steps", "few_steps", "free_solve", "no_steps"],
)
def test_implicit_says_that_steps_stop_at_a_constraint(make, expected):
    """Where ∇_y g is not small: a solver of one's own is seen to stop when it starts from there."""
    infos = [info.inner for _, _, info in estimate(make(), -0.5, -0.5)]
    assert [bool(info.breakdown) for info in infos] == expected

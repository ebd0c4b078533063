"""The doctor: a case made for each verdict, and its reference against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

RANDOM = np.random.default_rng(0)
Q, _ = np.linalg.qr(RANDOM.normal(size=(6, 6)))
H = Q @ np.diag([0.1, 0.3, 1.0, 2.0, 5.0, 10.0]) @ Q.T
C = RANDOM.normal(size=(6, 3))
B = RANDOM.normal(size=6)
X, Y = np.array([0.5, -1.0, 2.0]), np.zeros(6)
BATCH = bx.Batch(B, H)
STEP = 0.19  # just below 2 / 10


def inner_loss(x, y, h):
    return 0.5 * y @ h @ y - y @ (C @ x)


def outer_loss(x, y, b):
    return 0.5 * jnp.sum((y - b) ** 2) + 0.5 * jnp.sum(x**2)


PROBLEM = bx.BilevelProblem(outer_loss, inner_loss)
SOLUTION = np.linalg.solve(H, C @ X)
EXACT = X + C.T @ np.linalg.solve(H, SOLUTION - B)


def implicit(steps=2000, ihvp=None, loss=inner_loss):
    return bx.inner.implicit(loss, optax.sgd(STEP), steps, ihvp=ihvp)


def check(solver, outer_loss=outer_loss, inner_loss=inner_loss, x=X, y=Y, batch=BATCH, **options):
    hypergrad = solver if isinstance(solver, bx.problem.Hypergradient) else bx.hypergradient(outer_loss, solver)
    return bx.check_hypergradient(bx.BilevelProblem(outer_loss, inner_loss), x, y, batch, hypergrad, **options)


def test_a_right_one():
    report = check(implicit())
    assert report.ok
    assert report.verdict == "the hypergradient is right to 0.01"
    np.testing.assert_allclose(report.reference, EXACT, rtol=1e-9)
    np.testing.assert_allclose([report.smallest_curvature, report.largest_curvature], [0.1, 10.0], rtol=1e-9)
    np.testing.assert_allclose(report.condition, 100, rtol=1e-9)
    assert report.relative_error < 1e-6
    assert report.cosine > 1 - 1e-9
    assert report.reference_gradient_norm < 1e-12
    assert report.finite_difference_error < 1e-6


def test_the_parts_of_the_error():
    """At a y that is not y*, the exact implicit hypergradient there divides the error in two."""
    report = check(implicit(steps=20, ihvp=bx.ihvp.exact()))
    y = Y
    for _ in range(20):
        y = y - STEP * (H @ y - C @ X)
    there = X + C.T @ np.linalg.solve(H, y - B)
    size = np.linalg.norm(EXACT)
    np.testing.assert_allclose(report.inner_error, np.linalg.norm(there - EXACT) / size, rtol=1e-5)
    np.testing.assert_allclose(report.relative_error, report.inner_error, rtol=1e-5)
    assert report.solver_error < 1e-8
    np.testing.assert_allclose(report.gradient_norm, np.linalg.norm(H @ y - C @ X), rtol=1e-9)


WRONG = {
    "the inner problem is not solved": (lambda: implicit(steps=5), ["more inner steps", "2 / 10 = 0.2"]),
    "the linear system is not solved: too few iterations": (
        lambda: implicit(ihvp=bx.ihvp.cg(maxiter=2)),
        ["condition number of 1e+02 takes cg at most 39 iterations"],
    ),
    "another system was solved: the damping is too large": (
        lambda: implicit(ihvp=bx.ihvp.cg(maxiter=20, damping=0.5)),
        ["damping of about 0.5", "smallest curvature is 0.1"],
    ),
    "another system was solved: the curvature is not the Hessian": (
        lambda: implicit(ihvp=bx.ihvp.cg(maxiter=20, curvature=lambda *point: lambda v: jnp.arange(1, 7) * v)),
        ["curvature=bx.curvature.hessian"],
    ),
    "the inverse Hessian is replaced by a crude approximation": (
        lambda: implicit(ihvp=bx.ihvp.identity(0.1)),
        ["Take ihvp.cg"],
    ),
    "the unroll is too short": (
        lambda: bx.inner.chain(
            bx.inner.no_gradient(inner_loss, optax.sgd(STEP), 2000), bx.inner.reverse(inner_loss, optax.sgd(STEP), 10)
        ),
        ["condition number of 1e+02", "chain(implicit(...), reverse(...))"],
    ),
    "the linear solver broke down": (
        lambda: implicit(ihvp=bx.ihvp.neumann(terms=5, step_size=1.0)),
        ["A step size of ihvp must be below 2 / 10 = 0.2"],
    ),
    "the estimate is not finite, though y is": (
        lambda: implicit(ihvp=bx.ihvp.neumann(terms=3000, step_size=1.0)),
        ["A step size of ihvp must be below 2 / 10 = 0.2"],
    ),
    "the estimate is a multiple of the hypergradient": (
        lambda: bx.hypergradient(lambda x, y, b: -outer_loss(x, y, b), implicit()),
        ["such as a sum for a mean"],
    ),
    "the penalty is biased": (
        lambda: bx.penalty(PROBLEM, optax.sgd(0.15), 2000, multiplier=20.0),
        ["multiplier is 20"],
    ),
    "the estimate is not finite": (
        lambda: bx.inner.implicit(inner_loss, optax.sgd(1e3), 200),
        ["inner steps diverge", "= 0.2"],
    ),
}


@pytest.mark.parametrize("verdict", WRONG)
def test_each_cause_has_its_verdict_and_its_remedy(verdict):
    make, says = WRONG[verdict]
    report = check(make())
    assert report.verdict == verdict, str(report)
    assert not report.ok
    assert [part for part in says if part not in report.remedy] == []
    np.testing.assert_allclose(report.reference, EXACT, rtol=1e-9)


def test_fitted_damping_is_the_one_that_was_used():
    assert 0.3 < check(implicit(ihvp=bx.ihvp.exact(damping=0.5))).damping < 0.8


def test_the_remedies_help():
    """The number of iterations, and the step size, that the remedies name are enough."""
    assert check(implicit(ihvp=bx.ihvp.cg(maxiter=39))).ok
    assert check(bx.inner.implicit(inner_loss, optax.sgd(0.19), 300)).ok


@pytest.mark.parametrize(
    ("switch_at", "verdict"),
    [(0, "too few iterations"), (1, "the inverse Hessian is replaced by a crude approximation")],
)
def test_the_active_phase_is_diagnosed(switch_at, verdict):
    crude, cut = (
        bx.hypergradient(outer_loss, implicit(ihvp=ihvp)) for ihvp in (bx.ihvp.identity(0.1), bx.ihvp.cg(maxiter=2))
    )
    assert check(bx.two_phase(switch_at, crude, cut)).verdict.endswith(verdict)


def test_a_penalty_whose_inner_problems_are_not_solved():
    report = check(bx.penalty(PROBLEM, optax.sgd(0.1), 3, multiplier=1e6))
    assert report.verdict == "the inner problem is not solved"


def test_the_nearest_minimum_is_the_reference():
    """y0 is in one well, and the state of the estimator in the other."""

    def wells(x, y, batch):
        return jnp.sum((y**2 - 1) ** 2 / 4 + 0.1 * jnp.sum(x) * y)

    hypergrad = bx.hypergradient(outer_loss, bx.inner.implicit(wells, optax.sgd(0.2), 300))
    state = hypergrad.init(X, jnp.full(6, 0.9))
    assert check(hypergrad, inner_loss=wells, y=jnp.full(6, -0.9), state=state).ok


def test_scales_of_x_that_differ_by_far():
    def scaled(x, y, batch):
        return jnp.sum((y - x["l2"] * jnp.sum(x["big"]) / 1e4) ** 2) + x["l2"] * jnp.sum(y**2)

    def outer(x, y, batch):
        return jnp.sum((y - 1) ** 2)

    x = {"l2": jnp.array(0.1), "big": jnp.array([1e4, 2e4])}
    report = check(bx.inner.implicit(scaled, optax.sgd(0.3), 200), outer, scaled, x)
    assert report.ok, str(report)
    assert report.finite_difference_error < 1e-3


def test_x_near_the_edge_of_its_domain():
    def logarithmic(x, y, batch):
        return jnp.sum((y - jnp.log(x)) ** 2)

    assert check(bx.inner.implicit(logarithmic, optax.sgd(0.5), 3), inner_loss=logarithmic, x=jnp.full(6, 5e-5)).ok


def test_a_leaf_that_the_optimizer_freezes_is_named():
    def two_leaves(x, y, h):
        return inner_loss(x, y["free"] + y["frozen"], h) + 0.5 * jnp.sum(y["frozen"] ** 2)

    def outer(x, y, b):
        return outer_loss(x, y["free"], b)

    optimizer = optax.partition({"a": optax.sgd(0.15), "b": optax.set_to_zero()}, {"free": "a", "frozen": "b"})
    solver = bx.inner.implicit(two_leaves, optimizer, 2000)
    report = check(solver, outer, two_leaves, y={"free": Y, "frozen": jnp.ones(6)})
    assert report.verdict == "y['frozen'] does not move, but g depends on it", str(report)
    assert "docs/recipes.md" in report.remedy


def test_a_loss_that_is_another_function_in_float64():
    ones = Y + 1
    with jax.enable_x64(False):
        x, y, batch = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float32)), (X, ones, BATCH))
        matrix = np.asarray(C, np.float32)

        def loss(x, y, h):
            kept = jax.random.bernoulli(jax.random.key(1), 0.5, y.shape)
            z = jnp.where(kept, y, 0.5 * y)
            return 0.5 * z @ h @ z - z @ (matrix.astype(z.dtype) @ x)

        report = check(implicit(loss=loss), inner_loss=loss, x=x, y=y, batch=batch)
    assert report.verdict.startswith("a loss is another function in float64"), str(report)
    assert "dtype=jnp.float32" in report.remedy


def test_a_state_without_y():
    nameless = bx.problem.Hypergradient(lambda x, y, batch=None: (), lambda key, state, x, batch: (x, state, ()))
    with pytest.raises(ValueError, match=r"hypergrad.init must return a NamedTuple with a field y.* got \(\)"):
        check(nameless)


def test_noise_of_random_batches():
    rows = jnp.asarray(RANDOM.normal(size=(64, 6)))

    def loss(x, y, rows):
        return jnp.mean((rows @ y - jnp.sum(x)) ** 2) + 0.05 * jnp.sum((y - C @ x) ** 2)

    solver = bx.inner.implicit(
        loss,
        optax.sgd(0.1),
        500,
        ihvp=bx.ihvp.cg(maxiter=20, sample=bx.sampling.minibatch(8)),
        cross_sample=bx.sampling.minibatch(8),
    )
    batch = bx.Batch(B, rows)
    report = check(solver, inner_loss=loss, batch=batch, key=jax.random.key(0))
    assert report.verdict == "the noise of random draws is most of the error", str(report)
    assert report.noise > 0.05


def test_indefinite_where_the_estimator_stands():
    def double_well(x, y, batch):
        return jnp.sum((y**2 - 1) ** 2 - 0.3 * jnp.sum(x) * y)

    report = check(
        bx.inner.implicit(double_well, optax.sgd(1e-3), 1), inner_loss=double_well, y=jnp.linspace(0.1, 0.3, 6)
    )
    assert report.verdict == "the curvature is indefinite where the estimator stands", str(report)
    assert report.estimator_curvature < 0 < report.smallest_curvature
    assert "gauss_newton" in report.remedy


def test_a_saddle():
    """As where two units of a net start alike: the gradient is zero, and nothing leaves that point."""

    def saddle(x, y, batch):
        return 0.5 * y[0] ** 2 - 0.5 * y[1] ** 2 + 0.25 * y[1] ** 4

    report = check(bx.inner.implicit(saddle), lambda x, y, b: jnp.sum((y - x) ** 2), saddle, X[:2], jnp.zeros(2))
    assert report.verdict == "the curvature is indefinite at a stationary point: y is at a saddle"
    assert report.smallest_curvature == -1


def test_a_flat_minimum():
    def flat(x, y, batch):
        return (jnp.sum(y) - jnp.sum(x)) ** 2

    report = check(bx.inner.implicit(flat, optax.sgd(0.01), 10), inner_loss=flat)
    assert report.verdict.startswith("the curvature is flat")
    assert "l2" in report.remedy


def test_no_minimum():
    report = check(
        bx.inner.implicit(lambda x, y, batch: jnp.sum(x) * jnp.sum(y), optax.sgd(0.1), 1),
        inner_loss=lambda x, y, batch: jnp.sum(x) * jnp.sum(y),
    )
    assert report.verdict == "the inner problem has no minimum that could be found"


def test_a_reference_that_finite_differences_do_not_confirm():
    def stopped(x, y, h):
        return inner_loss(jax.lax.stop_gradient(x), y, h)

    report = check(implicit(loss=stopped), inner_loss=stopped)
    assert report.verdict == "the implicit hypergradient and a finite difference of F do not agree"
    assert "stop_gradient" in report.remedy


def test_single_precision_is_judged_in_double():
    matrix = np.asarray(C)

    def loss(x, y, h):
        return 0.5 * y @ h @ y - y @ (matrix.astype(y.dtype) @ x)

    with jax.enable_x64(False):
        x, y, batch = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float32)), (X, Y, BATCH))
        report = check(implicit(loss=loss), inner_loss=loss, x=x, y=y, batch=batch)
        assert report.grad.dtype == jnp.float32
    assert report.ok
    assert report.reference_gradient_norm < 1e-12
    np.testing.assert_allclose(report.reference, EXACT, rtol=1e-5)


def test_pytrees_keys_and_a_warm_state():
    batch = bx.Batch({"b": B, "label": jnp.arange(3)}, {"h": H, "key": jax.random.key(0)})

    def inner(x, y, batch):
        return inner_loss(x["x"], y["y"], batch["h"])

    def outer(x, y, batch):
        return outer_loss(x["x"], y["y"], batch["b"])

    problem = bx.BilevelProblem(outer, inner)
    hypergrad = bx.hypergradient(outer, bx.inner.implicit(inner, optax.sgd(STEP), 100, ihvp=bx.ihvp.cg(maxiter=3)))
    state = hypergrad.init({"x": X}, {"y": Y})
    cold = bx.check_hypergradient(problem, {"x": X}, {"y": Y}, batch, hypergrad)
    estimate = jax.jit(hypergrad.estimate)
    for _ in range(20):
        _, state, _ = estimate(None, state, {"x": X}, batch)
    warm = bx.check_hypergradient(problem, {"x": X}, {"y": Y}, batch, hypergrad, state=state)
    assert warm.ok
    assert not cold.ok
    np.testing.assert_allclose(warm.reference["x"], EXACT, rtol=1e-9)


def test_large_inner_problems_are_solved_without_a_dense_hessian(monkeypatch):
    monkeypatch.setattr("bilevax.hypergradients._reference.DENSE", 5)
    report = check(implicit())
    assert report.ok, str(report)
    np.testing.assert_allclose(report.reference, EXACT, rtol=1e-8)
    np.testing.assert_allclose([report.smallest_curvature, report.largest_curvature], [0.1, 10.0], rtol=1e-3)
    assert check(implicit(ihvp=bx.ihvp.cg(maxiter=2))).verdict == "the linear system is not solved: too few iterations"


def test_the_page_that_print_shows():
    page = str(check(implicit(steps=5)))
    assert page.startswith("WRONG: the inner problem is not solved\n")
    assert "condition 100" in page
    assert page.splitlines()[6].startswith("remedy: ")
    assert max(map(len, page.splitlines())) <= 100
    assert str(check(implicit())).startswith("ok: the hypergradient is right")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"problem": None}, "problem must be a BilevelProblem; got None"),
        ({"hypergrad": implicit()}, "hypergrad must be a Hypergradient; got implicit("),
        ({"batch": B}, "batch must be a Batch"),
        ({"tol": 0.0}, "tol must be a finite number > 0; got 0.0"),
        ({"x": jnp.arange(3)}, "x must hold floating-point arrays only; got int64"),
        ({"y": {}}, "y must hold at least one floating-point array"),
        ({"problem": PROBLEM._replace(inner_loss=None)}, "inner_loss must be a function (x, y, batch)"),
        ({"problem": PROBLEM._replace(outer_loss=lambda x: x)}, "outer_loss must be a function (x, y, batch)"),
    ],
)
def test_mistakes(change, says):
    good = {"problem": PROBLEM, "x": X, "y": Y, "batch": BATCH}
    good["hypergrad"] = bx.hypergradient(outer_loss, implicit())
    with pytest.raises(ValueError, match="must") as caught:
        bx.check_hypergradient(**(good | change))
    assert says in str(caught.value)

"""The doctor: a case made for each verdict, and its reference against closed forms."""

import functools

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


@functools.cache
def reported(steps=2000):
    """On exact steps, many or few of them."""
    return check(implicit(steps))


def test_a_right_one():
    report = reported()
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


def overflowing(key, state, loss, point):
    """Of an IHVP that diverges beyond all numbers."""
    info = bx.problem.IHVPInfo(9, 9, 0, residual=jnp.inf, curvature=jnp.nan, breakdown=jnp.asarray(True))
    return lambda b, v0=None: (b / 0.0, info), state


WRONG = {
    "the inner problem is not solved": (None, ["more inner steps", "2 / 10 = 0.2"]),
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
    "the estimate is not finite, though y is: v is lost first": (
        lambda: implicit(ihvp=bx.ihvp.identity()._replace(prepare=overflowing)),
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
    "the inner steps diverge: their step size is too large": (
        lambda: bx.inner.implicit(inner_loss, optax.sgd(1e3), 200),
        ["Lower the step size", "below 2 / 10 = 0.2"],
    ),
}


@pytest.mark.parametrize("verdict", WRONG)
def test_each_cause_has_its_verdict_and_its_remedy(verdict):
    make, says = WRONG[verdict]
    report = check(make()) if make else reported(5)
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
        return inner_loss(x, y["free"] + y["frozen"], h) + 0.5 * jnp.sum((y["frozen"] - jnp.sum(x)) ** 2)

    def outer(x, y, b):
        return outer_loss(x, y["free"] + 2 * y["frozen"], b)

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
        bx.inner.implicit(double_well, optax.sgd(1e-3), 1),
        inner_loss=double_well,
        y=jnp.linspace(0.1, 0.3, 6),
        tol=1e-3,
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
    def kink(x, y, batch):
        return jnp.sum(jnp.abs(y - jnp.sum(x)))

    report = check(bx.inner.implicit(kink, optax.sgd(0.1), 1), inner_loss=kink)
    assert report.verdict == "the inner problem has no minimum that could be found", str(report)


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
    page = str(reported(5))
    assert page.startswith("WRONG: the inner problem is not solved\n")
    assert "condition 100" in page
    assert page.splitlines()[6].startswith("note: After 10 more estimates")
    assert page.splitlines()[8].startswith("remedy: ")
    assert max(map(len, page.splitlines())) <= 100
    assert str(reported()).startswith("ok: the hypergradient is right")


def test_steps_that_lead_uphill():
    """Of the wrong sign in every direction; too large where g is steep alone."""
    report = check(bx.inner.implicit(inner_loss, optax.sgd(-0.1), 20))
    assert report.verdict == "the inner steps diverge: too large, or uphill", str(report)
    assert "subtract the gradient" in report.remedy
    assert "raise" not in report.remedy.lower()
    large = check(bx.inner.implicit(inner_loss, optax.sgd(1.1 * 2 / 10), 40))
    assert large.verdict == "the inner steps diverge: their step size is too large", str(large)
    assert check(bx.inner.implicit(inner_loss, optax.sgd(0.9 * 2 / 10), 600)).ok  # the remedy of both


@pytest.mark.parametrize(("steps", "says"), [(2, "too large, or uphill"), (3, "their step size is too large")])
def test_steps_that_overshoot_in_every_direction(steps, says):
    """An even number of them looks like steps uphill: the remedy for both says lower first."""
    report = check(bx.inner.implicit(inner_loss, optax.sgd(30.0), steps))
    assert report.verdict == f"the inner steps diverge: {says}", str(report)
    assert "Lower the step size: gradient descent takes one below 2 / 10" in report.remedy


def test_a_g_with_the_wrong_sign():
    def minus(x, y, h):
        return -inner_loss(x, y, h)

    report = check(bx.inner.implicit(minus, optax.sgd(0.1), 30), inner_loss=minus)
    assert report.verdict == "g is not bounded below: it has no minimum"
    assert "sign" in report.remedy
    assert np.isnan([report.relative_error, report.cosine, report.inner_error]).all()


@pytest.mark.parametrize("part", ["x", "y", "g", "gradient of g", "f", "steps"])
def test_what_is_not_finite_first_is_named(part):
    """Instead of an error of a library, or of the doctor's own numbers."""
    x, y, h = (np.nan * value if part == name else value for name, value in zip("xyh", (X, Y, 0 * H), strict=True))

    def inner(x, y, h):
        root = {"g": jnp.sqrt(y[0] - 5.0), "gradient of g": jnp.sqrt(jnp.abs(y[0]))}
        return inner_loss(x, y, h) + root.get(part, 0.0)

    def outer(x, y, b):
        return outer_loss(x, y, b) + (jnp.log(-1 - y[1] ** 2) if part == "f" else 0.0)

    def steps(x):  # y grows tenfold and more: beyond all numbers
        return optax.scale_by_learning_rate(-1e200 if part == "steps" else 0.1)

    report = check(bx.inner.reverse(inner, steps, 3), outer, inner, x, y, bx.Batch(B, h + H * (part == "steps")))
    says = {
        "y": "y, where the steps start, is not finite",
        "gradient of g": "the gradient of g at the first y is not finite",
        "f": "f at the last y is not finite",
        "steps": "the inner steps diverge",
    }
    assert report.verdict.startswith(says.get(part, part)), str(report)
    assert not report.ok


def test_a_root_in_the_optimizer_is_named():
    """Its derivative is lost where an entry of the gradient is exactly zero, and nothing else is."""
    root = optax.stateless(lambda updates, params: jax.tree.map(lambda u: -0.1 * jnp.sqrt(u**2), updates))

    def inner(x, y, h):
        return inner_loss(x, y, h) * 0 + jnp.sum((y[:3] - x) ** 2)

    report = check(bx.inner.reverse(inner, root, 3), inner_loss=inner)
    assert report.verdict == "the estimate is not finite, though y is: the derivative of the inner steps is lost first"
    assert "3 entries of ∇_y g are exactly 0" in report.remedy
    assert "adam" in report.remedy


def test_x_in_the_optimizer_alone():
    """A decoupled decay: the implicit rule knows nothing of it, the unroll does."""

    def outer(x, y, b):
        return jnp.sum((y - b) ** 2)

    def inner(x, y, h):
        return 0.5 * y @ h @ y - jnp.sum(y) * x["in g"]

    def decayed(x):
        return optax.chain(optax.add_decayed_weights(jnp.exp(x["decay"])), optax.sgd(0.15))

    x = {"decay": jnp.asarray(-1.0), "in g": jnp.asarray(2.0)}
    report = check(bx.inner.implicit(inner, decayed, 100), outer, inner, x)
    assert report.verdict == "the derivative of x['decay'] is zero, because x enters the optimizer only, not g"
    assert "inner.reverse" in report.remedy
    assert not report.ok
    assert check(bx.inner.reverse(inner, decayed, 100), outer, inner, x).ok


def test_steps_that_stop_at_a_constraint():
    """Where ∇_y g is not zero; the derivative of the projected steps themselves is right."""

    def nonnegative(y):
        return jnp.maximum(y, 0)

    def projected(x, y0, h):
        return jax.lax.fori_loop(0, 2000, lambda _, y: nonnegative(y - 0.1 * jax.grad(inner_loss, 1)(x, y, h)), y0)

    report = check(bx.inner.implicit(inner_loss, solve=projected, ihvp=bx.ihvp.exact()))
    assert report.verdict.startswith("the inner steps stop where ∇_y g is not 0: at a constraint"), str(report)
    assert "more inner steps" not in report.remedy
    steps = bx.inner.fixed_point(lambda x, y, h: nonnegative(y - 0.1 * jax.grad(inner_loss, 1)(x, y, h)), maxiter=2000)
    for remedy in (
        steps,
        bx.inner.reverse(inner_loss, optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative()), 2000),
    ):
        remedied = check(remedy)
        assert remedied.ok, str(remedied)
        assert remedied.verdict.endswith("the derivative of the steps that run")


def test_an_unroll_that_stops_early_is_right_in_its_own_way():
    """As in MAML; what the solved inner problem would give is a note."""
    solver = bx.inner.reverse(inner_loss, optax.sgd(0.05), 5, initial=lambda x: jnp.concatenate([x, x]))
    report = check(solver)
    assert report.ok
    assert report.grade == "exact"
    assert report.verdict.endswith("it is the derivative of the steps that run")
    assert report.own_error < 1e-6
    assert "With the inner problem solved, the hypergradient is another one" in report.note
    again = bx.inner.implicit(inner_loss, optax.sgd(0.05), 5, initial=lambda x: jnp.concatenate([x, x]))
    assert (
        check(again).verdict == "the inner problem is not solved"
    )  # though a second run moves nothing: it starts anew


def test_directions_that_the_hypergradient_does_not_see():
    """A leaf of y without use, and a shift that changes nothing; one that f sees is another matter."""

    def inner(x, y, h):
        y = y["w"] - jnp.mean(y["w"])
        return inner_loss(x, y, h)

    def outer(x, y, b):
        return outer_loss(x, y["w"] - jnp.mean(y["w"]), b)

    y = {"w": Y, "unused": jnp.ones(2)}
    report = check(bx.inner.implicit(inner, optax.sgd(0.19), 2000, ihvp=bx.ihvp.cg(maxiter=50)), outer, inner, y=y)
    assert report.ok, str(report)
    assert report.flat_directions == 3
    assert report.smallest_curvature > 0
    assert "3 directions" in report.note


def test_a_stale_memory_and_a_wrong_start():
    def prepare(key, state, loss, point):  # no IHVP of the package: those leave a v0 that is worse than zero
        product = bx.curvature.hessian(loss, *point)

        def apply(b, v0=None):
            v = jax.lax.fori_loop(0, 300, lambda _, v: v - 0.19 * (product(v) - b), v0)
            residual = jnp.linalg.norm(product(v) - b) / jnp.linalg.norm(b)
            return v, bx.problem.IHVPInfo(300, 301, 0, residual, jnp.nan, jnp.isnan(residual))

        return apply, state

    ihvp = bx.problem.IHVP(lambda x, y, batch=None, inner_loss=None: (), prepare)
    hypergrad = bx.hypergradient(outer_loss, implicit(ihvp=ihvp))
    state = hypergrad.init(X, SOLUTION)
    stale = state._replace(solver=state.solver._replace(v=jnp.full(6, 1e4)))
    report = check(hypergrad, state=stale)
    assert report.verdict == "the warm v, or the state of the optimizer, is stale: afresh the error is smaller", str(
        report
    )
    assert check(hypergrad, state=hypergrad.init(X, stale.y)).ok
    few = bx.hypergradient(outer_loss, implicit(10))
    report = check(few, y=SOLUTION, state=few.init(X, SOLUTION + 1e3))
    assert report.verdict == "the warm start is wrong: from the y that was passed the error is smaller", str(report)
    assert check(few, y=SOLUTION).ok


def test_a_penalty_is_known_by_what_it_returns():
    """One that is not ours: y and y_λ are solved exactly, and nothing is reported but y."""

    def biased(multiplier):
        def estimate(key, state, x, batch):
            h, shifted = batch.inner, batch.inner + jnp.eye(6) / multiplier
            y, y_above = jnp.linalg.solve(h, C @ x), jnp.linalg.solve(shifted, C @ x + batch.outer / multiplier)
            return x - multiplier * C.T @ (y_above - y), state._replace(y=y), ()

        return bx.problem.Hypergradient(bx.hypergradient(outer_loss, implicit(1)).init, estimate)

    report = check(biased(20.0))
    assert report.verdict == "the penalty is biased", str(report)
    np.testing.assert_allclose(report.multiplier, 20, rtol=0.05)
    assert "multiplier of 20" in report.remedy
    assert check(biased(1e5)).ok


def test_a_run_that_cannot_be_repeated_in_float64():
    """An optimizer that keeps the last gradient, and begins with one in float32."""

    def start(params):
        return jnp.zeros(6, jnp.float32)

    optimizer = optax.GradientTransformation(start, lambda updates, state, params=None: (-0.1 * updates, updates))
    with jax.enable_x64(False):
        x, y, batch = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float32)), (X, Y, BATCH))
        matrix = np.asarray(C, np.float32)

        def loss(x, y, h):
            return 0.5 * y @ h @ y - y @ (matrix.astype(y.dtype) @ x)

        report = check(bx.inner.reverse(loss, optimizer, 5), inner_loss=loss, x=x, y=y, batch=batch)
    assert report.note.startswith("The run could not be repeated in float64: ")
    assert not report.ok


def test_three_grades():
    reports = [check(implicit(ihvp=bx.ihvp.cg(maxiter=20, damping=damping))) for damping in (0.0, 0.01, 1.0)]
    assert [report.grade for report in reports] == ["exact", "good enough to descend", "wrong"]
    assert str(reports[1]).startswith("GOOD ENOUGH TO DESCEND (cosine "), reports[1]


def test_what_is_carried_is_not_differentiated():
    def inner(x, y, h):
        mean, count = y.carried
        return inner_loss(x, y.params, h), (0.9 * mean + 0.1 * y.params, count + 1)

    def outer(x, y, b):
        return outer_loss(x, y.params, b) + jnp.sum(y.carried[0] * y.params)

    y = bx.inner.Carried(Y, (Y, 0))
    assert check(bx.inner.implicit(inner, optax.sgd(STEP), 2000), outer, inner, y=y).ok


def test_the_budget_and_the_progress():
    lines = []
    report = check(implicit(5), budget=1e-9, progress=lines.append)
    assert report.grade == "not known"
    assert report.verdict == "the budget was over before the inner problem was solved"
    assert str(report).startswith("NOT KNOWN: ")
    assert np.isnan(report.relative_error)
    assert any("left out" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"problem": None}, "problem must be a BilevelProblem; got None"),
        ({"hypergrad": implicit()}, "hypergrad must be a Hypergradient; got implicit("),
        ({"batch": B}, "batch must be a Batch"),
        ({"tol": 0.0}, "tol must be a finite number > 0; got 0.0"),
        ({"budget": 0.0}, "budget must be a finite number > 0; got 0.0"),
        ({"progress": 3}, "progress must be a function (text)"),
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

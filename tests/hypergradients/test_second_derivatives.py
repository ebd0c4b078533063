"""Forward mode, and derivatives of derivatives, through solvers that know the tangent of their solution."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

X, DIRECTION = np.array([0.3, -0.8, 1.7]), np.array([1.0, 2.0, -1.0])
TIGHT = bx.ihvp.cg(maxiter=10, tol=1e-14)


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def g(x, y, batch):
    """Its solution is x / (1 + x²); ∇²_yy g depends on x, and ∇²_xy g on y."""
    return 0.5 * jnp.sum((1 + x**2) * y["y"] ** 2 - 2 * x * y["y"])


def step(x, y, batch):
    """The same by a map that is not symmetric."""
    slope = (1 + x**2) * y["y"] - x
    return {"y": y["y"] - 0.2 * slope - 0.05 * jnp.roll(slope, 1)}


def residual(x, y, batch):
    slope = (1 + x**2) * y["y"] - x
    return {"y": slope + 0.5 * jnp.roll(slope, 1) ** 2 + 0.2 * jnp.roll(slope, 1)}


def closed(x, y0=None, batch=None):
    return {"y": x / (1 + x**2)}


SOLVERS = {
    "implicit": lambda: bx.inner.implicit(g, optax.sgd(0.25), steps=300, ihvp=TIGHT),
    "implicit_exact": lambda: bx.inner.implicit(g, solve=closed, ihvp=bx.ihvp.exact()),
    "fixed_point": lambda: bx.inner.fixed_point(step, tol=1e-14),
    "root": lambda: bx.inner.root(residual, closed, tol=1e-14),
}


def forms(solution, direction, most):
    """Derivatives of a function of the solution, by names, up to an order."""

    def f(x):
        y = solution(x)["y"]
        return jnp.sum(y) ** 2 + jnp.sum(y**3)

    def along(function):
        return lambda x: jax.jvp(function, (x,), (direction,))[1]

    second = {"grad": jax.grad(f), "jvp": along(f), "hessian": jax.hessian(f)}
    third = {
        "jacfwd": jax.jacfwd(f),
        "reverse over reverse": jax.jacrev(jax.grad(f)),
        "forward over forward": jax.jacfwd(along(f)),
        "third": along(along(jax.grad(f))),
    }
    chosen = second | (third if most == 3 else {})
    return jax.jit(lambda x: {name: form(x) for name, form in chosen.items()})


@pytest.mark.parametrize("name", ["implicit", "fixed_point", "root"])
def test_all_forms_equal_those_of_the_solution(name, subtests):
    solve, most = bx.differentiable(SOLVERS[name]()), 3 if name == "implicit" else 2
    x, direction = jnp.asarray(X), jnp.asarray(DIRECTION)
    got = forms(lambda x: solve(x, {"y": jnp.zeros(3)}, None), direction, most)(x)
    expected = forms(closed, direction, most)(x)
    for form in expected:
        with subtests.test(form):
            np.testing.assert_allclose(got[form], expected[form], rtol=1e-9, atol=1e-10)


def test_tasks_have_a_hessian_each():
    """Under vmap."""
    solve = bx.differentiable(SOLVERS["implicit_exact"]())

    def hessians(solution):
        return jax.jit(jax.vmap(jax.hessian(lambda x: jnp.sum(jnp.sin(solution(x)["y"])))))

    xs = jnp.asarray(np.stack([X, X[::-1]]))
    got = hessians(lambda x: solve(x, {"y": jnp.zeros(3)}, None))(xs)
    np.testing.assert_allclose(got, hessians(closed)(xs), rtol=1e-9, atol=1e-10)


def test_an_approximation_is_its_own_transpose():
    """A Neumann series that is cut off: the same number in both modes."""
    solve = bx.differentiable(
        bx.inner.implicit(g, optax.sgd(0.25), steps=3, ihvp=bx.ihvp.neumann(terms=2, step_size=0.2))
    )

    @jax.jit
    def both(x, direction):
        F = lambda x: jnp.sum(solve(x, {"y": jnp.ones(3)}, None)["y"] ** 2)  # noqa: E731
        return jax.jvp(F, (x,), (direction,))[1], jnp.vdot(jax.grad(F)(x), direction)

    forward, reverse = both(jnp.asarray(X), jnp.asarray(DIRECTION))
    np.testing.assert_allclose(forward, reverse, rtol=1e-12)


def test_draws_are_those_of_the_hypergradient():
    """A tangent draws its batches with the keys of the backward pass."""
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(40, 3)))

    def loss(x, y, batch):
        return 0.5 * jnp.mean((batch @ (y - x)) ** 2) + 0.5 * jnp.sum(jnp.exp(x) * y**2)

    sample = bx.sampling.minibatch(5)
    solver = bx.inner.implicit(
        loss, optax.sgd(0.1), steps=2, ihvp=bx.ihvp.exact(sample=sample), sample=sample, cross_sample=sample
    )
    f = lambda x, y, batch: jnp.sum(y**2)  # noqa: E731
    solve, hypergrad = bx.differentiable(solver), bx.hypergradient(f, solver)

    @jax.jit
    def three(key, x, y, rows):
        F = lambda x: f(x, solve(x, y, rows, key), None)  # noqa: E731
        estimate = hypergrad.estimate(key, hypergrad.init(x, y), x, bx.Batch(None, rows))[0]
        return estimate, jax.grad(F)(x), jax.jacfwd(F)(x)

    expected, reverse, forward = three(jax.random.key(3), jnp.asarray(X), jnp.ones(3), rows)
    np.testing.assert_allclose(reverse, expected, rtol=1e-12)
    np.testing.assert_allclose(forward, expected, rtol=1e-12)


def lowest(p, z, batch):  # z = (x + y) / 2
    return 0.5 * (z - p[0]) ** 2 + 0.5 * (z - p[1]) ** 2


@pytest.mark.parametrize("outermost", ["implicit", "reverse"])
def test_three_levels(outermost):
    """y = (4 − x) / 5 and z = (x + y) / 2, so that d(y² + z)/dx = −2/5 y + 2/5."""
    lower = bx.differentiable(bx.inner.implicit(lowest, optax.sgd(0.5), steps=1, ihvp=bx.ihvp.exact()))

    def middle(x, y, batch):
        return 0.5 * (y - 1) ** 2 + 0.5 * lower((x, y), jnp.zeros(()), None) ** 2

    solver = {
        "implicit": lambda: bx.inner.implicit(middle, optax.sgd(0.8), steps=3, ihvp=TIGHT),
        "reverse": lambda: bx.inner.reverse(middle, optax.sgd(0.8), steps=3),
    }[outermost]()
    solve = bx.differentiable(solver)

    def outer(x):
        y = solve(x, jnp.zeros(()), None)
        return y**2 + lower((x, y), jnp.zeros(()), None)

    hypergrad = bx.hypergradient(lambda x, y, batch: y**2 + lower((x, y), jnp.zeros(()), None), solver)
    x = jnp.asarray(1.0)
    estimate = jax.jit(hypergrad.estimate)(None, hypergrad.init(x, x), x, bx.Batch(None, None))[0]
    np.testing.assert_allclose([jax.jit(jax.grad(outer))(x), estimate], -0.4 * 0.6 + 0.4, rtol=1e-9)


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, cotangent: (cotangent,))


def test_a_loss_may_hold_what_has_no_forward_mode():
    """A function of x alone with a rule for cotangents, or a solver with one."""
    unrolled = bx.differentiable(bx.inner.reverse(lambda x, z, batch: 0.5 * (z - x) ** 2, optax.sgd(0.5), steps=2))

    def loss(x, y, batch):
        return 0.5 * (y - straight_through(x) - unrolled(x, 0.0, None)) ** 2

    solve = bx.differentiable(bx.inner.implicit(loss, optax.sgd(1.0), steps=1, ihvp=bx.ihvp.exact()))
    both = jax.jit(lambda x: (jax.grad(solve)(x, 0.0, None), jax.jacfwd(solve)(x, 0.0, None)))(0.7)
    np.testing.assert_allclose(both, 1.75, rtol=1e-12)


def test_what_y_carries_has_no_derivative():
    def loss(x, y, batch):
        return jnp.sum(y.carried["scale"] * (y.params - x**2) ** 2), y.carried | {"count": y.carried["count"] + 1}

    solve = bx.differentiable(bx.inner.implicit(loss, optax.sgd(0.25), steps=40, ihvp=TIGHT))
    y0 = bx.inner.Carried(jnp.zeros(3), {"scale": jnp.ones(3), "count": jnp.asarray(0)})

    @jax.jit
    def run(x):
        F = lambda x: jnp.sum(solve(x, y0, None).params ** 2)  # noqa: E731
        return jax.grad(F)(x), jax.jacfwd(F)(x), jnp.diag(jax.hessian(F)(x)), solve(x, y0, None).carried["count"]

    x = jnp.asarray(X)
    for got, expected in zip(run(x), (4 * x**3, 4 * x**3, 12 * x**2, 40), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9)


def make(kind, w):
    """A solver whose loss closes over w."""

    def loss(x, y, batch):
        return 0.5 * w * (y - x) ** 2

    return bx.differentiable(
        {
            "implicit": lambda: bx.inner.implicit(loss, optax.sgd(0.5), steps=2, ihvp=bx.ihvp.exact()),
            "no_steps": lambda: bx.inner.implicit(loss, ihvp=bx.ihvp.exact()),
            "fixed_point": lambda: bx.inner.fixed_point(lambda x, y, batch: y - 0.5 * w * (y - x)),
            "reverse": lambda: bx.inner.reverse(loss, optax.sgd(0.5), steps=2),
        }[kind]()
    )


def value(kind):
    return lambda x, w: make(kind, w)(x, 0.0, None) ** 2


WAYS = {
    "eager": lambda F: jax.grad(F, 1),
    "jit of grad": lambda F: jax.jit(jax.grad(F, 1)),
    "grad of jit": lambda F: jax.grad(jax.jit(F), 1),
    "vmap": lambda F: lambda x, w: jax.vmap(jax.grad(F, 1), (None, 0))(x, w * jnp.ones(2)),
    "scan": lambda F: jax.grad(lambda x, w: jax.lax.scan(lambda c, _: (F(c, w), None), x, length=2)[0], 1),
}
FORWARD = {"jvp": lambda F: lambda x, w: jax.jvp(F, (x, w), (0.0, 1.0)), "hessian": lambda F: jax.hessian(F, 1)}


@pytest.mark.parametrize("kind", ["implicit", "no_steps", "fixed_point", "reverse"])
def test_a_derivative_in_a_closure_is_refused(kind, subtests):
    for name, way in (WAYS | ({} if kind == "reverse" else FORWARD)).items():
        with (
            subtests.test(name),
            pytest.raises(ValueError, match="solver must not close over a value that is differentiated"),
        ):
            way(value(kind))(1.0, 1.0)


@pytest.mark.parametrize("kind", ["implicit", "fixed_point", "reverse"])
def test_a_closure_that_is_not_differentiated_is_welcome(kind):
    """Under jit too, where it is traced as well."""
    loss = value(kind)
    y = 0.7 * (1 if kind == "fixed_point" else 1 - 0.55**2)
    expected = 2 * y * (y / 0.7 if kind == "reverse" else 1)
    mapped = jax.jit(jax.vmap(jax.grad(loss), (None, None), axis_size=1))
    for way in (jax.jit(jax.grad(loss)), jax.grad(jax.jit(loss)), mapped):
        with jax.checking_leaks():
            np.testing.assert_allclose(way(0.7, 0.9), expected, rtol=1e-5)


def test_a_derivative_in_the_batch_is_refused_in_both_modes():
    solve = bx.differentiable(
        bx.inner.implicit(lambda x, y, batch: 0.5 * jnp.sum((y - x * batch["a"]) ** 2), ihvp=bx.ihvp.exact())
    )
    F = lambda a: solve(2.0, 0.0, {"a": a, "n": 3})  # noqa: E731
    for form in (jax.grad, jax.jacfwd, lambda F: jax.grad(jax.jit(F))):
        with pytest.raises(ValueError, match=r"got a derivative with respect to batch\['a'\]"):
            form(F)(1.0)
    assert jax.grad(lambda y0: solve(2.0, y0, {"a": 1.0, "n": 3}))(1.0) == 0


def test_the_forward_pass_solves_no_tangent_and_reverse_mode_no_more_than_an_estimate():
    """By the operations of the compiled programs."""
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)))

    def loss(x, y, batch):
        return 0.5 * jnp.sum((jnp.tanh(batch @ y) - 0.1) ** 2) + 0.5 * jnp.sum(jnp.exp(x) * y**2)

    f = lambda x, y, batch: jnp.sum(y**2)  # noqa: E731
    solver = bx.inner.implicit(loss, optax.sgd(0.01), steps=3, ihvp=bx.ihvp.cg(maxiter=4, tol=0.0))
    solve, hypergrad = bx.differentiable(solver), bx.hypergradient(f, solver)
    x, y = jnp.zeros(32), jnp.zeros(32)

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    def solved(x, rows):
        return f(x, solve(x, y, rows), None)

    def alone(x, rows):
        z, *_ = solver.forward(None, solver.init(x, y), x, solver.start(x, y), rows)
        return f(x, z.y, None)

    def estimate(x, rows):
        return hypergrad.estimate(None, hypergrad.init(x, y), x, bx.Batch(None, rows))

    assert flops(solved, x, rows) <= flops(alone, x, rows)
    assert flops(jax.grad(solved), x, rows) <= flops(estimate, x, rows)


def test_a_leaf_that_x_has_no_influence_on():
    """Its right-hand side is zero whatever the tangent of x is, and JAX must still be able to transpose the solve."""

    def inner_loss(x, y, batch):
        return 0.5 * jnp.exp(x) * y["moved"] ** 2 - y["moved"] + 0.5 * (y["still"] - 1) ** 2

    def step(x, y, batch):
        return {"moved": 0.5 * y["moved"] + 0.5 * jnp.exp(-x), "still": 0.5 + 0.5 * y["still"]}

    def solution(x, y, batch):
        return {"moved": jnp.exp(-x), "still": jnp.ones(())}

    x, y = jnp.asarray(0.3), {"moved": jnp.ones(()), "still": jnp.ones(())}
    implicit = bx.inner.implicit(inner_loss, solve=solution, ihvp=bx.ihvp.exact())
    for solver in (implicit, bx.inner.fixed_point(step, solve=solution)):
        solve = bx.differentiable(solver)

        @jax.jit
        def derivatives(x, solve=solve):
            F = lambda x: (lambda y: y["moved"] ** 2 * y["still"])(solve(x, y, None))  # noqa: E731
            return jax.grad(F)(x), jax.hessian(F)(x)

        expected = -2 * np.exp(-0.6), 4 * np.exp(-0.6)
        np.testing.assert_allclose(derivatives(x), expected, rtol=1e-10)


def test_a_leaf_that_x_has_no_influence_on_where_the_first_part_of_x_is_held():
    solve = bx.differentiable(bx.inner.implicit(g_of_parts, solve=solution_of_parts, ihvp=TIGHT))
    grad = jax.jit(jax.grad(lambda x: jnp.sum(solve({"a": 1.0, "b": x}, solution_of_parts({"b": X}), None)["y"])))(X)
    np.testing.assert_allclose(grad, (1 - X**2) / (1 + X**2) ** 2, rtol=1e-10)


def g_of_parts(x, y, batch):
    return g(x["b"], y, batch) + (y["still"] - x["a"]) ** 2


def solution_of_parts(x, y0=None, batch=None):
    return closed(x["b"]) | {"still": 1.0}

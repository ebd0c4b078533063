"""A y that carries statistics, counts and keys: loops by hand, closed forms, and what is refused."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import bilevax as bx

Carried = bx.inner.Carried
INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(24, 3)))
TARGETS = jnp.tanh(INPUTS @ jnp.asarray([[1.0], [-2.0], [0.5]]))
BATCH = bx.Batch(outer=(INPUTS[:8], TARGETS[:8]), inner=(INPUTS, TARGETS))
SAMPLE = bx.sampling.minibatch(6)
KEY = jax.random.key(1)
WARMUP = optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 100)


def close(got, expected, rtol=1e-13, atol=1e-14):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), got, expected)


# BatchNorm of three libraries: `train(y, inputs) -> (outputs, statistics)` and `evaluate(y, inputs) -> outputs`


def double_precision(statistics):
    """Flax makes them in float32, whatever the parameters are."""
    return jax.tree.map(lambda leaf: leaf.astype(float), statistics)


def of_nnx():
    double = {"param_dtype": float, "rngs": nnx.Rngs(0)}

    class Network(nnx.Module):
        def __init__(self):
            self.first, self.last = nnx.Linear(3, 4, **double), nnx.Linear(4, 1, **double)
            self.norm = nnx.BatchNorm(4, momentum=0.8, **double)

        def __call__(self, inputs):
            return self.last(jnp.tanh(self.norm(self.first(inputs))))

    graphdef, params, statistics = nnx.split(Network(), nnx.Param, nnx.BatchStat)

    def train(y, inputs):
        model = nnx.merge(graphdef, y.params, y.carried)
        return model(inputs), nnx.state(model, nnx.BatchStat)

    def evaluate(y, inputs):
        model = nnx.merge(graphdef, y.params, y.carried)
        model.eval()
        return model(inputs)

    return train, evaluate, Carried(params, double_precision(statistics))


def of_linen():
    class Network(linen.Module):
        @linen.compact
        def __call__(self, inputs, train):
            norm = linen.BatchNorm(not train, momentum=0.8, param_dtype=float)
            return linen.Dense(1, param_dtype=float)(jnp.tanh(norm(linen.Dense(4, param_dtype=float)(inputs))))

    variables = jax.jit(functools.partial(Network().init, train=True))(KEY, INPUTS)

    def train(y, inputs):
        trees = {"params": y.params, "batch_stats": y.carried}
        outputs, new = Network().apply(trees, inputs, train=True, mutable=["batch_stats"])
        return outputs, new["batch_stats"]

    def evaluate(y, inputs):
        return Network().apply({"params": y.params, "batch_stats": y.carried}, inputs, train=False)

    return train, evaluate, Carried(variables["params"], double_precision(variables["batch_stats"]))


def of_equinox():
    def make(key):
        linear = functools.partial(eqx.nn.Linear, dtype=float, key=key)
        norm = eqx.nn.BatchNorm(4, "batch", mode="ema", momentum=0.8, dtype=float)
        return eqx.nn.Sequential([linear(3, 4), norm, eqx.nn.Lambda(jnp.tanh), linear(4, 1)])

    network, statistics = eqx.nn.make_with_state(make)(KEY)
    params, rest = eqx.partition(network, eqx.is_inexact_array)

    def apply(network, statistics, inputs):
        return jax.vmap(network, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(inputs, statistics)

    def train(y, inputs):
        return apply(eqx.combine(y.params, rest), y.carried, inputs)

    def evaluate(y, inputs):
        return apply(eqx.nn.inference_mode(eqx.combine(y.params, rest)), y.carried, inputs)[0]

    return train, evaluate, Carried(params, statistics)


def losses(train, evaluate):
    def inner_loss(x, y, batch):
        outputs, statistics = train(y, batch[0])
        decay = jnp.exp(x) * optax.tree.norm(y.params, squared=True)
        return jnp.mean((outputs - batch[1]) ** 2) + decay, statistics

    def outer_loss(x, y, batch):
        return jnp.mean((evaluate(y, batch[0]) - batch[1]) ** 2) + 0.1 * x**2

    return outer_loss, inner_loss


def hand_loop(outer_loss, inner_loss, optimizer, differentiate, x, y, outer_steps, steps):
    """Unrolls the inner steps, drops the derivative of what is carried, and descends on x; the optimizer goes on."""

    def unroll(x, z, key):
        def step(z, _):
            (params, carried), opt_state, t = z
            batch = SAMPLE(jax.random.fold_in(bx.inner.step_keys(key).steps, t), t, BATCH.inner)

            def loss(params):
                return inner_loss(x, Carried(params, jax.lax.stop_gradient(carried)), batch)

            grad, new = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(grad, opt_state, params)
            y = Carried(optax.apply_updates(params, updates), jax.lax.stop_gradient(new))
            return (y, opt_state, t + 1), None

        z, _ = jax.lax.scan(step, z, length=steps)
        end = z[0] if differentiate else jax.lax.stop_gradient(z[0])
        return outer_loss(x, end, BATCH.outer), z

    def turn(carry, k):
        x, z = carry
        grad, z = jax.grad(unroll, has_aux=True)(x, z, jax.random.fold_in(KEY, k))
        return (x - 0.1 * grad, z), grad

    (x, z), grads = jax.lax.scan(turn, (x, (y, optimizer.init(y.params), 0)), jnp.arange(outer_steps))
    return (x, z[0]), grads


def library_loop(hypergrad, x, y, outer_steps):
    def turn(carry, k):
        x, state = carry
        grad, state, _ = hypergrad.estimate(jax.random.fold_in(KEY, k), state, x, BATCH)
        return (x - 0.1 * grad, state), grad

    (x, state), grads = jax.lax.scan(turn, (x, hypergrad.init(x, y)), jnp.arange(outer_steps))
    return (x, state.y), grads


@pytest.mark.parametrize(
    ("library", "make", "optimizer"),
    [
        (of_nnx, bx.inner.reverse, optax.sgd(WARMUP, momentum=0.9)),
        pytest.param(of_linen, bx.inner.no_gradient, optax.adamw(WARMUP), marks=pytest.mark.slow),
        pytest.param(of_equinox, bx.inner.no_gradient, optax.adamw(WARMUP), marks=pytest.mark.slow),
    ],
)
def test_statistics_of_a_whole_run_are_those_of_a_loop_by_hand(library, make, optimizer):
    train, evaluate, y = library()
    outer_loss, inner_loss = losses(train, evaluate)
    x = jnp.asarray(-2.0)
    hypergrad = bx.hypergradient(outer_loss, make(inner_loss, optimizer, 5, sample=SAMPLE))
    got = jax.jit(library_loop, static_argnums=(0, 3))(hypergrad, x, y, 20)
    arguments = outer_loss, inner_loss, optimizer, make is bx.inner.reverse, x, y, 20, 5
    expected = jax.jit(hand_loop, static_argnums=(0, 1, 2, 3, 6, 7))(*arguments)
    close(got, expected, rtol=1e-12)
    moved = jax.tree.map(lambda new, old: jnp.abs(new * 1.0 - old).max(), got[0][1].carried, y.carried)
    assert optax.tree.max(moved) > 0.1
    assert jnp.all(jnp.abs(got[1]) > 1e-6)


# One model with statistics that g and f read, a count and a key; its unroll by hand


def model_loss(x, y, batch):
    hidden = jnp.tanh(batch[0] @ y.params["in"][:, None])
    mean = hidden.mean()
    error = ((hidden - 0.7 * mean - 0.3 * y.carried["mean"]) * y.params["out"] - batch[1]) ** 2
    carried = {
        "mean": 0.9 * y.carried["mean"] + 0.1 * mean,
        "count": y.carried["count"] + 1,
        "key": jax.random.split(y.carried["key"])[0],
    }
    return error.mean() + jnp.exp(x) * optax.tree.norm(y.params, squared=True), carried


def evaluation_loss(x, y, batch):
    prediction = (jnp.tanh(batch[0] @ y.params["in"][:, None]) - y.carried["mean"]) * y.params["out"]
    return jnp.mean((prediction - batch[1]) ** 2)


X = jnp.asarray(-1.0)
Y = Carried(
    {"in": jnp.asarray([0.3, -0.2, 0.5]), "out": jnp.asarray(0.7)},
    {"mean": jnp.asarray(0.4), "count": jnp.asarray(2), "key": jax.random.key(5)},
)
MOMENTUM = optax.sgd(0.1, momentum=0.9)
STEPS = 3


def descend(x, y, optimizer=MOMENTUM, steps=STEPS, loss=model_loss):
    gradient = jax.grad(lambda params, held, x: loss(x, Carried(params, held), BATCH.inner), has_aux=True)
    opt_state = optimizer.init(y.params)
    for _ in range(steps):
        grad, carried = gradient(y.params, y.carried, x)
        updates, opt_state = optimizer.update(grad, opt_state, y.params)
        y = Carried(optax.apply_updates(y.params, updates), jax.lax.stop_gradient(carried))
    return y


def raw(y):
    """Its arrays, with keys as numbers."""
    return y.params, y.carried | {"key": jax.random.key_data(y.carried["key"])}


@functools.cache
def by_hand():
    """∇F, y_T, and what is left of y_T's derivative in y_0."""

    def value(x, params):
        y = descend(x, Y._replace(params=params))
        return evaluation_loss(x, y, BATCH.outer), raw(y)

    return jax.jit(jax.grad(value, (0, 1), has_aux=True))(X, Y.params)


@functools.partial(jax.jit, static_argnums=0)
def estimate(solver, x=X, y=Y):
    hypergrad = bx.hypergradient(evaluation_loss, solver)
    grad, state, info = hypergrad.estimate(KEY, hypergrad.init(x, y, BATCH), x, BATCH)
    return grad, raw(state.y), info


def own_loop(x, y, batch):
    return descend(x, y)


EXACT = bx.inner.random_directions.coordinate
SOLVERS = {
    "reverse": bx.inner.reverse(model_loss, MOMENTUM, STEPS),
    "initial": bx.inner.reverse(model_loss, MOMENTUM, STEPS, initial=lambda x: jax.tree.map(jnp.copy, Y)),
    "chain": bx.inner.chain(
        bx.inner.reverse(model_loss, MOMENTUM, 1), bx.inner.reverse(model_loss, MOMENTUM, STEPS - 1)
    ),
    "forward_gradient": bx.inner.forward_gradient(model_loss, MOMENTUM, STEPS, directions=1, sampler=EXACT),
    "solve": bx.inner.forward_gradient(None, solve=own_loop, directions=1, sampler=EXACT, chunk=1),
    "guided": bx.inner.forward_gradient(
        *(model_loss, MOMENTUM, STEPS),
        directions=1,
        sampler=EXACT,
        control_variate=bx.inner.guides.from_start(bx.inner.reverse(model_loss, MOMENTUM, STEPS)),
    ),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_derivatives_are_those_of_an_unroll_with_statistics_held(name):
    (expected, _), y = by_hand()
    grad, got, info = estimate(SOLVERS[name])
    close((grad, got), (expected, y), rtol=1e-12)
    assert not info.inner.breakdown
    assert got[1]["count"] == 2 + STEPS


def test_differences_of_a_solve_leave_out_what_it_carries():
    """The statistics of f move with x, and no derivative sees that: neither do the differences."""
    solver = bx.inner.zeroth_order(
        own_loop, directions=1, difference=bx.inner.central, sampler=EXACT, inner_loss=model_loss
    )
    grad, y, _ = estimate(solver)

    def params_alone(x):
        return evaluation_loss(X, Y._replace(params=descend(x, Y).params, carried=held), BATCH.outer)

    held = y[1] | {"key": Y.carried["key"]}
    step = 1e-4
    slope = jax.jit(lambda: (params_alone(X + step) - params_alone(X - step)) / (2 * step))()
    np.testing.assert_allclose(grad, slope, rtol=1e-5)


def test_a_solve_inside_a_loss_is_differentiated_in_params_and_twice():
    solve = bx.differentiable(bx.inner.reverse(model_loss, MOMENTUM, STEPS))

    def value(x, params, mean):
        y = Y._replace(params=params, carried=Y.carried | {"mean": mean})
        y = solve(x, solve(x, y, BATCH.inner), BATCH.inner)
        return evaluation_loss(x, y, BATCH.outer)

    def value_by_hand(x, params):
        return evaluation_loss(x, descend(x, descend(x, Y._replace(params=params))), BATCH.outer)

    *got, mean_bar = jax.jit(jax.grad(value, (0, 1, 2)))(X, Y.params, Y.carried["mean"])
    close(tuple(got), jax.jit(jax.grad(value_by_hand, (0, 1)))(X, Y.params), rtol=1e-12)
    assert mean_bar == 0


# Hypergradients of their own


MULTIPLIER = 7.0


def penalty_by_hand(x, y, steps=3):
    def penalized(x, y, batch):
        value, carried = model_loss(x, y, BATCH.inner)
        return value + evaluation_loss(x, y, BATCH.outer) / MULTIPLIER, carried

    below, above = (descend(x, y, optax.sgd(0.1), steps, loss=loss) for loss in (model_loss, penalized))
    direct = jax.grad(evaluation_loss)(x, above, BATCH.outer)
    slope_above, slope_below = (jax.grad(model_loss, has_aux=True)(x, y, BATCH.inner)[0] for y in (above, below))
    return direct + MULTIPLIER * (slope_above - slope_below), below, above


def test_a_penalty_carries_for_each_of_its_two_problems():
    problem = bx.BilevelProblem(evaluation_loss, model_loss)
    hypergrad = bx.penalty(problem, optax.sgd(0.1), 3, multiplier=MULTIPLIER)
    run = jax.jit(lambda: hypergrad.estimate(KEY, hypergrad.init(X, Y), X, BATCH))
    grad, state, info = run()
    expected, below, above = jax.jit(penalty_by_hand)(X, Y)
    close((grad, raw(state.y), raw(state.penalized)), (expected, raw(below), raw(above)), rtol=1e-12)
    assert raw(above)[1]["mean"] != raw(below)[1]["mean"]
    assert not info.inner.breakdown


def test_two_phases_hand_over_what_is_carried():
    first = bx.hypergradient(evaluation_loss, bx.inner.no_gradient(model_loss, MOMENTUM, STEPS))
    second = bx.hypergradient(evaluation_loss, SOLVERS["reverse"])

    @jax.jit
    def run():
        found = []
        for hypergrad in (bx.two_phase(1, first, second), second):
            state = hypergrad.init(X, Y)
            for _ in range(2):
                grad, state, _ = hypergrad.estimate(KEY, state, X, BATCH)
            found.append((grad, raw(state.y)))
        return found

    got, expected = run()
    close(got, expected, rtol=1e-12)
    assert got[1][1]["count"] == 2 + 2 * STEPS


def test_where_all_is_a_black_box_the_statistics_move_too():
    hypergrad = bx.hypergradients.full_zeroth_order(evaluation_loss, own_loop, directions=1, mu=1e-4, sampler=EXACT)

    @jax.jit
    def run():
        grad, state, _ = hypergrad.estimate(KEY, hypergrad.init(X, Y), X, BATCH)
        ahead, behind = (evaluation_loss(x, descend(x, Y), BATCH.outer) for x in (X + 1e-4, X - 1e-4))
        return grad, raw(state.y), (ahead - behind) / 2e-4

    grad, y, expected = run()
    np.testing.assert_allclose(grad, expected, rtol=1e-6)
    close(y, by_hand()[1], rtol=1e-12)


# The implicit rule, whose inner problem is that of the params with the statistics of y_T


A, C = jnp.diag(jnp.asarray([1.0, 2.0, 4.0])), jnp.asarray([0.3, -1.0, 0.5])


def quadratic(x, y, batch):
    value = 0.5 * y.params @ A @ y.params - (x * C + y.carried["mean"]) @ y.params
    return value, {"mean": 0.5 * y.carried["mean"] + 0.5 * y.params, "count": y.carried["count"] + 1}


def squares(x, y, batch):
    return jnp.sum((y.params + 2 * y.carried["mean"]) ** 2)


QUADRATIC_Y = Carried(jnp.ones(3), {"mean": jnp.asarray([0.2, 0.1, -0.4]), "count": 0})


def three_steps(x, y, batch):
    for _ in range(3):
        mean = y.carried["mean"]
        moved = y.params - 0.2 * (A @ y.params - x * C - mean)
        y = Carried(moved, {"mean": 0.5 * mean + 0.5 * y.params, "count": y.carried["count"] + 1})
    return y


IHVPS = {"exact": bx.ihvp.exact(), "cg": bx.ihvp.cg(), "neumann": bx.ihvp.neumann(terms=300, step_size=0.2)}


@pytest.mark.parametrize(
    ("steps", "solver"),
    [
        *((3, bx.inner.implicit(quadratic, optax.sgd(0.2), 3, ihvp=ihvp)) for ihvp in IHVPS.values()),
        (0, bx.inner.implicit(quadratic, ihvp=bx.ihvp.exact())),
        (3, bx.inner.implicit(quadratic, solve=three_steps, ihvp=bx.ihvp.exact())),
    ],
)
def test_the_implicit_rule_holds_the_statistics(steps, solver):
    @jax.jit
    def run():
        hypergrad = bx.hypergradient(squares, solver)
        grad, state, info = hypergrad.estimate(None, hypergrad.init(X, QUADRATIC_Y), X, bx.Batch(None, None))
        return grad, state, info, three_steps(X, QUADRATIC_Y, None) if steps else QUADRATIC_Y

    grad, state, info, y = run()
    close(state.y, y)
    b = 2 * (y.params + 2 * y.carried["mean"])
    np.testing.assert_allclose(grad, C @ jnp.linalg.solve(A, b), rtol=1e-6)
    np.testing.assert_allclose(info.inner.gradient_norm, jnp.linalg.norm(A @ y.params - X * C - y.carried["mean"]))
    assert state.solver.v.shape == (3,)


# What is refused


def scalar_alone(x, y, batch):
    return jnp.sum(y.params**2)


def other_structure(x, y, batch):
    return jnp.sum(y.params**2), {"mean": y.carried["mean"]}


def other_dtype(x, y, batch):
    return jnp.sum(y.params**2), y.carried | {"count": 1.0}


def a_pair(x, y, batch):
    return jnp.sum(y**2), jnp.sum(y)


@pytest.mark.parametrize(
    ("loss", "y", "message"),
    [
        (
            scalar_alone,
            QUADRATIC_Y,
            r"inner_loss must return \(value, new carried\) where y is a bx.inner.Carried; got ",
        ),
        (other_structure, QUADRATIC_Y, r"carried of inner_loss must keep its structure and shapes; .*second part"),
        (
            other_dtype,
            QUADRATIC_Y,
            r"carried of inner_loss must keep its dtypes; got float64 at \['count'\], expected int",
        ),
        (
            a_pair,
            jnp.ones(3),
            r"inner_loss must return one .* number; got tuple. .* where y is a bx.inner.Carried\(params, ",
        ),
        (quadratic, Carried({}, 1.0), r"y.params must hold at least one floating-point array; got an empty"),
        (quadratic, Carried(1, 1.0), r"y.params must hold floating-point arrays only; got int"),
    ],
)
@pytest.mark.parametrize("make", [lambda loss: bx.inner.reverse(loss, optax.sgd(0.1), 1), bx.inner.implicit])
def test_a_wrong_loss_or_y_is_told_what_is_missing(loss, y, message, make):
    hypergrad = bx.hypergradient(squares, make(loss))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: hypergrad.estimate(KEY, hypergrad.init(X, y), X, bx.Batch(None, None))[0])


def test_a_solve_or_initial_that_forgets_what_is_carried_is_refused():
    forgetful = bx.inner.implicit(quadratic, solve=lambda x, y, batch: y.params)
    alone = bx.inner.reverse(quadratic, optax.sgd(0.1), 1, initial=lambda x: x * jnp.ones(3))
    for solver, message in (
        (forgetful, "Return from solve.* bx.inner.Carried"),
        (alone, "from initial.* bx.inner.Carried"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(bx.differentiable(solver), X, QUADRATIC_Y, None)


def test_a_solve_by_the_implicit_rule_is_differentiated_in_both_modes():
    solve = bx.differentiable(bx.inner.implicit(quadratic, solve=three_steps, ihvp=bx.ihvp.exact()))

    def value(x):
        return squares(x, solve(x, QUADRATIC_Y, None), None)

    grad, slope, second, y = jax.jit(
        lambda: (
            jax.grad(value)(X),
            jax.jvp(value, (X,), (1.0,))[1],
            jax.hessian(value)(X),
            three_steps(X, QUADRATIC_Y, None),
        )
    )()
    y_dot = jnp.linalg.solve(A, C)
    np.testing.assert_allclose((grad, slope), 2 * y_dot @ (y.params + 2 * y.carried["mean"]), rtol=1e-10)
    np.testing.assert_allclose(second, 2 * y_dot @ y_dot, rtol=1e-10)


def test_the_doctor_holds_what_is_carried():
    """As in a batch norm, f reads the statistics, and g does not."""

    def inner_loss(x, y, batch):
        value = 0.5 * y.params @ A @ y.params - x * C @ y.params
        return value, {"mean": 0.5 * y.carried["mean"] + 0.5 * y.params, "count": y.carried["count"] + 1}

    problem = bx.BilevelProblem(squares, inner_loss)
    for solver, verdict in (
        (bx.inner.reverse(inner_loss, optax.sgd(0.2), 200), "the hypergradient is right to 0.01"),
        (bx.inner.implicit(inner_loss, optax.sgd(0.2), 3, ihvp=bx.ihvp.exact()), "the inner problem is not solved"),
    ):
        hypergrad = bx.hypergradient(squares, solver)
        report = bx.check_hypergradient(problem, X, QUADRATIC_Y, bx.Batch(None, None), hypergrad)
        assert report.verdict == verdict, report


# Equations, whose step or residual may carry too


def contraction(x, y, batch):
    return Carried(0.5 * jnp.cos(y.params) + x * y.carried["mean"], y.carried | {"count": y.carried["count"] + 1})


def equation(x, y, batch):
    return y.params - 0.5 * jnp.cos(y.params) - x * y.carried["mean"]


def newton(x, y, batch):
    params = y.params
    for _ in range(8):
        params = params - equation(x, y._replace(params=params), batch) / (1 + 0.5 * jnp.sin(params))
    return Carried(params, y.carried | {"count": y.carried["count"] + 8})


@pytest.mark.parametrize(
    ("solver", "evaluations"),
    [(bx.inner.fixed_point(contraction, tol=1e-13, inner_loss=quadratic), None), (bx.inner.root(equation, newton), 8)],
)
def test_equations_hold_what_is_carried(solver, evaluations):
    hypergrad = bx.hypergradient(squares, solver)
    run = jax.jit(lambda: hypergrad.estimate(None, hypergrad.init(X, QUADRATIC_Y), X, bx.Batch(None, None)))
    grad, state, info = run()
    mean, y = QUADRATIC_Y.carried["mean"], state.y.params
    np.testing.assert_allclose(y, 0.5 * jnp.cos(y) + X * mean, rtol=1e-10)
    np.testing.assert_allclose(grad, jnp.sum(2 * (y + 2 * mean) * mean / (1 + 0.5 * jnp.sin(y))), rtol=1e-6)
    assert state.y.carried["count"] == (evaluations or info.inner.detail.iterations + 1)


# Curvature of a model with batch norm, at the params with the statistics of the last step


def test_kronecker_factors_hold_the_statistics():
    ihvp = bx.ihvp.kfac(fisher=bx.curvature.fisher.exact, ema=0.9)
    train, evaluate, y = of_nnx()
    outer_loss, _ = losses(train, evaluate)
    parts = bx.curvature.squared_error, lambda x, batch: batch
    carrying = bx.curvature.ModelLoss(train, *parts, l2=jnp.exp)

    def estimate(loss, solver, y):
        hypergrad = bx.hypergradient(loss, solver)
        grad, state, info = hypergrad.estimate(KEY, hypergrad.init(X, y, BATCH), X, BATCH)
        return grad, state, info.inner.inner_loss

    @jax.jit
    def run():
        solver = bx.inner.implicit(carrying, optax.sgd(0.1), 3, ihvp=ihvp)
        grad, state, value = estimate(outer_loss, solver, y)

        def at(params):
            return Carried(params, jax.tree.map(jnp.copy, state.y.carried))

        alone = bx.curvature.ModelLoss(lambda params, inputs: train(at(params), inputs)[0], *parts, l2=jnp.exp)
        alone = bx.inner.implicit(alone, ihvp=ihvp)
        expected = estimate(lambda x, params, batch: outer_loss(x, at(params), batch), alone, state.y.params)
        return (grad, value), (expected[0], expected[2]), state

    got, expected, state = run()
    close(got, expected, rtol=1e-8)
    described = bx.curvature.describe(carrying, X, state.y, BATCH.inner)
    assert {row.rule for row in described.rows} == {"dense", "elementwise"}

"""What every inverse-Hessian-vector product and every inner solver keeps, whatever it computes.

A new method enters `IHVPS` or `SOLVERS` by one line, and every contract below then holds it to account.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevax as bx
from bilevax.testing import executed_dots

STEPS = 4
FULL = bx.inner.full
KEY = jax.random.key(0)
GMRES = lineax.GMRES(rtol=1e-12, atol=1e-12)


class Method(NamedTuple):
    """An IHVP as a function of its one number (scale, step size or damping), and the number that inverts H = 2 I."""

    make: Callable
    exact_number: float


def as_model(loss, x, y):
    """Any convex loss as a `ModelLoss`: the model hands out y itself, and the output loss is all the rest."""
    flat, unravel = ravel_pytree(y)

    def model(y, ones):
        parts = [
            leaf.reshape(1, -1).astype(flat.dtype) * ones.astype(flat.dtype)
            for leaf in map(jnp.asarray, jax.tree.leaves(y))
        ]
        return jnp.concatenate(parts, axis=1)

    output_loss = bx.curvature.convex(lambda outputs, batch: loss(x, unravel(outputs[0]), batch)[None])
    return bx.curvature.ModelLoss(model, output_loss, lambda x, batch: (jnp.ones((1, 1)), batch))


def kronecker(make):
    """An IHVP that needs structure, on losses that have none."""

    def prepare(key, state, loss, point):
        return make.prepare(key, state, as_model(loss, *point[:2]), point)

    return bx.IHVP(make.init, prepare, make.linear)


def kfac(number, sample):
    return kronecker(bx.ihvp.kfac(number, fisher=bx.curvature.fisher.exact, sample=sample))


def ekfac(number, sample):
    return kronecker(bx.ihvp.ekfac(number, fisher=bx.curvature.fisher.exact, sample=sample))


def rescaled(number, sample):
    return bx.ihvp.rescaled(bx.ihvp.identity(), number, bx.curvature.hessian, sample)


def preconditioned_cg(number, sample):
    preconditioner = bx.ihvp.neumann(1, 0.2, sample=sample)
    return bx.ihvp.cg(3, damping=number, preconditioner=preconditioner, sample=sample)


IHVPS = {
    "identity": Method(lambda number, sample: bx.ihvp.identity(number), 0.5),
    "exact": Method(lambda number, sample: bx.ihvp.exact(number, sample), 0.0),
    "neumann": Method(lambda number, sample: bx.ihvp.neumann(3, number, sample=sample), 0.5),
    "cg": Method(lambda number, sample: bx.ihvp.cg(3, damping=number, sample=sample), 0.0),
    "cg_preconditioned": Method(preconditioned_cg, 0.0),
    "kfac": Method(kfac, 0.0),
    "ekfac": Method(ekfac, 0.0),
    "diagonal": Method(lambda number, sample: bx.ihvp.diagonal(number, sample=sample), 0.5),
    "random_neumann": Method(lambda number, sample: bx.ihvp.random_neumann(1, number, sample), 0.5),  # p = 0
    "rescaled": Method(rescaled, 0.0),
    "nystrom": Method(lambda number, sample: bx.ihvp.nystrom(3, number, sample=sample), 0.0),
    "sgd": Method(lambda number, sample: bx.ihvp.sgd(3, number, sample), 0.5),
    "linear": Method(lambda number, sample: bx.ihvp.linear(GMRES, number, sample=sample), 0.0),
}


def implicit(ihvp, steps=STEPS, number=None):
    make, exact_number = IHVPS[ihvp]
    return lambda loss, optimizer, sample: bx.inner.implicit(
        loss,
        optimizer,
        steps,
        make(exact_number if number is None else number, sample),
        sample=sample,
        cross_sample=sample,
    )


def solved(loss, optimizer, sample):
    """The user's own solver, here one plain gradient step on all of the data."""

    def solve(x, y, batch):
        return optax.tree.add_scale(y, -0.5, jax.grad(loss, 1)(x, y, batch))

    return bx.inner.implicit(loss, ihvp=bx.ihvp.exact(0.0, sample), solve=solve, cross_sample=sample)


def reverse(steps=STEPS, **options):
    return lambda loss, optimizer, sample: bx.inner.reverse(loss, optimizer, steps, sample=sample, **options)


def no_gradient(steps=STEPS):
    return lambda loss, optimizer, sample: bx.inner.no_gradient(loss, optimizer, steps, sample=sample)


def chain(first, last):
    return lambda *parts: bx.inner.chain(first(*parts), last(*parts))


def _all_coordinates(key, like, number):
    """√b times the unit vectors, and zero beyond them: exact for every x of at most b entries."""
    flat, unravel = ravel_pytree(like)
    rows = jnp.sqrt(jnp.asarray(number, flat.dtype)) * jnp.eye(number, flat.size, dtype=flat.dtype)
    return lambda i: unravel(rows[i])


EXACT = bx.random_directions.Sampler(_all_coordinates, lambda size, number: 0.0)
MOST = 10  # entries of the x below


def forward_gradient(steps=STEPS):
    return lambda loss, optimizer, sample: bx.inner.forward_gradient(
        loss, optimizer, steps, MOST, sampler=EXACT, sample=sample
    )


def guided(loss, optimizer, sample):
    guide = bx.guides.at_solution(implicit("cg", steps=0)(loss, optimizer, sample))
    return bx.inner.forward_gradient(loss, optimizer, STEPS, MOST + 1, sampler=EXACT, sample=sample, guide=guide)


def shifted(loss, optimizer, sample):
    truncated = chain(no_gradient(STEPS - 1), reverse(1))(loss, optimizer, sample)
    shift = bx.guides.from_start(truncated)
    return bx.inner.forward_gradient(loss, optimizer, STEPS, MOST, sampler=EXACT, sample=sample, control_variate=shift)


def unrolled(loss, optimizer, sample):
    """The steps as a black box: differences of any length are exact where it is linear in x."""
    steps = bx.inner.no_gradient(loss, optimizer, STEPS, sample=sample)
    return lambda x, y, batch: steps.forward(KEY, (), x, steps.start(x, y), batch)[0].y


def zeroth_order(loss, optimizer, sample):
    solve, central = unrolled(loss, optimizer, sample), bx.inner.central
    report = last(loss, sample)
    return bx.inner.zeroth_order(solve, MOST, 1.0, difference=central, sampler=EXACT, inner_loss=report)


def last(loss, sample):
    """The loss on the batch of the last step, for a report."""
    return lambda x, y, batch: loss(x, y, sample(KEY, STEPS - 1, batch))


SOLVERS = {
    **{f"implicit_{ihvp}": implicit(ihvp) for ihvp in IHVPS},
    "implicit_no_steps": implicit("exact", steps=0),
    "implicit_solve": solved,
    "reverse": reverse(),
    "reverse_two_level": reverse(checkpoint=bx.inner.two_level),
    "reverse_store_all": reverse(checkpoint=bx.inner.store_all),
    "reverse_store_products": reverse(checkpoint=bx.inner.store_products()),
    "no_gradient": no_gradient(),
    "chain_no_gradient_reverse": chain(no_gradient(2), reverse(2)),
    "chain_reverse_reverse": chain(reverse(2), reverse(2)),
    "chain_implicit_reverse": chain(implicit("cg", 2), reverse(2)),
    "chain_reverse_implicit": chain(reverse(2), implicit("cg", 2)),
    "forward_gradient": forward_gradient(),
    "forward_gradient_guide": guided,
    "forward_gradient_control_variate": shifted,
    "chain_forward_gradient_reverse": chain(forward_gradient(2), reverse(2)),
    "zeroth_order": zeroth_order,
}
OWN_SOLUTION = ("implicit_no_steps", "implicit_solve")


def of_solver(name):
    return lambda outer, inner, optimizer, sample: bx.hypergradient(outer, SOLVERS[name](inner, optimizer, sample))


def two_phase(switch_at):
    def make(*parts):
        return bx.two_phase(switch_at, of_solver("implicit_cg")(*parts), of_solver("reverse")(*parts))

    return make


def penalty(outer, inner, optimizer, sample):
    return bx.penalty(outer, inner, optimizer, STEPS, 10.0, sample=sample, cross_sample=sample)


def full_zeroth_order(outer, inner, optimizer, sample):
    return bx.full_zeroth_order(outer, unrolled(inner, optimizer, sample), MOST, 1.0, sampler=EXACT)


ESTIMATORS = {
    **{name: of_solver(name) for name in SOLVERS},
    "two_phase_second": two_phase(0),
    "two_phase": two_phase(3),
    "penalty": penalty,
    "full_zeroth_order": full_zeroth_order,
}


def active(info):
    """The `HypergradientInfo` of an estimate; of the estimator that ran, in two phases."""
    if isinstance(info, bx.TwoPhaseInfo):
        return info.second if info.phase else info.first
    return info


def over(names, without=()):
    return pytest.mark.parametrize("name", [name for name in names if name not in without])


# The problem: it takes any pytrees x and y.


def inner_loss(x, y, batch):
    """Hessian diag(2 − 0.1 cos y), coupled to every leaf of x."""
    target = sum(jnp.tanh(leaf).mean() for leaf in jax.tree.leaves(x)) * batch.mean()
    return sum(jnp.sum((leaf - target) ** 2 + 0.1 * jnp.cos(leaf)) for leaf in jax.tree.leaves(y))


def outer_loss(x, y, batch):
    fit = sum(jnp.sum(jnp.sin(leaf - batch.mean())) for leaf in jax.tree.leaves(y))
    return fit + 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))


def make_batch(dtype=None):
    rows = jnp.linspace(0.5, 1.5, 8, dtype=dtype)
    return bx.Batch(outer=rows, inner=rows)


def array_point(dtype=None):
    return jnp.linspace(-1, 2, 3, dtype=dtype), jnp.linspace(0, 1, 4, dtype=dtype)


def dict_point(dtype=None):
    x, y = array_point(dtype)
    return {"a": x, "b": jnp.array(0.7, dtype)}, {"a": y, "b": jnp.array(0.3, dtype)}


def nested_point():
    x = {"layers": [{"w": jnp.full((2, 3), 0.3), "b": jnp.zeros(3)}, ()], "rate": jnp.array(-2.0), "none": None}
    return x, (x["layers"], {"head": jnp.ones((1, 1, 2))})


def mixed_point():
    types = {"half": jnp.bfloat16, "single": jnp.float32, "double": jnp.float64}
    return tuple({name: jnp.full(size, 0.5, dtype) for name, dtype in types.items()} for size in (2, 3))


def linen_point():
    return {"rate": jnp.array(0.5)}, flax.linen.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))


def nnx_point():
    _, parameters = flax.nnx.split(flax.nnx.Linear(3, 2, rngs=flax.nnx.Rngs(0)))
    return parameters, parameters


POINTS = {
    "array": array_point,
    "dict": dict_point,
    "tuple": lambda: ((jnp.ones(2), jnp.array(0.1)), (jnp.zeros((2, 2)),)),
    "nested": nested_point,
    "scalar": lambda: (jnp.array(0.5), jnp.array(-1.2)),
    "python_float": lambda: (0.5, -1.2),
    "bfloat16": lambda: dict_point(jnp.bfloat16),
    "mixed": mixed_point,
    "linen": linen_point,
    "nnx": nnx_point,
}
over_points = pytest.mark.parametrize("point", POINTS)


def make_estimator(name, sample=FULL, loss=inner_loss):
    return ESTIMATORS[name](outer_loss, loss, optax.sgd(0.1), sample)


@functools.cache
def jitted(name):
    """`estimate` with full batches, compiled once for the many tests at `array_point`, and its list of traces."""
    traces = []

    def loss(x, y, batch):
        traces.append(None)
        return inner_loss(x, y, batch)

    return jax.jit(make_estimator(name, loss=loss).estimate), traces


def spec(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def all_finite(tree):
    return all(np.isfinite(np.asarray(leaf, float)).all() for leaf in jax.tree.leaves(tree))


def assert_close(got, expected, rtol=1e-12):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), got, expected)


# Signatures, pytrees, dtypes.


@over_points
@over(IHVPS)
def test_ihvp_returns_v_like_b(name, point):
    x, y = POINTS[point]()
    make, number = IHVPS[name]
    ihvp = make(number, FULL)
    assert isinstance(ihvp, bx.IHVP)
    assert isinstance(ihvp.linear, bool)

    def solve(state, x, y, b):
        apply, state = ihvp.prepare(jax.random.key(0), state, inner_loss, (x, y, make_batch().inner))
        cold, info = apply(b)
        return cold, info, apply(b, v0=cold), state

    state = ihvp.init(x, y)
    cold, info, (warm, warm_info), new_state = jax.eval_shape(solve, state, x, y, y)
    assert spec(cold) == spec(warm) == spec(y)
    assert spec(new_state) == spec(state)
    assert isinstance(info, bx.IHVPInfo)
    assert spec(info) == spec(warm_info)
    assert all(jnp.ndim(entry) == 0 for entry in info)
    assert info.breakdown.dtype == bool


@over_points
@over(ESTIMATORS)
def test_estimate_returns_a_gradient_like_x(name, point):
    x, y = POINTS[point]()
    hypergrad = make_estimator(name)
    assert isinstance(hypergrad, bx.Hypergradient)
    state = hypergrad.init(x, y)
    grad, new_state, info = jax.eval_shape(hypergrad.estimate, KEY, state, x, make_batch())
    assert spec(grad) == spec(x)
    assert spec(new_state) == spec(state)
    assert spec(new_state.y) == spec(y)
    for part in (info.first, info.second) if isinstance(info, bx.TwoPhaseInfo) else (info,):
        assert isinstance(part, bx.HypergradientInfo)
        assert isinstance(part.inner, bx.SolverInfo)
        assert isinstance(part.inner.calls, bx.Calls)
    assert all(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves(info))


@over(SOLVERS)
def test_forward_and_backward_return_what_the_noun_says(name):
    x, y = dict_point()
    solver = SOLVERS[name](inner_loss, optax.sgd(0.1), FULL)

    def run(state, x, y):
        z = solver.start(x, y)
        z_T, residual, state = solver.forward(KEY, state, x, z, make_batch().inner)
        return z, z_T, solver.backward(residual, state, bx.Iterate(z_T.y))

    state = solver.init(x, y)
    z, z_T, ((x_bar, z0_bar), new_state, info) = jax.eval_shape(run, state, x, y)
    assert isinstance(z, bx.Iterate)
    assert isinstance(z0_bar, bx.Iterate)
    assert isinstance(info, bx.SolverInfo)
    assert spec(z.y) == spec(y)
    assert spec(z_T) == spec(z)
    assert spec(x_bar) == spec(x)
    assert spec(z0_bar.y) == spec(y)
    assert spec(new_state) == spec(state)


@over(IHVPS)
def test_v_in_bfloat16_is_near_that_in_float32(name):
    make, number = IHVPS[name]
    ihvp = make(number, FULL)

    def solve(dtype):
        x, y = dict_point(dtype)
        apply, _ = ihvp.prepare(KEY, ihvp.init(x, y), inner_loss, (x, y, make_batch(dtype).inner))
        return apply(jax.tree.map(jnp.cos, y))

    (single, _), (half, info) = (jax.jit(functools.partial(solve, dtype))() for dtype in (jnp.float32, jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.bfloat16.dtype}
    assert not info.breakdown or name == "linear"  # which says that it missed its own tolerance of 1e-12
    assert_close(optax.tree.cast(half, jnp.float32), single, rtol=0.02)


@over(ESTIMATORS, without=["full_zeroth_order"])  # differences of bfloat16 losses have no digits left
def test_bfloat16_is_near_double_precision(name):
    def estimate(function, dtype):
        x, y = array_point(dtype)
        grad, state, info = function(KEY, make_estimator(name).init(x, y), x, make_batch(dtype))
        assert {leaf.dtype for leaf in (grad, state.y)} == {jnp.dtype(dtype)}
        inner = active(info).inner
        assert all_finite((grad, state, active(info).outer_loss, inner.inner_loss, inner.gradient_norm))
        return optax.tree.cast((grad, state.y), jnp.float64)

    half = estimate(jax.jit(make_estimator(name).estimate), jnp.bfloat16)
    assert_close(half, estimate(jitted(name)[0], jnp.float64), rtol=0.03)


@over(ESTIMATORS)
def test_single_precision_stays_single(name):
    with jax.enable_x64(False):
        x, y = dict_point()
        hypergrad = make_estimator(name)
        state = hypergrad.init(x, y)
        grad, new_state, info = jax.eval_shape(hypergrad.estimate, KEY, state, x, make_batch())
        assert spec(grad) == spec(x)
        assert spec(new_state) == spec(state)
        assert {leaf.dtype.name for leaf in jax.tree.leaves((grad, state.y))} == {"float32"}
        assert not any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(info))


def test_flax_models():
    """A linen model, an nnx model and a plain matrix product with the same weights have one hypergradient."""
    inputs, targets = jnp.linspace(-1, 1, 12).reshape(4, 3), jnp.linspace(0, 1, 8).reshape(4, 2)
    linen, linen_y = flax.linen.Dense(2), linen_point()[1]
    weights = linen_y["params"]
    graph, nnx_y = flax.nnx.split(flax.nnx.Linear(3, 2, rngs=flax.nnx.Rngs(0)))
    nnx_y.kernel.set_value(weights["kernel"])
    nnx_y.bias.set_value(weights["bias"])
    models = {
        "plain": (lambda y: inputs @ y["kernel"] + y["bias"][None, :], weights),
        "linen": (lambda y: linen.apply(y, inputs), linen_y),
        "nnx": (lambda y: flax.nnx.merge(graph, y)(inputs), nnx_y),
    }

    def estimate(predict, y):
        fit = lambda y: jnp.mean((predict(y) - targets) ** 2)  # noqa: E731
        ridge = lambda x, y, batch: fit(y) + jnp.exp(x["log_l2"]) * optax.tree.norm(y, squared=True)  # noqa: E731
        solver = SOLVERS["chain_implicit_reverse"](ridge, optax.sgd(0.1), FULL)
        hypergrad = bx.hypergradient(lambda x, y, batch: fit(y), solver)
        x = {"log_l2": jnp.array(-1.0)}
        grad, state, _ = jax.jit(hypergrad.estimate)(KEY, hypergrad.init(x, y), x, bx.Batch(None, None))
        assert spec(state.y) == spec(y)
        return grad

    grads = {name: estimate(*model) for name, model in models.items()}
    assert grads["plain"]["log_l2"] != 0
    assert_close(grads["linen"], grads["plain"])
    assert_close(grads["nnx"], grads["plain"])


# Transformations of JAX.


@over(ESTIMATORS)
def test_jit_equals_eager(name):
    """Python floats included, which jit turns into arrays."""
    hypergrad = make_estimator(name)
    x, y = 0.5, {"a": jnp.linspace(0, 1, 4), "b": -1.2}
    arguments = (KEY, hypergrad.init(x, y), x, make_batch())
    eager = hypergrad.estimate(*arguments)
    assert_close(eager, jax.jit(hypergrad.estimate)(*arguments))
    assert spec(eager[:2]) == spec((x, arguments[1]))


def test_solve_may_return_the_python_float_that_it_got():
    solver = bx.inner.implicit(inner_loss, solve=lambda x, y, batch: y)
    hypergrad = bx.hypergradient(outer_loss, solver)
    state = hypergrad.init(0.5, -1.2)
    assert hypergrad.estimate(KEY, state, 0.5, make_batch())[1].y == -1.2


@over(ESTIMATORS)
def test_ten_steps_are_traced_once_and_equal_a_scan(name):
    hypergrad = make_estimator(name)
    estimate, traces = jitted(name)
    x, y = array_point()

    def step(estimate, carry):
        x, state = carry
        grad, state, info = estimate(KEY, state, x, make_batch())
        return (x - 0.1 * grad, state), info

    carry, traced = (x, hypergrad.init(x, y)), []
    for _ in range(10):
        carry, info = step(estimate, carry)
        traced.append(len(traces))
    assert traced[0] > 0
    assert traced == traced[:1] * 10
    scanned, infos = jax.lax.scan(
        lambda carry, _: step(hypergrad.estimate, carry), (x, hypergrad.init(x, y)), length=10
    )
    assert_close(scanned, carry, rtol=1e-10)
    last = active(jax.tree.map(lambda leaf: leaf[-1], infos))
    assert_close(last.outer_loss, active(info).outer_loss, rtol=1e-10)


@over(ESTIMATORS)
def test_weakly_typed_scalars_are_traced_once(name):
    hypergrad = make_estimator(name)
    x, y = jnp.asarray(0.5), jnp.asarray(-1.2)
    state = hypergrad.init(x, y)
    _, new_state, _ = jax.eval_shape(hypergrad.estimate, KEY, state, x, make_batch())
    weak = [[jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(tree)] for tree in (state, new_state)]
    assert weak[0] == weak[1]


@over(ESTIMATORS)
def test_vmap_over_points_and_tasks_equals_a_loop(name):
    """Both for `estimate` and for the gradient of `differentiable`, which is the first estimate from cold."""
    hypergrad = make_estimator(name)
    solve = bx.differentiable(SOLVERS[name](inner_loss, optax.sgd(0.1), FULL)) if name in SOLVERS else None
    x, y = array_point()
    steps = jnp.arange(3.0)[:, None]
    stacked = x[None, :] + steps / 10, y[None, :] - steps, jnp.linspace(0, 3, 24).reshape(3, 8)

    def estimate(function, x, y, task):
        return function(KEY, hypergrad.init(x, y), x, bx.Batch(task, task))

    def meta_gradient(x, y, task):
        return jax.grad(lambda x: outer_loss(x, solve(x, y, task, KEY), task))(x)

    @jax.jit
    def together(*stacked):
        estimates = jax.vmap(functools.partial(estimate, hypergrad.estimate))(*stacked)
        return estimates, jax.vmap(meta_gradient)(*stacked) if solve else estimates[0]

    one_by_one = [estimate(jitted(name)[0], *(part[i] for part in stacked)) for i in range(3)]
    one_by_one = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    estimates, meta_gradients = together(*stacked)
    assert_close(estimates, one_by_one, rtol=1e-10)
    assert_close(meta_gradients, one_by_one[0], rtol=1e-10)


def first_gradient(solver):
    x, y = array_point()
    hypergrad = bx.hypergradient(outer_loss, solver)
    return hypergrad.estimate(KEY, hypergrad.init(x, y), x, make_batch())[0]


def differentiable_gradient(solver):
    x, y = array_point()
    rows = make_batch().inner
    solve = bx.differentiable(solver)
    return jax.grad(lambda x: outer_loss(x, solve(x, y, rows, KEY), rows))(x)


def check_traced_number(make, numbers, expected):
    """`make(number)` is one program for all numbers, one at a time or all at once, and equal to the concrete one."""
    traces = []

    @jax.jit
    def gradient(number):
        traces.append(None)
        return differentiable_gradient(make(number))

    each = jnp.stack([gradient(number) for number in numbers])
    assert len(traces) == 1
    assert not np.allclose(each[0], each[1], rtol=1e-3)
    assert_close(each[0], expected)
    assert_close(jax.jit(jax.vmap(lambda number: first_gradient(make(number))))(jnp.array(numbers)), each)


@over(IHVPS)
def test_ihvp_may_be_constructed_of_a_traced_number(name):
    def make(number):
        return implicit(name, number=number)(inner_loss, optax.sgd(0.1), FULL)

    numbers = [IHVPS[name].exact_number + 0.1, IHVPS[name].exact_number + 0.3]
    check_traced_number(make, numbers, jax.jit(lambda: first_gradient(make(numbers[0])))())


@over(SOLVERS, without=(*OWN_SOLUTION, "no_gradient"))
def test_solver_may_be_constructed_of_a_traced_learning_rate(name):
    x, y = array_point()
    expected, _, _ = jitted(name)[0](KEY, make_estimator(name).init(x, y), x, make_batch())
    check_traced_number(lambda rate: SOLVERS[name](inner_loss, optax.sgd(rate), FULL), [0.1, 0.05], expected)


# Numbers that every method shares.


@over(ESTIMATORS, without=["penalty", "implicit_diagonal"])  # biased everywhere; without curvature where ∇g = 0
def test_fixed_point(name):
    """At y = y*(x) with H = 2 I every method is exact: f = ½‖y − b‖² + ½‖x‖², g = ‖y − M x‖²."""
    M, b, x = jnp.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]]), jnp.array([1.0, 2.0, 3.0]), jnp.array([0.7, -0.4])
    hypergrad = ESTIMATORS[name](
        lambda x, y, b: 0.5 * jnp.sum((y - b) ** 2) + 0.5 * jnp.sum(x**2),
        lambda x, y, M: jnp.sum((y - M @ x) ** 2),
        optax.sgd(0.5),
        FULL,
    )
    grad, state, info = jax.jit(hypergrad.estimate)(KEY, hypergrad.init(x, M @ x), x, bx.Batch(b, M))
    indirect = 0 if name == "no_gradient" else M.T @ (M @ x - b)
    assert_close(grad, indirect + x)
    assert_close(state.y, M @ x)
    assert name == "full_zeroth_order" or active(info).inner.gradient_norm < 1e-12  # which knows no g


@over([name for name, method in IHVPS.items() if method.make(method.exact_number, FULL).linear])
def test_linear_means_linear_symmetric_and_positive_definite(name):
    q, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (4, 4)))
    h = (q * jnp.array([0.3, 0.8, 1.1, 1.9])[None, :]) @ q.T
    make, number = IHVPS[name]
    ihvp = make(number, FULL)
    apply, _ = ihvp.prepare(KEY, ihvp.init(0.0, jnp.zeros(4)), lambda x, y, h: 0.5 * y @ h @ y, (0.0, jnp.zeros(4), h))
    apply = jax.jit(apply)
    matrix = jnp.stack([apply(b)[0] for b in jnp.eye(4)], axis=1)
    b = jnp.array([1.0, -20.0, 0.3, 4.0])
    assert_close(apply(b)[0], matrix @ b)
    assert_close(matrix, matrix.T)
    assert jnp.linalg.eigvalsh(matrix)[0] > 0


@over(ESTIMATORS)
def test_nan_is_reported_and_never_hidden(name):
    x, y = array_point()
    rows = make_batch().inner
    spoiled = rows.at[3].set(jnp.nan)
    for outer, inner in ((spoiled, rows), (rows, spoiled)):
        grad, state, info = jitted(name)[0](KEY, make_estimator(name).init(x, y), x, bx.Batch(outer, inner))
        info = active(info)
        reports = [info.outer_loss] if outer is spoiled else [info.inner.inner_loss, info.inner.gradient_norm]
        assert np.isnan(reports).all()
        assert np.isnan(grad).all() or name == "no_gradient"  # whose gradient is that of 0.1 x², whatever y is
        if inner is spoiled and name != "implicit_no_steps":
            assert np.isnan(state.y).all()
        assert info.inner.breakdown


# Samplers.


@over(["implicit_cg", "implicit_no_steps", "reverse", "no_gradient", "chain_reverse_reverse", "penalty"])
def test_minibatches_depend_on_the_key_alone(name):
    hypergrad = make_estimator(name, bx.inner.minibatch(3))
    x, y = array_point()
    estimate = jax.jit(lambda key: hypergrad.estimate(key, hypergrad.init(x, y), x, make_batch()))
    one, again, other = (estimate(jax.random.key(seed)) for seed in (1, 1, 2))
    assert_close(one, again, rtol=0)
    assert one[2].inner.inner_loss != other[2].inner.inner_loss
    assert name in OWN_SOLUTION or not np.allclose(one[1].y, other[1].y, rtol=1e-6)


@over(SOLVERS, without=OWN_SOLUTION)
def test_per_step_equals_a_loop_by_hand(name):
    x, y = array_point()
    data = jnp.linspace(0, 4, STEPS * 8).reshape(STEPS, 8)

    def by_hand(x, y):
        for t in range(STEPS):
            y = y - 0.1 * jax.grad(inner_loss, 1)(x, y, data[t])
        return y

    hypergrad = bx.hypergradient(outer_loss, SOLVERS[name](inner_loss, optax.sgd(0.1), bx.inner.per_step))
    grad, state, info = jax.jit(hypergrad.estimate)(KEY, hypergrad.init(x, y), x, bx.Batch(data[0], data))
    assert_close(state.y, by_hand(x, y))
    assert_close(info.inner.inner_loss, inner_loss(x, state.y, data[-1]))
    if name in ("reverse", "reverse_two_level", "reverse_store_all", "reverse_store_products", "chain_reverse_reverse"):
        assert_close(grad, jax.grad(lambda x: outer_loss(x, by_hand(x, y), data[0]))(x))


# Declared cost = compiled cost.


def costly_inner_loss(x, y, batch):
    """One Aᵀr in each gradient and each Hessian product, which contracts 7; one Bᵀv in each cross product, 11 to 5."""
    A, B = batch
    return jnp.sum(jax.nn.softplus(A @ jnp.tanh(y))) + jnp.sum(y**2) + y @ (B @ x)


def costly_outer_loss(x, y, C):
    """One Cᵀr in each gradient, which contracts 13."""
    return jnp.sum(jax.nn.softplus(C @ (y * jnp.sum(x))))


def cold(outer, inner, optimizer, sample):
    return bx.hypergradient(outer, bx.inner.implicit(inner, optimizer, STEPS, bx.ihvp.cg(3), warm_start=False))


def cg_preconditioned_exact(outer, inner, optimizer, sample):
    ihvp = bx.ihvp.cg(3, preconditioner=bx.ihvp.exact(1.0))
    return bx.hypergradient(outer, bx.inner.implicit(inner, optimizer, STEPS, ihvp))


FACTORED = ("implicit_kfac", "implicit_ekfac")  # their passes are those of the model, not of g
GUIDED = ("forward_gradient_guide", "forward_gradient_control_variate")  # whose second solve the compiler merges
UNCOUNTED = (*FACTORED, *GUIDED, "implicit_linear", "two_phase", "two_phase_second")  # lineax; the counts of the parts
COSTS = {name: make for name, make in ESTIMATORS.items() if name not in UNCOUNTED} | {
    "implicit_cold": cold,
    "implicit_cg_preconditioned_exact": cg_preconditioned_exact,
}


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="reads HLO text as it is printed since jax 0.10")
@over(COSTS)
def test_declared_calls_are_those_that_the_compiled_program_runs(name):
    random = np.random.default_rng(0)
    x, y, A, B, C = (random.normal(size=shape) / 3 for shape in (5, 11, (7, 11), (11, 5), (13, 11)))
    hypergrad = COSTS[name](costly_outer_loss, costly_inner_loss, optax.sgd(0.1), FULL)
    arguments = (KEY, hypergrad.init(x, y), x, bx.Batch(outer=C, inner=(A, B)))
    with jax.default_device(jax.devices("cpu")[0]):
        compiled = jax.jit(hypergrad.estimate).lower(*arguments).compile()
        info = compiled(*arguments)[2].inner
    dots = executed_dots(compiled.as_text(), unknown_trips=3)

    def products(contracted, returned):
        return sum(
            dot.times * math.prod(dot.returned) / returned
            for dot in dots
            if dot.contracted == contracted and returned in dot.returned
        )

    calls, in_solve = info.calls, 1 if name == "implicit_solve" else 0
    x_gradients = 2 if name == "penalty" else 0
    pushed = 0  # cross products in forward mode, of one v for all steps, which the compiler takes out of the loop
    if "zeroth_order" in name:
        in_solve = STEPS * info.detail.solves
    elif "forward_gradient" in name:
        detail, steps = (info.detail[0].detail, 2) if name.startswith("chain") else (info.detail, STEPS)
        pushed = steps * detail.tangents
    assert not info.breakdown
    assert products(13, 11) == calls.outer_gradients
    assert products(7, 11) == calls.inner_gradients + calls.hessian_products + in_solve
    assert products(11, 5) == calls.cross_products - pushed + x_gradients

"""An IHVP, an inner solver and a penalty of another package keep the contracts; broken ones fail by name."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import testing

RANDOM = np.random.default_rng(0)  # drawn from while a function is traced, it makes each trace another one
IN_ORDER = {"a product is not counted", "a batch is drawn twice"}  # these faults pass all contracts before theirs

# A foreign inverse-Hessian-vector product


def richardson(step_size, sample, steps=3):
    """v ← v + step_size (b − H v), from v0 or from zero."""

    def init(x, y, batch=None, inner_loss=None):
        return ()

    def prepare(key, state, inner_loss, point):
        x, y, data = point
        product = bx.curvature.hessian(inner_loss, x, y, sample(key, 0, data))

        def apply(b, v0=None):
            def step(v, _):
                r = jax.tree.map(lambda b, hv: b - hv, b, product(v))
                return jax.tree.map(lambda v, r: (v + step_size * r).astype(v.dtype), v, r), None

            v = jax.tree.map(lambda b: step_size * b, b) if v0 is None else v0
            v, _ = jax.lax.scan(step, optax.tree.cast_like(v, b), length=steps)
            bad = ~jnp.isfinite(sum(jnp.sum(leaf, dtype=float) for leaf in jax.tree.leaves(v)))
            return v, bx.IHVPInfo(steps, steps, 0, jnp.nan, jnp.nan, bad)

        return apply, state

    return bx.IHVP(init, prepare, linear=True)


def changed(change, linear=True):
    """A constructor of `richardson` whose `apply` is `change(apply, b, v0)`."""

    def make(number, sample):
        sound = richardson(number, sample)

        def prepare(*arguments):
            apply, state = sound.prepare(*arguments)
            return functools.partial(change, apply), state

        return bx.IHVP(sound.init, prepare, linear)

    return make


def cold(apply, b, v0=None):
    return apply(b)


def wrong_sign(apply, b, v0=None):
    v, info = apply(b, v0)
    return optax.tree.scale(-1, v), info


def single_precision(apply, b, v0=None):
    v, info = apply(b, v0)
    return optax.tree.cast(v, jnp.float32), info


def double(function, *arguments):
    """The first result in double precision, also with x64 off."""
    first, *rest = function(*arguments)
    with jax.enable_x64(True):
        return optax.tree.cast(first, float), *rest


def hidden_nan(apply, b, v0=None):
    v, info = apply(b, v0)
    return jax.tree.map(jnp.nan_to_num, v), info._replace(breakdown=jnp.zeros((), bool))


def one_product_too_few(apply, b, v0=None):
    v, info = apply(b, v0)
    return v, info._replace(products=info.products - 1)


def triangular(apply, b, v0=None):
    """Right at H = 2 I; not symmetric."""
    v, info = apply(b, v0)
    return jax.tree.map(lambda v, b: v + 0.1 * jnp.roll(v - b / 2, 1), v, b), info


def random_start(apply, b, v0=None):
    return apply(b, jax.tree.map(lambda leaf: jnp.full_like(leaf, RANDOM.normal()), b))


def weak_memory(number, sample):
    """Made of a Python number in init, of an array in prepare."""
    sound = richardson(number, sample)

    def prepare(key, state, *problem):
        return sound.prepare(key, (), *problem)[0], jnp.zeros(())

    return bx.IHVP(lambda *point: jnp.asarray(0.0), prepare, linear=True)


def two_draws(number, sample):
    """Draws another batch in each application of one Hessian."""
    sound = richardson(number, sample, steps=1)

    def prepare(key, *arguments):
        first, last = (sound.prepare(jax.random.fold_in(key, i), *arguments)[0] for i in range(2))

        def apply(b, v0=None):
            return last(b, first(b, v0)[0])

        return apply, ()

    return bx.IHVP(sound.init, prepare, linear=True)


def one_key(number, sample):
    """The same draws for all keys."""
    sound = richardson(number, sample)
    return sound._replace(prepare=lambda key, *arguments: sound.prepare(jax.random.key(7), *arguments))


def small_steps(number, sample):
    """Right in double precision; in bfloat16 a step is soon too small to be added."""
    return richardson(number / 100, sample, steps=2400)


def branching(number, sample):
    if number > 1:
        raise ValueError("number must be at most 1")
    return richardson(number, sample)


@pytest.mark.compiles(200)
def test_foreign_ihvp():
    testing.check_ihvp(richardson, number=0.5)
    testing.check_ihvp(richardson(0.5, bx.inner.full))


@pytest.mark.compiles(100)
def test_checks_are_in_double_precision_wherever_they_are_called():
    with jax.enable_x64(False):
        testing.check_ihvp(richardson(0.5, bx.inner.full))
        with pytest.raises(testing.ContractError, match="inverts_twice_the_identity"):
            testing.check_ihvp(richardson(0.4999999, bx.inner.full, steps=0))


BROKEN_IHVPS = {
    "a warm v is not used": (changed(cold), "v0_is_used"),
    "the sign is wrong": (changed(wrong_sign), "inverts_twice_the_identity"),
    "v is single precision": (changed(single_precision), "v_is_like_b"),
    "v is double precision": (changed(double), "single_precision_stays_single"),
    "a weak type of the state is not kept": (weak_memory, "one_program_serves_all_calls"),
    "it starts from outside of the trace": (changed(random_start), "vmap_equals_a_loop"),
    "NaN is hidden": (changed(hidden_nan), "nan_is_reported"),
    "a product is not counted": (changed(one_product_too_few), "declared_calls_are_compiled_calls"),
    "it is not symmetric": (changed(triangular), "linear_means_symmetric_and_positive_definite"),
    "it draws for each application": (two_draws, "linear_means_symmetric_and_positive_definite"),
    "the key is not used": (one_key, "draws_depend_on_the_key_alone"),
    "its steps are small": (small_steps, "half_precision_is_near_double"),
    "it branches on its number": (branching, "number_may_be_traced"),
}


def faults(table):
    """What goes through all contracts may compile more."""
    return [pytest.param(fault, marks=pytest.mark.compiles(80)) if fault in IN_ORDER else fault for fault in table]


@pytest.mark.parametrize("fault", faults(BROKEN_IHVPS))
def test_broken_ihvp(fault):
    make, name = BROKEN_IHVPS[fault]
    fails_by_name(testing.check_ihvp, make, asked(testing.ihvp.CONTRACTS, name, fault), name, number=0.5)


def asked(contracts, name, fault):
    """The contract of this name; of some faults all in their order, of which the first that is broken is named."""
    if "compiled" in name and not testing.compiled.READABLE:
        pytest.skip("reads HLO text as it is printed since jax 0.10")
    return [one for one in contracts if one.name == name or fault in IN_ORDER]


def fails_by_name(check, method, contracts, name, **declared):
    with pytest.raises(testing.ContractError, match=re.escape(f"breaks the contract `{name}`")) as error:
        check(method, contracts, **declared)
    assert "what to do: " in str(error.value)


# A foreign inner solver


def one():
    return 1.0


class Unrolled(NamedTuple):
    """What distinguishes the sound solver from its broken copies."""

    backward_key: int = 0  # folded into the key for the steps that are differentiated
    steps_back: int = 3  # of which there are three
    gradients: int = 10  # declared: three steps forward, twice again on the way back, and one for the report
    scale: Any = one  # of each step
    z0_bar: Any = bx.Iterate  # what is made of the cotangent of y


def unrolled(faults):
    """Three steps, differentiated by `jax.vjp` of themselves, with no help of the package."""

    def make(inner_loss, optimizer, sample):
        def init(x, y, batch=None):
            return ()

        def start(x, y):
            y = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), y)
            return bx.Iterate(y, optimizer.init(y), jnp.zeros((), jnp.int32))

        def loop(key, x, z, batch, steps):
            def step(z, _):
                rows = sample(jax.random.fold_in(key, z.t), z.t, batch)
                gradient = jax.grad(inner_loss, 1)(x, z.y, rows)
                updates, opt_state = optimizer.update(gradient, z.opt_state, z.y)
                updates = optax.tree.cast_like(optax.tree.scale(faults.scale(), updates), updates)
                return bx.Iterate(optax.apply_updates(z.y, updates), opt_state, z.t + 1), None

            return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), z, length=steps)[0]

        def forward(key, state, x, z, batch):
            return loop(key, x, z, batch, 3), (key, x, z, batch), state

        def backward(residual, state, z_bar):
            key, x, z, batch = residual
            again = jax.random.fold_in(key, faults.backward_key) if faults.backward_key else key
            z_T = loop(key, x, z, batch, 3)
            _, pull_back = jax.vjp(lambda x, y: loop(again, x, z._replace(y=y), batch, faults.steps_back).y, x, z.y)
            x_bar, y_bar = pull_back(z_bar.y)
            rows = sample(jax.random.fold_in(key, z_T.t - 1), z_T.t - 1, batch)
            value, gradient = jax.value_and_grad(inner_loss, 1)(x, z_T.y, rows)
            size = optax.tree.norm(optax.tree.cast(gradient, float))
            calls = bx.Calls(0, faults.gradients, 3, 3)
            info = bx.SolverInfo(value, size, ~jnp.isfinite(value + size), calls, ())
            return (x_bar, faults.z0_bar(y_bar)), state, info

        return bx.InnerSolver(init, start, forward, backward)

    return make


@pytest.mark.compiles(200)
def test_foreign_solver():
    testing.check_solver(unrolled(Unrolled()), steps=3, unrolls=True)


BROKEN_SOLVERS = {
    "a cotangent is y alone": (Unrolled(z0_bar=lambda y_bar: y_bar), "forward_and_backward_return_what_they_say"),
    "a step is not differentiated": (Unrolled(steps_back=2), "gradient_is_that_of_the_steps"),
    "a batch is drawn twice": (Unrolled(backward_key=1), "gradient_is_that_of_the_steps"),
    "a gradient is not counted": (Unrolled(gradients=9), "declared_calls_are_compiled_calls"),
    "each trace differs": (Unrolled(scale=RANDOM.uniform), "differentiable_is_the_first_estimate"),
}


@pytest.mark.parametrize("fault", faults(BROKEN_SOLVERS))
def test_broken_solver(fault):
    how, name = BROKEN_SOLVERS[fault]
    contracts = asked(testing.solver.CONTRACTS, name, fault)
    fails_by_name(testing.check_solver, unrolled(how), contracts, name, steps=3, unrolls=True)


# A foreign penalty


class PenaltyState(NamedTuple):
    y: Any
    penalized: Any


def penalty(problem, optimizer, sample, draws=1, report=jnp.asarray, keep=lambda new, old: new, multiplier=10.0):
    """∇_x f + λ (∇_x g(y_λ) − ∇_x g(y)), after two plain loops of four steps."""

    def init(x, y, batch=None):
        y = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), y)
        return PenaltyState(y, y)

    def penalized_loss(x, y, batch):
        return problem.inner_loss(x, y, batch.inner) + problem.outer_loss(x, y, batch.outer) / multiplier

    def estimate(key, state, x, batch):
        def draw(t, key=key):
            return sample(jax.random.fold_in(key, t), t, batch.inner)

        def descend(loss, pick, y):
            def step(carry, t):
                y, opt_state = carry
                updates, opt_state = optimizer.update(jax.grad(loss, 1)(x, y, pick(t)), opt_state, y)
                return (optax.apply_updates(y, updates), opt_state), None

            return jax.lax.scan(step, (y, optimizer.init(y)), jnp.arange(4))[0][0]

        y = descend(problem.inner_loss, draw, state.y)
        y_penalized = descend(penalized_loss, lambda t: bx.Batch(batch.outer, draw(t)), state.penalized)
        here, there = draw(3), draw(3, jax.random.fold_in(key, 7)) if draws == 2 else draw(3)
        value, (g_x, g_y) = jax.value_and_grad(problem.inner_loss, (0, 1))(x, y, here)
        above = jax.grad(problem.inner_loss)(x, y_penalized, there)
        outer, f_x = jax.value_and_grad(problem.outer_loss)(x, y_penalized, batch.outer)
        grad = jax.tree.map(lambda f, a, b: (f + multiplier * (a - b)).astype(f.dtype), f_x, above, g_x)
        grad = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, jnp.result_type(like)), grad, x)
        size = optax.tree.norm(optax.tree.cast(g_y, float))
        bad = report(~jnp.isfinite(outer + value + size + optax.tree.norm(optax.tree.cast(grad, float))))
        inner = bx.SolverInfo(value, size, bad, bx.Calls(5, 9), ())
        return grad, PenaltyState(y, keep(y_penalized, state.penalized)), bx.HypergradientInfo(outer, inner)

    return bx.Hypergradient(init, estimate)


def beside(info):
    """Two ∇_x g; ∇_y g at y_λ is not taken, and ∇_x f needs no ∇_y f."""
    return bx.Calls(cross_products=2)


DECLARED = {"steps": 4, "biased": True, "uncounted": beside}


def around(change):
    """A constructor of `penalty` whose estimate is `change(estimate, key, state, x, batch)`."""

    def make(problem, optimizer, sample):
        sound = penalty(problem, optimizer, sample)
        return bx.Hypergradient(sound.init, functools.partial(change, jax.jit(sound.estimate)))

    return make


def read_dtype(estimate, key, state, x, batch):
    return estimate(key, state, jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), x), batch)


def weak_start(problem, optimizer, sample):
    sound = penalty(problem, optimizer, sample)
    return sound._replace(init=lambda x, y, batch=None: PenaltyState(*[jax.tree.map(jnp.asarray, y)] * 2))


def random_scale(estimate, *arguments):
    grad, *rest = estimate(*arguments)
    return optax.tree.scale(RANDOM.uniform(), grad), *rest


def one_start(estimate, key, state, x, batch):
    return estimate(key, PenaltyState(state.y, state.y), x, batch)


def next_draw(problem, optimizer, sample):
    return penalty(problem, optimizer, lambda key, t, data: sample(key, t + 1, data))


def constant_key(estimate, key, *arguments):
    return estimate(jax.random.key(7), *arguments)


def constant_floats(estimate, key, state, x, batch):
    grad, *rest = estimate(key, state, x, batch)
    return jax.tree.map(lambda leaf, g: g if isinstance(leaf, jax.Array) else 0 * g, x, grad), *rest


BROKEN_PENALTIES = {
    "a state is not kept": (
        functools.partial(penalty, keep=lambda new, old: optax.tree.cast(new, jnp.float32)),
        "gradient_is_like_x",
    ),
    "the dtype of a number is read": (around(read_dtype), "python_floats_are_numbers"),
    "the gradient is double precision": (around(double), "single_precision_stays_single"),
    "a weak type is not stripped": (weak_start, "weak_types_are_kept"),
    "a breakdown is made up": (functools.partial(penalty, report=jnp.ones_like), "one_program_serves_all_steps"),
    "a breakdown is hidden": (functools.partial(penalty, report=jnp.zeros_like), "nan_is_reported"),
    "it draws outside of the trace": (around(random_scale), "vmap_of_scan_equals_a_loop"),
    "half of the state is not used": (around(one_start), "state_is_read"),
    "a draw is left out": (next_draw, "y_is_that_of_a_loop_by_hand"),
    "the key is not used": (around(constant_key), "draws_depend_on_the_key_alone"),
    "a batch is drawn twice": (functools.partial(penalty, draws=2), "constant_outer_loss_has_no_gradient"),
    "small differences are multiplied": (functools.partial(penalty, multiplier=1e3), "half_precision_is_near_double"),
    "numbers are constants": (around(constant_floats), "jit_equals_eager"),
}


@pytest.mark.compiles(200)
def test_foreign_penalty():
    testing.check_hypergradient(penalty, **DECLARED)


@pytest.mark.parametrize("fault", faults(BROKEN_PENALTIES))
def test_broken_penalty(fault):
    make, name = BROKEN_PENALTIES[fault]
    contracts = asked(testing.hypergradient.CONTRACTS, name, fault)
    fails_by_name(testing.check_hypergradient, make, contracts, name, **DECLARED)


def test_a_property_that_is_not_declared():
    """A penalty is biased, and takes steps: it says so, or it fails by the contract of those that are not."""
    contracts = testing.hypergradient.CONTRACTS
    fails_by_name(testing.check_hypergradient, penalty, contracts, "exact_at_the_solution", steps=4)


ELSEWHERE = {
    "exact_at_the_solution",  # above: it is not asked of what says that it is biased
    "gradient_is_that_of_the_steps",  # asked of solvers that unroll: BROKEN_SOLVERS
    "declared_calls_are_compiled_calls",  # BROKEN_SOLVERS
}


def test_each_contract_of_ihvps_has_a_broken_method():
    same_names(BROKEN_IHVPS, testing.ihvp.CONTRACTS)


def test_each_contract_of_hypergradients_has_a_broken_method():
    same_names(BROKEN_PENALTIES, testing.hypergradient.CONTRACTS, ELSEWHERE)


def test_each_contract_of_solvers_has_a_broken_method():
    own = [one for one in testing.solver.CONTRACTS if one not in testing.hypergradient.CONTRACTS]
    same_names(BROKEN_SOLVERS, own, ELSEWHERE - {"exact_at_the_solution"})


def same_names(table, contracts, others=frozenset()):
    """Of the broken methods and the contracts, others aside; one method at least goes through all contracts."""
    assert {name for _, name in table.values()} ^ {one.name for one in contracts} == set(others)
    assert IN_ORDER & set(table)


SOUND = richardson(0.5, bx.inner.full)
MISUSE = {
    "a constructor without its number": (testing.check_ihvp, (richardson,), {}, "number must be given"),
    "a value with a number": (testing.check_ihvp, (SOUND,), {"number": 0.5}, "number must be left out"),
    "a number for an IHVP": (testing.check_ihvp, (3,), {}, "ihvp must be an IHVP; got 3 of type int"),
    "an IHVP of a number alone": (
        testing.check_ihvp,
        (bx.ihvp.identity,),
        {"number": 0.5},
        r"function \(number, sample",
    ),
    "no IHVP": (testing.check_ihvp, (lambda *parts: None,), {"number": 0.5}, "must be an IHVP; got None"),
    "no solver": (testing.check_solver, (lambda *parts: None,), {}, "must be an InnerSolver; got None"),
    "a solver of a loss alone": (
        testing.check_solver,
        (lambda loss: None,),
        {},
        r"function \(inner_loss, optimizer, s",
    ),
    "no estimator": (
        testing.check_hypergradient,
        (lambda *parts: 1,),
        {},
        "must be a Hypergradient; got 1 of type int",
    ),
    "no function": (testing.check_hypergradient, (None,), {}, r"make must be a function \(problem, optimizer, sample"),
    "no contracts": (testing.check_ihvp, (SOUND, []), {}, "contracts must hold at least one"),
    "contracts of another kind": (
        *(testing.check_ihvp, (SOUND, testing.gossip.CONTRACTS), {}),
        r"about an IHVPSubject; got state_keeps_its_form\(subject: .*GossipSubject\)",
    ),
    "a contract of a limit": (
        *(testing.check_ihvp, (SOUND, [testing.limits.limit_is_the_declared_one]), {}),
        "got limit_is_the_declared_one",
    ),
    "a function for a contract": (testing.check_ihvp, (SOUND, [print]), {}, "must be a Contract; got print"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_no_broken_contract(name):
    check, arguments, declared, message = MISUSE[name]
    with pytest.raises(ValueError, match=message):
        check(*arguments, **declared)

"""An inner solver and a penalty of another package keep the contracts; broken ones fail by name."""

import functools
from typing import Any, NamedTuple

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import testing

RANDOM = np.random.default_rng(0)  # drawn from while a function is traced, it makes each trace another one

# A foreign inner solver


def one():
    return 1.0


class Unrolled(NamedTuple):
    """What distinguishes the sound solver from its broken copies."""

    backward_key: int = 0  # folded into the key for the steps that are differentiated
    steps_back: int = 3  # of which there are three
    gradients: int = 13  # declared: three steps forward, three times again on the way back, and one for the report
    scale: Any = one  # of each step
    z0_bar: Any = bx.problem.Iterate  # what is made of the cotangent of y


def unrolled(faults):
    """Three steps, differentiated by `jax.vjp` of themselves, with no help of the package."""

    def make(inner_loss, optimizer, sample):
        def init(x, y, batch=None):
            return ()

        def start(x, y):
            y = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), y)
            return bx.problem.Iterate(y, optimizer.init(y), jnp.zeros((), jnp.int32))

        def loop(key, x, z, batch, steps):
            def step(z, _):
                rows = sample(jax.random.fold_in(key, z.t), z.t, batch)
                gradient = jax.grad(inner_loss, 1)(x, z.y, rows)
                updates, opt_state = optimizer.update(gradient, z.opt_state, z.y)
                updates = optax.tree.cast_like(optax.tree.scale(faults.scale(), updates), updates)
                return bx.problem.Iterate(optax.apply_updates(z.y, updates), opt_state, z.t + 1), None

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
            calls = bx.problem.Calls(0, faults.gradients, 3, 3)
            info = bx.problem.SolverInfo(value, size, ~jnp.isfinite(value + size), calls, ())
            return (x_bar, faults.z0_bar(y_bar)), state, info

        return bx.problem.InnerSolver(init, start, forward, backward)

    return make


@pytest.mark.compiles(200)
def test_foreign_solver():
    testing.check_solver(unrolled(Unrolled()), steps=3, unrolls=True)


BROKEN_SOLVERS = {
    "a cotangent is y alone": (Unrolled(z0_bar=lambda y_bar: y_bar), "forward_and_backward_return_what_they_say"),
    "a step is not differentiated": (Unrolled(steps_back=2), "gradient_is_that_of_the_steps"),
    "a batch is drawn twice": (Unrolled(backward_key=1), "gradient_is_that_of_the_steps"),
    "a gradient is not counted": (Unrolled(gradients=12), "declared_calls_are_compiled_calls"),
    "each trace differs": (Unrolled(scale=RANDOM.uniform), "differentiable_is_the_first_estimate"),
}


@pytest.mark.parametrize("fault", foreign.faults(BROKEN_SOLVERS))
def test_broken_solver(fault):
    how, name = BROKEN_SOLVERS[fault]

    def check(contracts):
        testing.check_solver(unrolled(how), contracts, steps=3, unrolls=True)

    foreign.broken(check, testing.solver, name, fault)


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
        inner = bx.problem.SolverInfo(value, size, bad, bx.problem.Calls(5, 9), ())
        return (
            grad,
            PenaltyState(y, keep(y_penalized, state.penalized)),
            bx.hypergradients.HypergradientInfo(outer, inner),
        )

    return bx.problem.Hypergradient(init, estimate)


def beside(info):
    """Two ∇_x g; ∇_y g at y_λ is not taken, and ∇_x f needs no ∇_y f."""
    return bx.problem.Calls(cross_products=2)


DECLARED = {"steps": 4, "biased": True, "uncounted": beside}


def around(change):
    """A constructor of `penalty` whose estimate is `change(estimate, key, state, x, batch)`."""

    def make(problem, optimizer, sample):
        sound = penalty(problem, optimizer, sample)
        return bx.problem.Hypergradient(sound.init, functools.partial(change, jax.jit(sound.estimate)))

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


def unmeasured(estimate, *arguments):
    grad, state, info = estimate(*arguments)
    return grad, state, info._replace(inner=info.inner._replace(detail=jnp.nan))


def numbered(problem, optimizer, sample):
    """In its state is a dict with a number for a key, which no library of checkpoints reads back."""
    sound = penalty(problem, optimizer, sample)

    def init(x, y, batch=None):
        state = sound.init(x, y, batch)
        return state._replace(penalized={0: state.penalized})

    def estimate(key, state, *arguments):
        grad, state, info = sound.estimate(key, state._replace(penalized=state.penalized[0]), *arguments)
        return grad, state._replace(penalized={0: state.penalized}), info

    return bx.problem.Hypergradient(init, estimate)


BROKEN_PENALTIES = {
    "a state is not kept": (
        functools.partial(penalty, keep=lambda new, old: optax.tree.cast(new, jnp.float32)),
        "gradient_is_like_x",
    ),
    "the dtype of a number is read": (around(read_dtype), "python_floats_are_numbers"),
    "the gradient is double precision": (around(foreign.double), "single_precision_stays_single"),
    "a weak type is not stripped": (weak_start, "weak_types_are_kept"),
    "a breakdown is made up": (functools.partial(penalty, report=jnp.ones_like), "one_program_serves_all_steps"),
    "a breakdown is hidden": (functools.partial(penalty, report=jnp.zeros_like), "nan_is_reported"),
    "what is not measured is NaN": (around(unmeasured), "debuggers_find_nothing"),
    "a dict of numbered arrays": (numbered, "state_is_made_of_arrays"),
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


@pytest.mark.parametrize("fault", foreign.faults(BROKEN_PENALTIES))
def test_broken_penalty(fault):
    make, name = BROKEN_PENALTIES[fault]

    def check(contracts):
        testing.check_hypergradient(make, contracts, **DECLARED)

    foreign.broken(check, testing.hypergradient, name, fault)


def test_a_property_that_is_not_declared():
    """A penalty is biased, and takes steps: it says so, or it fails by the contract of those that are not."""
    with pytest.raises(testing.ContractError, match="breaks the contract `exact_at_the_solution`"):
        testing.check_hypergradient(penalty, steps=4)


ELSEWHERE = {
    "exact_at_the_solution",  # above: it is not asked of what says that it is biased
    "gradient_is_that_of_the_steps",  # asked of solvers that unroll: BROKEN_SOLVERS
    "declared_calls_are_compiled_calls",  # BROKEN_SOLVERS
}


def test_each_contract_of_hypergradients_has_a_broken_method():
    foreign.same_names(BROKEN_PENALTIES, names(BROKEN_PENALTIES), testing.hypergradient.CONTRACTS, ELSEWHERE)


def test_each_contract_of_solvers_has_a_broken_method():
    own = [one for one in testing.solver.CONTRACTS if one not in testing.hypergradient.CONTRACTS]
    foreign.same_names(BROKEN_SOLVERS, names(BROKEN_SOLVERS), own, ELSEWHERE - {"exact_at_the_solution"})


def names(table):
    return {name for _, name in table.values()}


SOUND = bx.ihvp.identity(0.5)
MISUSE = {
    "a constructor without its number": (
        testing.check_ihvp,
        (lambda number, sample: SOUND,),
        {},
        "number must be given",
    ),
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

"""What parts of one's own return is checked when it is traced, with a message that says what to return."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevax as bx
from bilevax import testing

CORRECTION, ESTIMATOR = bx.single_loop.correction, bx.single_loop.estimator
MOMENTUM, TRACKING = ESTIMATOR.momentum(0.5), CORRECTION.tracking()
Q = testing.problems.four_agents()
RING, PUSH_SUM = bx.gossip(bx.topology.ring(4)), bx.agents.push_sum(testing.placement.DIRECTED)


def loss(x, y, batch):
    return (y - x) ** 2


def single(tree):
    return optax.tree.cast(tree, jnp.float32)


def then(part, name, change):
    """The part, with what one of its functions returns changed."""

    def changed(*arguments):
        return change(*getattr(part, name)(*arguments))

    return part._replace(**{name: changed})


def step(gossip=RING, estimator=MOMENTUM, correction=TRACKING, **options):
    """A step of the engine, traced."""
    method = bx.single_loop.single_loop(Q.problem, gossip, 0.1, estimator, correction, **options)
    return jax.eval_shape(lambda: method.step(None, method.init(*Q.start), Q.batch))


def estimate(solver):
    hypergrad = bx.hypergradient(loss, solver)
    return jax.eval_shape(lambda: hypergrad.estimate(None, hypergrad.init(1.0, 2.0), 1.0, bx.Batch(None, None)))


def of_estimator(change):
    return functools.partial(step, estimator=then(MOMENTUM, "update", change))


def of_correction(change, gossip=RING):
    return functools.partial(step, gossip, correction=then(TRACKING, "update", change))


def of_solver(name, change):
    return functools.partial(estimate, then(bx.inner.reverse(loss, optax.sgd(0.1), 2), name, change))


def of_apply(change):
    """An inverse-Hessian-vector product whose `apply` returns something else."""

    def prepare(apply, state):
        return lambda *b_and_v0: change(*apply(*b_and_v0)), state

    return of_ihvp(prepare)


def of_ihvp(change):
    return lambda: estimate(bx.inner.implicit(loss, ihvp=then(bx.ihvp.identity(), "prepare", change)))


def directions(*arguments):
    return single(bx.problem.directions(*arguments))


def of_hypergrad(change, use):
    """An estimate that returns something else, in each of those who use one."""
    return lambda: use(then(bx.hypergradient(loss, bx.inner.implicit(loss)), "estimate", change))


def in_descent(hypergrad):
    method = bx.algorithms.descent(hypergrad, 0.1)
    return jax.eval_shape(lambda: method.step(None, method.init(1.0, 2.0), bx.Batch(None, None)))


def in_two_phase(hypergrad):
    both = bx.two_phase(1, hypergrad, hypergrad)
    return jax.eval_shape(lambda: both.estimate(None, both.init(1.0, 2.0), 1.0, bx.Batch(None, None)))


def in_the_doctor(hypergrad):
    problem = bx.BilevelProblem(loss, loss)
    return bx.check_hypergradient(problem, 1.0, 2.0, bx.Batch(None, None), hypergrad)


HYPERGRAD, SOLVER = bx.hypergradient(loss, bx.inner.implicit(loss)), bx.inner.reverse(loss, optax.sgd(0.1), 2)
IDENTITY = bx.ihvp.identity()
OTHER_DIRECTIONS = bx.single_loop.local_directions.second_order()._replace(evaluate=directions)
CASES = {
    "estimator_parts": (of_estimator(lambda u, state, n: (u, state)), r"estimator.update must return .*; got 2 parts"),
    "estimator_kind": (of_estimator(lambda u, *rest: (tuple(u), *rest)), "must be a Levels; .*Return bx.Levels"),
    "estimator_count": (of_estimator(lambda u, state, n: (u, state, 1)), r"evaluations .* each of the 4 .*shape \(\)"),
    "estimator_state": (of_estimator(lambda u, state, n: (u, single(state), n)), "state after estimator.*got float32"),
    "estimator_shape": (
        of_estimator(lambda u, *rest: (u._replace(x=u.x[0]), *rest)),
        r"direction of x of estimator.update must keep its structure and shapes; .*\(1,\).*expected .*\(4, 1\)",
    ),
    "correction_parts": (of_correction(lambda s, state, sent: (s, state)), "correction.update must return .*2 parts"),
    "correction_sent": (of_correction(lambda s, state, sent: (s, state, sent.bytes)), "must be a Sent; .*Return Sent"),
    "correction_bytes": (
        of_correction(lambda s, state, sent: (s, state, sent._replace(bytes=sent.bytes.sum()))),
        r"bytes of correction.update must be one number for each of the 4 agents held here; got shape \(\)",
    ),
    "correction_rounds": (
        of_correction(lambda s, state, sent: (s, state, sent._replace(rounds=sent.bytes))),
        r"rounds of correction.update must be one number; got shape \(4,\)",
    ),
    "correction_dtype": (of_correction(lambda s, *rest: (single(s), *rest)), r"x after correction.* got float32 .*s⁺"),
    "correction_state": (
        of_correction(lambda s, state, sent: (s, state._replace(memory=single(state.memory)), sent), PUSH_SUM),
        r"state after correction.update must keep its dtypes; got float32 at \.memory\.mixed",
    ),
    "gossip": (lambda: step(then(RING, "mix", lambda s, state: (single(s), state))), "gossip mixes .* got float32"),
    "directions": (lambda: step(local_directions=OTHER_DIRECTIONS), "direction of x must keep its dtypes; got float32"),
    "ihvp_parts": (of_ihvp(lambda apply, state: (apply, state, ())), r"ihvp.prepare must return \(apply, state\)"),
    "apply_parts": (of_apply(lambda v, info: v), r"apply of ihvp.prepare must return \(v, info\)"),
    "apply_dtype": (of_apply(lambda v, info: (single(v), info)), "v of ihvp.prepare must keep its dtypes; got float32"),
    "apply_info": (of_apply(lambda v, info: (v, ())), "info of ihvp.prepare must be an IHVPInfo"),
    "forward_parts": (of_solver("forward", lambda z, residual, state: (z, residual)), "forward must return .* 2 parts"),
    "forward_z": (of_solver("forward", lambda z, *rest: (z.y, *rest)), "z_T of solver.forward must be an Iterate"),
    "forward_y": (of_solver("forward", lambda z, *rest: (z._replace(y=single(z.y)), *rest)), "y of solver.*float32"),
    "backward_parts": (of_solver("backward", lambda bars, state, info: (*bars, state, info)), "backward.*got 4 parts"),
    "backward_bars": (of_solver("backward", lambda bars, *rest: (bars[0], *rest)), r"must return \(x_bar, z0_bar\)"),
    "backward_x": (
        of_solver("backward", lambda bars, *rest: ((single(bars[0]), bars[1]), *rest)),
        "x_bar of solver.backward must keep its dtypes; got float32",
    ),
    "backward_info": (of_solver("backward", lambda bars, state, info: (bars, state, ())), "must be a SolverInfo"),
    "forward_state": (of_solver("forward", lambda z, residual, state: (z, residual, 1.0)), "state after solver.forw"),
    "backward_state": (of_solver("backward", lambda bars, state, info: (bars, 1.0, info)), "state after solver.backw"),
    "backward_z0": (
        of_solver("backward", lambda bars, *rest: ((bars[0], bx.problem.Iterate(single(bars[1].y))), *rest)),
        "y of z0_bar of solver.backward must keep its dtypes; got float32",
    ),
    "start_kind": (
        lambda: estimate(SOLVER._replace(start=lambda x, y: (y, None, None))),
        "z of solver.start must be an Iterate",
    ),
    "start_kind_of_differentiable": (
        lambda: bx.differentiable(SOLVER._replace(start=lambda x, y: (y, None, None)))(1.0, 2.0, None),
        "z of solver.start must be an Iterate",
    ),
    "ihvp_state": (of_ihvp(lambda apply, state: (apply, 1.0)), "state after ihvp.prepare must keep its structure"),
    "preconditioner_state": (
        lambda: estimate(
            bx.inner.implicit(
                loss,
                ihvp=bx.ihvp.cg(preconditioner=then(IDENTITY, "prepare", lambda apply, state: (apply, 1.0))),
            )
        ),
        "state after preconditioner.prepare must keep its structure",
    ),
    **{
        f"{name}_in_{use.__name__}": (of_hypergrad(change, use), message)
        for use, part in ((in_descent, "hypergrad"), (in_two_phase, "(first|second)"), (in_the_doctor, "hypergrad"))
        for name, change, message in (
            ("estimate_parts", lambda grad, state, info: (grad, state), rf"{part}.estimate must return .* 2 parts"),
            ("grad_shape", lambda grad, *rest: (jnp.ones(7), *rest), rf"grad of {part}.estimate .*\(7,\)"),
            ("grad_dtype", lambda grad, *rest: (jnp.float16(grad), *rest), rf"grad of {part}.estimate .* float16"),
            ("y_dtype", lambda g, s, info: (g, s._replace(y=single(s.y)), info), rf"state after {part}.* float32"),
        )
    },
    "state_without_y": (
        lambda: in_descent(HYPERGRAD._replace(init=lambda x, y, batch: y)),
        "hypergrad.init must return a NamedTuple with a field y",
    ),
}
# Each of those who take a part, with the functions of that part.
TAKERS = {
    "descent": ("hypergrad", HYPERGRAD, ("init", "estimate"), lambda part: bx.algorithms.descent(part, 0.1)),
    "descent_of_k": (
        r"hypergrad\(k\)",
        HYPERGRAD,
        ("init", "estimate"),
        lambda part: bx.algorithms.descent(lambda k: part, 0.1).init(1.0, 2.0),
    ),
    "two_phase": ("second", HYPERGRAD, ("init", "estimate"), lambda part: bx.two_phase(1, HYPERGRAD, part)),
    "check_hypergradient": ("hypergrad", HYPERGRAD, ("init", "estimate"), in_the_doctor),
    "hypergradient": ("solver", SOLVER, SOLVER._fields[:4], lambda part: bx.hypergradient(loss, part)),
    "differentiable": ("solver", SOLVER, SOLVER._fields[:4], bx.differentiable),
    "chain": ("last", SOLVER, SOLVER._fields[:4], lambda part: bx.inner.chain(SOLVER, part)),
    "implicit": ("ihvp", IDENTITY, ("init", "prepare"), lambda part: bx.inner.implicit(loss, ihvp=part)),
    "rescaled": ("ihvp", IDENTITY, ("init", "prepare"), bx.ihvp.rescaled),
    "cg": ("preconditioner", IDENTITY, ("init", "prepare"), lambda part: bx.ihvp.cg(preconditioner=part)),
}


@pytest.mark.parametrize("name", TAKERS)
def test_a_function_that_takes_too_little_is_told_when_it_is_given(name):
    word, part, functions, use = TAKERS[name]
    for function in functions:
        with pytest.raises(ValueError, match=rf"^{word}\.{function} must be a function \("):
            use(part._replace(**{function: lambda x: x}))


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_told(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


def test_what_is_right_goes_through():
    step()
    step(PUSH_SUM)
    estimate(bx.inner.reverse(loss, optax.sgd(0.1), 2))
    estimate(bx.inner.implicit(loss, ihvp=bx.ihvp.identity()))

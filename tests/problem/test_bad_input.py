"""Every mistake is answered by the name of the argument, what came, what was expected, and the fix."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from flax import nnx

import bilevax as bx

SGD, MOMENTUM, ADAM = optax.sgd(0.1), optax.sgd(0.1, momentum=0.9), optax.adam(0.1)
KEY = jax.random.key(0)
NAN = float("nan")
POINT = jnp.ones(3)
BATCH = bx.Batch(outer=None, inner=None)


def inner_loss(x, y, batch):
    return jnp.sum((y - x) ** 2)


def outer_loss(x, y, batch):
    return jnp.sum(y**2)


def mean_loss(x, y, batch):
    return jnp.mean((y[None, :] - x[None, :] - batch) ** 2)


def estimate(solver, outer_loss=outer_loss, x=POINT, y=POINT, batch=BATCH, key=None):
    hypergrad = bx.hypergradient(outer_loss, solver)
    return hypergrad.estimate(key, hypergrad.init(x, y), x, batch)


def solve(solver, x=POINT, y=POINT, batch=None):
    return bx.differentiable(solver)(x, y, batch)


def estimate_at(x=POINT, batch=BATCH):
    """An estimate whose state was made for POINT."""
    hypergrad = bx.hypergradient(outer_loss, bx.inner.reverse(inner_loss, SGD, 1))
    return hypergrad.estimate(None, hypergrad.init(POINT, POINT), x, batch)


def guided_at(x):
    """An estimate whose guide remembers gradients like POINT."""
    guide, number = bx.inner.guides.running_mean(0.1), lambda x, y, batch: jnp.sum(x["a"] if isinstance(x, dict) else x)
    solver = bx.inner.forward_gradient(number, SGD, 1, directions=2, guide=guide)
    hypergrad = bx.hypergradient(number, solver)
    return hypergrad.estimate(jax.random.key(0), hypergrad.init(POINT, POINT), x, BATCH)


class Case(NamedTuple):
    """A mistake, and what its message has to say."""

    wrong: Any
    says: list[str]


def mistakes(**cases):
    return pytest.mark.parametrize(
        ("wrong", "says"),
        [pytest.param(case.wrong, case.says, id=name) for name, case in cases.items()],
    )


def check(call, says, error=ValueError):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert [part for part in says if part not in message] == []


# Losses


METHODS = [bx.inner.reverse, bx.inner.implicit, bx.inner.no_gradient]
over_methods = pytest.mark.parametrize("method", METHODS)

READERS = {
    "hypergradient": ("outer_loss", lambda loss: estimate(bx.inner.reverse(inner_loss, SGD, 2), loss)),
    "directions": (
        "outer_loss",
        lambda loss: bx.problem.directions(bx.BilevelProblem(loss, inner_loss), *[POINT] * 3, BATCH),
    ),
    "inner_gradient": ("inner_loss", lambda loss: bx.problem.inner_gradient(loss, POINT, POINT, None)),
    "hessian": ("inner_loss", lambda loss: bx.curvature.hessian(loss, POINT, POINT, None)),
    "exact": ("inner_loss", lambda loss: bx.ihvp.exact().prepare(None, (), loss, (POINT, POINT, None))),
    "own_y": ("inner_loss", lambda loss: estimate(bx.inner.implicit(loss))),
    **{m.__name__: ("inner_loss", lambda loss, m=m: estimate(m(loss, SGD, 2))) for m in METHODS},
}
BAD_LOSSES = {
    "vector": Case(
        lambda x, y, batch: (y - x) ** 2,
        ["must return a scalar", "got shape (3,)", "Reduce the examples with .mean()"],
    ),
    "integer": Case(
        lambda x, y, batch: jnp.argmax(y),
        ["must return a floating-point number", "got dtype int64", "Return a loss that can be differentiated"],
    ),
    "tuple": Case(
        lambda x, y, batch: (jnp.sum(y), {}),
        ["must return one floating-point number", "got tuple", "Return the loss alone"],
    ),
    "none": Case(
        lambda x, y, batch: None, ["must return one floating-point number", "got NoneType", "Return the loss alone"]
    ),
    "no_function": Case(3.0, ["must be a function (x, y, batch)", "got 3.0", "Pass the function"]),
}


@pytest.mark.parametrize(("role", "read"), READERS.values(), ids=READERS)
@mistakes(**BAD_LOSSES)
def test_loss(wrong, says, role, read):
    check(lambda: read(wrong), [role, *says])


# Points


@over_methods
@pytest.mark.parametrize("run", [estimate, solve])
@mistakes(
    integer_x=Case(
        lambda run, solver: run(solver, x=jnp.arange(3)),
        ["x must hold floating-point arrays only", "got int64 at x", "in the batch", ".astype(float)"],
    ),
    integer_leaf_of_y=Case(
        lambda run, solver: run(solver, y={"a": POINT, "count": jnp.arange(3)}),
        ["y must hold floating-point arrays only", "got int64 at y['count']", "in the batch", ".astype(float)"],
    ),
    key_in_y=Case(
        lambda run, solver: run(solver, y=(POINT, KEY)),
        ["y must hold floating-point arrays only", "got key<fry> at y[1]", "in the batch"],
    ),
    empty_x=Case(
        lambda run, solver: run(solver, x=()),
        ["x must hold at least one floating-point array", "got an empty pytree ()", "Pass the x that the losses read"],
    ),
    empty_y=Case(
        lambda run, solver: run(solver, y={"a": None}),
        [
            "y must hold at least one floating-point array",
            "got an empty pytree {'a': None}",
            "Pass the y that the losses read",
        ],
    ),
)
def test_point(wrong, says, run, method):
    check(lambda: wrong(run, method(inner_loss, SGD, 2)), says)


@mistakes(
    shape=Case(
        lambda: guided_at(jnp.ones(4)),
        ["x must keep its structure and shapes", "shapes [(4,)]", "expected", "[(3,)]", "init(x, y)"],
    ),
    structure=Case(
        lambda: guided_at({"a": POINT}),
        ["x must keep its structure and shapes", "{'a': *}", "expected PyTreeDef(*)", "init(x, y)"],
    ),
    integer=Case(
        lambda: estimate_at(x=jnp.ones(3, int)),
        ["x must", "int64", "floating-point"],
    ),
)
def test_x_and_its_state(wrong, says):
    check(wrong, says)


@pytest.mark.parametrize("batch", [POINT, (POINT, POINT), {"outer": POINT, "inner": POINT}, None])
def test_batch_that_is_not_a_batch(batch):
    says = ["batch must be a Batch", type(batch).__name__, "Pass bx.Batch(outer=..., inner=...)"]
    check(lambda: estimate_at(batch=batch), says)


INITS = {
    "hypergradient": lambda: bx.hypergradient(outer_loss, bx.inner.reverse(inner_loss, SGD, 1)),
    "two_phase": lambda: bx.two_phase(1, *2 * [bx.hypergradient(outer_loss, bx.inner.reverse(inner_loss, SGD, 1))]),
    "penalty": lambda: bx.penalty(bx.BilevelProblem(outer_loss, inner_loss), SGD, 1, multiplier=10.0),
    "full_zeroth_order": lambda: bx.hypergradients.full_zeroth_order(outer_loss, lambda x, y, batch: y),
}


@pytest.mark.parametrize("make", INITS.values(), ids=INITS)
def test_init_takes_the_batch_of_estimate_or_none(make):
    hypergrad = make()
    check(lambda: hypergrad.init(POINT, POINT, POINT), ["batch must be a Batch", "Pass bx.Batch(outer=..., inner=...)"])
    for batch in (None, bx.Batch(POINT, POINT)):
        np.testing.assert_array_equal(hypergrad.init(POINT, POINT, batch).y, POINT)


# Numbers


COUNTS = {
    "reverse": ("steps", 0, lambda steps: bx.inner.reverse(inner_loss, SGD, steps)),
    "implicit": ("steps", 0, lambda steps: bx.inner.implicit(inner_loss, SGD, steps)),
    "no_gradient": ("steps", 0, lambda steps: bx.inner.no_gradient(inner_loss, SGD, steps)),
    "neumann": ("terms", 0, lambda terms: bx.ihvp.neumann(terms=terms, step_size=0.1)),
    "cg": ("maxiter", 1, lambda maxiter: bx.ihvp.cg(maxiter=maxiter)),
    "sgd": ("steps", 1, lambda steps: bx.ihvp.sgd(steps=steps, step_size=0.1, sample=bx.sampling.full)),
    "nystrom": ("rank", 1, lambda rank: bx.ihvp.nystrom(rank=rank)),
    "minibatch": ("size", 1, bx.sampling.minibatch),
    "epochs": ("size", 1, bx.sampling.epochs),
    "store_products": ("every", 1, bx.inner.store_products),
}


@pytest.mark.parametrize(("name", "minimum", "make"), COUNTS.values(), ids=COUNTS)
def test_counts(name, minimum, make):
    check(lambda: make(minimum - 1), [f"{name} must be an int >= {minimum}", f"got {minimum - 1}", f"Pass {name}="])
    check(lambda: make(2.5), [f"{name} must be a static Python int >= {minimum}", "got float", "Pass a plain int"])
    check(lambda: make(True), [f"{name} must be a static Python int", "got bool"])
    check(lambda: make("3"), [f"{name} must be a static Python int >= {minimum}", "got str", "Pass a plain int"])
    traced = jax.jit(lambda count: make(count) and count)
    check(lambda: traced(2), [f"{name} must be a static Python int", "Tracer", "cannot be traced", "static_argnums"])
    make(np.int32(minimum))


NUMBERS = {
    "identity": ("scale", bx.ihvp.identity),
    "exact": ("damping", lambda number: bx.ihvp.exact(damping=number)),
    "neumann": ("damping", lambda number: bx.ihvp.neumann(terms=1, step_size=0.1, damping=number)),
    "cg": ("damping", lambda number: bx.ihvp.cg(damping=number)),
    "cg_tol": ("tol", lambda number: bx.ihvp.cg(tol=number)),
    "sgd": ("damping", lambda number: bx.ihvp.sgd(steps=1, step_size=0.1, sample=bx.sampling.full, damping=number)),
    "nystrom": ("damping", lambda number: bx.ihvp.nystrom(rank=1, damping=number)),
    "linear": ("damping", lambda number: bx.ihvp.lineax(lineax.GMRES(1e-3, 1e-3), damping=number)),
    "damped": ("damping", lambda number: bx.curvature.damped(lambda v: v, number)),
}
over_numbers = pytest.mark.parametrize(("name", "make"), NUMBERS.values(), ids=NUMBERS)


@over_numbers
def test_nonnegative_numbers(name, make):
    for bad in (-1.0, NAN, np.inf, jnp.array(-0.5)):
        check(lambda bad=bad: make(bad), [f"{name} must be a finite number >= 0", f"got {bad!r}", f"Pass {name}="])
    make(0)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN])
def test_positive_numbers(bad):
    says = ["step_size must be a finite number > 0", f"got {bad}", "Pass a small positive step_size"]
    check(lambda: bx.ihvp.neumann(terms=1, step_size=bad), says)
    check(lambda: bx.ihvp.sgd(steps=1, step_size=bad, sample=bx.sampling.full), says)


@over_numbers
def test_what_is_no_number(name, make):
    for bad in ("0.1", None, 1j):
        check(lambda bad=bad: make(bad), [f"{name} must be a finite number", repr(bad)])


# What a method is made of


def updates_become(change):
    return optax.GradientTransformation(lambda y: (), lambda updates, state, y=None: (change(updates), state))


@over_methods
@mistakes(
    structure=Case(
        updates_become(lambda updates: {"a": updates}),
        ["y under the inner optimizer", "{'a': *}", "expected PyTreeDef(*) with shapes [(3,)]", "updates look like y"],
    ),
    shape=Case(
        updates_become(lambda updates: updates[:1]),
        ["y under the inner optimizer", "[(1,)]", "expected PyTreeDef(*) with shapes [(3,)]", "updates look like y"],
    ),
)
def test_optimizer_that_changes_y(wrong, says, method):
    check(lambda: estimate(method(inner_loss, wrong, 2)), says)


@over_methods
def test_optimizer_that_changes_its_state(method):
    growing = optax.GradientTransformation(
        lambda y: jnp.zeros(1), lambda updates, state, y=None: (updates, jnp.concatenate([state, state]))
    )
    check(
        lambda: estimate(method(inner_loss, growing, 2)),
        ["state of the inner optimizer", "[(2,)]", "expected", "[(1,)]", "keeps its shapes"],
    )


initial_says = ["y under initial", "expected PyTreeDef(*) with shapes [(3,)]", "initial(x)", "like y"]


@over_methods
@pytest.mark.parametrize("run", [estimate, solve])
@mistakes(
    structure=Case(lambda x: {"a": x}, [*initial_says, "{'a': *}"]),
    shape=Case(lambda x: x[:2], [*initial_says, "[(2,)]"]),
    none=Case(lambda x: None, [*initial_says, "None"]),
)
def test_initial_unlike_y(wrong, says, run, method):
    check(lambda: run(method(inner_loss, SGD, 2, initial=wrong)), says)


solve_says = ["y under solve", "expected PyTreeDef(*) with shapes [(3,)]", "solve(x, y0, batch)", "like y0"]


@pytest.mark.parametrize("run", [estimate, solve])
@mistakes(
    structure=Case(lambda x, y, batch: {"a": y}, [*solve_says, "{'a': *}"]),
    shape=Case(lambda x, y, batch: y[:2], [*solve_says, "[(2,)]"]),
    pair=Case(lambda x, y, batch: (y, {}), [*solve_says, "(*, {})"]),
)
def test_solve_that_returns_no_y(wrong, says, run):
    check(lambda: run(bx.inner.implicit(inner_loss, solve=wrong)), says)


@mistakes(
    optimizer_none=Case(
        lambda: bx.inner.reverse(inner_loss, None, 2),
        ["optimizer must be an optax.GradientTransformation", "got None", "Pass, say, optax.sgd(0.1)"],
    ),
    optimizer_none_in_no_gradient=Case(
        lambda: bx.inner.no_gradient(inner_loss, None, 2),
        ["optimizer must be an optax.GradientTransformation", "got None", "Pass, say, optax.sgd(0.1)"],
    ),
    optimizer_number=Case(
        lambda: bx.inner.reverse(inner_loss, 0.1, 2),
        ["optimizer must be an optax.GradientTransformation", "got 0.1", "Pass, say, optax.sgd(0.1)"],
    ),
    optimizer_missing=Case(
        lambda: bx.inner.implicit(inner_loss, steps=2),
        ["optimizer must be given for steps > 0", "got None with steps=2", "Pass, say, optax.sgd(0.1)"],
    ),
    solve_and_steps=Case(
        lambda: bx.inner.implicit(inner_loss, SGD, 2, solve=lambda x, y, batch: y),
        ["solve replaces the steps", "got solve and steps=2", "Drop one of them"],
    ),
    preconditioner_not_linear=Case(
        lambda: bx.ihvp.cg(preconditioner=bx.ihvp.cg()),
        ["preconditioner must be an IHVP whose apply is linear", "got one that is not", "Pass ihvp.identity"],
    ),
    preconditioner_function=Case(
        lambda: bx.ihvp.cg(preconditioner=lambda r: r),
        ["preconditioner must be an IHVP", "got <lambda>", "called"],
    ),
    ihvp_not_called=Case(
        lambda: bx.inner.implicit(inner_loss, ihvp=bx.ihvp.cg),
        ["ihvp must be an IHVP", "got cg", "bx.ihvp.cg(maxiter=10), called"],
    ),
    ihvp_for_steps=Case(
        lambda: bx.inner.implicit(inner_loss, SGD, bx.ihvp.cg()), ["steps must be a static Python int", "got IHVP"]
    ),
    steps_forgotten=Case(lambda: bx.inner.implicit(inner_loss, SGD), ["steps must be given", "got None", "steps=10"]),
    optimizer_not_called=Case(
        lambda: bx.inner.reverse(inner_loss, optax.adam, 2),
        ["optimizer must be an optax.GradientTransformation", "function adam", "optax.sgd(0.1)"],
    ),
    optimizer_made_of_x_not_called=Case(
        lambda: estimate(bx.inner.reverse(inner_loss, lambda x: optax.sgd, 2)),
        ["optimizer(x) must be a GradientTransformation", "got sgd", "optax.sgd(x)"],
    ),
    checkpoint_true=Case(
        lambda: bx.inner.reverse(inner_loss, SGD, 2, checkpoint=True),
        ["checkpoint must be a Checkpoint", "got True", "every_step"],
    ),
    initial_array=Case(
        lambda: bx.inner.reverse(inner_loss, SGD, 2, initial=POINT), ["initial must be a function (x)", "Array("]
    ),
    sample_not_called=Case(
        lambda: bx.inner.reverse(inner_loss, SGD, 2, sample=bx.sampling.minibatch),
        ["sample must be a function (key, t, data)", "got minibatch(size", "Give it these arguments"],
    ),
    sample_number=Case(
        lambda: bx.inner.implicit(inner_loss, SGD, 2, cross_sample=32),
        ["cross_sample must be a function (key, t, data)", "got 32", "Pass the function"],
    ),
    solve_arguments=Case(
        lambda: bx.inner.implicit(inner_loss, solve=lambda x, y: y),
        ["solve must be a function (x, y0, batch)", "(x, y)"],
    ),
    loss_arguments=Case(
        lambda: bx.hypergradient(lambda y, batch: 0.0, bx.inner.implicit(inner_loss)),
        ["outer_loss must be a function (x, y, batch)", "(y, batch)", "Give it these arguments"],
    ),
    key_number=Case(
        lambda: bx.differentiable(bx.inner.reverse(inner_loss, SGD, 2))(POINT, POINT, None, 0),
        ["key must be one jax.random.key", "got ", "jax.random.key(0)"],
    ),
    keys_stacked=Case(
        lambda: bx.differentiable(bx.inner.reverse(inner_loss, SGD, 2))(
            POINT, POINT, None, jax.random.split(jax.random.key(0), 3)
        ),
        ["key must be one jax.random.key", "shape (3,)", "jax.vmap"],
    ),
    arguments_swapped=Case(
        lambda: bx.hypergradient(outer_loss, bx.inner.implicit(inner_loss)).estimate(None, POINT, (), BATCH),
        ["state must be a HypergradientState", "estimate(key, state, x, batch)"],
    ),
    text_in_y=Case(
        lambda: estimate(bx.inner.implicit(inner_loss), y={"activation": "relu"}),
        ["y must hold floating-point arrays only", "y['activation']", "Leave out what is no array"],
    ),
    complex_y=Case(
        lambda: estimate(bx.inner.implicit(inner_loss), y={"w": jnp.ones(2, complex)}),
        ["got complex128 at y['w']", "its real and imaginary parts as two arrays"],
    ),
    key_in_x=Case(
        lambda: estimate(bx.inner.implicit(inner_loss), x={"w": POINT, "key": KEY}),
        ["got key<fry> at x['key']", "Keep counts, labels and keys in the batch."],
    ),
    module_of_equinox=Case(
        lambda: solve(bx.inner.implicit(inner_loss), y=eqx.nn.MLP(2, 1, 3, 1, key=KEY)),
        ["at y.activation", "eqx.partition(model, eqx.is_inexact_array)", "eqx.combine(y, rest)"],
    ),
    module_of_nnx=Case(
        lambda: solve(bx.inner.implicit(inner_loss), x=[nnx.Linear(2, 1, rngs=nnx.Rngs(0))]),
        ["got a Linear at x[0]", "graph, x, rest = nnx.split(model, nnx.Param, ...)", "nnx.merge(graph, x, rest)"],
    ),
    text_in_the_batch=Case(
        lambda: solve(bx.inner.implicit(inner_loss), batch={"names": np.array(["a", "b"])}),
        ["batch must hold arrays and numbers only", "got <U1 at batch['names']", "Number what has names"],
    ),
    objects_in_the_batch=Case(
        lambda: solve(bx.inner.implicit(inner_loss), batch=[np.array([None])]),
        ["batch must hold arrays and numbers only", "got a ndarray at batch[0]"],
    ),
    closed_over_learning_rate=Case(
        lambda: jax.grad(
            lambda rate: bx.differentiable(bx.inner.reverse(inner_loss, optax.sgd(rate), 2))(POINT, POINT, None).sum()
        )(0.1),
        ["solver must not close over a value that is differentiated", "Move it into x", "lambda x: optax.sgd(x)"],
    ),
    initial_of_integers=Case(
        lambda: estimate(bx.inner.reverse(inner_loss, SGD, 2, initial=lambda x: jnp.arange(3))),
        ["y under initial must hold floating-point arrays", "int64"],
    ),
    curvature_missing=Case(
        lambda: bx.ihvp.cg(curvature=None), ["curvature must be a function (inner_loss, x, y, batch)", "got None"]
    ),
    sample_of_an_ihvp=Case(
        lambda: bx.ihvp.exact(sample=bx.sampling.minibatch), ["sample must be a function (key, t, data)", "minibatch"]
    ),
    tail_no_function=Case(
        lambda: bx.ihvp.nystrom(rank=3, tail=0.0), ["tail must be a function (eigenvalues)", "got 0.0"]
    ),
    tail_no_number=Case(
        lambda: bx.ihvp.nystrom(rank=3, damping=1.0, tail=lambda e: e).prepare(
            KEY, (), inner_loss, (POINT, POINT, None)
        ),
        ["tail must return one number; got shape (3,)", "tail=jnp.min"],
    ),
    solver_not_of_lineax=Case(
        lambda: bx.ihvp.lineax(bx.ihvp.cg()),
        ["solver must be an AbstractLinearSolver", "got cg()", "Pass, say, lineax.GMRES(rtol=1e-6, atol=1e-6)."],
    ),
    sgd_as_preconditioner=Case(
        lambda: bx.ihvp.cg(preconditioner=bx.ihvp.sgd(steps=3, step_size=0.1, sample=bx.sampling.full)),
        ["preconditioner must be an IHVP whose apply is linear", "Pass ihvp.identity"],
    ),
    solver_none=Case(
        lambda: bx.hypergradient(outer_loss, None),
        ["solver must be an InnerSolver", "got None"],
    ),
    link_none=Case(
        lambda: bx.inner.chain(bx.inner.reverse(inner_loss, SGD, 2), None),
        ["last must be an InnerSolver", "got None", "nest chains"],
    ),
    links_differ=Case(
        lambda: estimate(
            bx.inner.chain(bx.inner.reverse(inner_loss, SGD, 1), bx.inner.reverse(inner_loss, MOMENTUM, 1))
        ),
        ["optimizer state between the links of a chain", "EmptyState", "expected", "TraceState", "the same optimizer"],
    ),
    momentum_under_implicit=Case(
        lambda: estimate(
            bx.inner.chain(bx.inner.implicit(inner_loss, MOMENTUM, 1), bx.inner.reverse(inner_loss, MOMENTUM, 1))
        ),
        ["optimizer of inner.implicit must keep no momentum", "got a state with 1", "Use optax.sgd without momentum"],
    ),
    adam_under_implicit=Case(
        lambda: jax.grad(
            lambda x: jnp.sum(
                solve(bx.inner.chain(bx.inner.implicit(inner_loss, ADAM, 1), bx.inner.reverse(inner_loss, ADAM, 1)), x)
            )
        )(POINT),
        ["optimizer of inner.implicit must keep no momentum", "got a state with 2", "Use optax.sgd without momentum"],
    ),
    minibatch_without_key=Case(
        lambda: estimate(
            bx.inner.reverse(mean_loss, SGD, 1, sample=bx.sampling.minibatch(2)), batch=bx.Batch(None, jnp.ones((5, 3)))
        ),
        ["key must be a jax.random.key", "got None", "Pass key=jax.random.key(0)"],
    ),
    minibatch_without_key_in_differentiable=Case(
        lambda: solve(bx.inner.reverse(mean_loss, SGD, 1, sample=bx.sampling.minibatch(2)), batch=jnp.ones((5, 3))),
        ["key must be a jax.random.key", "got None", "Pass key=jax.random.key(0)"],
    ),
    minibatch_of_unequal_lengths=Case(
        lambda: bx.sampling.minibatch(2)(KEY, 0, (jnp.ones((5, 3)), jnp.ones(4))),
        ["arrays with one common leading axis", "got leading axes [4, 5]", "one row per example"],
    ),
    epochs_of_fewer_rows=Case(
        lambda: bx.sampling.epochs(6)(KEY, 0, jnp.ones((5, 3))),
        ["size of epochs must be at most the 5 examples", "got 6", "Pass mask=lambda batch, weights"],
    ),
    epochs_with_weights_for_a_mask=Case(
        lambda: bx.sampling.epochs(6, mask=jnp.ones(6)),
        ["mask must be a function (batch, weights)", "Pass the function itself"],
    ),
    epochs_of_unequal_lengths=Case(
        lambda: bx.sampling.epochs(2)(KEY, 0, (jnp.ones((5, 3)), jnp.ones(4))),
        ["arrays with one common leading axis", "got leading axes [4, 5]", "one row per example"],
    ),
    minibatch_of_scalars=Case(
        lambda: bx.sampling.minibatch(2)(KEY, 0, {"l2": 0.1}),
        ["arrays with one common leading axis", "got leading axes []", "one row per example"],
    ),
    minibatch_of_nothing=Case(
        lambda: bx.sampling.minibatch(2)(KEY, 0, jnp.ones((0, 3))),
        ["batch must hold at least one example", "leading axes [0]"],
    ),
)
def test_parts(wrong, says):
    check(wrong, says)


# Derivatives that are refused


def weighted_loss(x, y, batch):
    return jnp.sum(batch["weight"] * (y - x) ** 2) + jnp.sum(batch["rows"][batch["index"]] * y)


@pytest.fixture(params=METHODS)
def meta_loss(request):
    """A function of (x, weight), both of which reach a differentiable solve; keys and counts ride in the batch."""
    solve = bx.differentiable(request.param(weighted_loss, SGD, 2))

    def meta_loss(x, weight):
        batch = {"weight": weight, "rows": jnp.ones(3), "index": jnp.arange(3), "key": KEY}
        return jnp.sum(solve(x, POINT, batch) ** 2)

    return meta_loss


WEIGHT = jnp.array(1.0)
REFUSED = {
    "eager": lambda loss: jax.grad(loss, 1)(POINT, WEIGHT),
    "with_x": lambda loss: jax.grad(loss, (0, 1))(POINT, WEIGHT),
    "jit": lambda loss: jax.jit(jax.grad(loss, 1))(POINT, WEIGHT),
    "jit_inside": lambda loss: jax.grad(jax.jit(loss), 1)(POINT, WEIGHT),
    "vmap": lambda loss: jax.vmap(jax.grad(loss, 1), (None, 0))(POINT, jnp.ones(2)),
    "vmap_inside": lambda loss: jax.grad(lambda w: jax.vmap(loss, (None, 0))(POINT, w).sum())(jnp.ones(2)),
    "through_x": lambda loss: jax.grad(lambda x: loss(x, x[0]))(POINT),
}
ALLOWED = {
    "traced": lambda loss: jax.jit(jax.grad(loss))(POINT, WEIGHT),
    "batched": lambda loss: jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(POINT, jnp.ones(2))[0],
    "stopped": lambda loss: jax.grad(lambda x: loss(x, jax.lax.stop_gradient(x[0])))(POINT),
    "stopped_jit": lambda loss: jax.jit(jax.grad(lambda x: jax.jit(loss)(x, jax.lax.stop_gradient(x[0]))))(POINT),
}


@pytest.mark.parametrize("differentiate", REFUSED.values(), ids=REFUSED)
def test_derivative_with_respect_to_the_batch(meta_loss, differentiate):
    says = ["batch", "must not be differentiated", "got", "batch['weight']", "into x", "jax.lax.stop_gradient"]
    check(lambda: differentiate(meta_loss), says)


@pytest.mark.compiles(180)  # some operation by operation
@pytest.mark.parametrize("differentiate", ALLOWED.values(), ids=ALLOWED)
def test_batch_may_be_traced_without_a_derivative(meta_loss, differentiate):
    np.testing.assert_allclose(differentiate(meta_loss), jax.jit(jax.grad(meta_loss))(POINT, 1.0), rtol=1e-12)


def cubed(solver):
    """x ↦ y(x)³ for the inner loss (y − x)²/2 and y_0 = 5."""
    solve = bx.differentiable(solver)
    return lambda x: solve(x, jnp.array(5.0), None) ** 3


def half_square(x, y, batch):
    return 0.5 * (y - x) ** 2


def gradient_of_cube(solver):
    hypergrad = bx.hypergradient(lambda x, y, batch: y**3, solver)
    return lambda x: hypergrad.estimate(None, hypergrad.init(x, jnp.array(5.0)), x, BATCH)[0]


SECOND_DERIVATIVES = {
    "grad_of_grad": lambda solver: jax.grad(jax.grad(cubed(solver))),
    "jit": lambda solver: jax.jit(jax.grad(jax.jit(jax.grad(cubed(solver))))),
    "hessian": lambda solver: jax.hessian(cubed(solver)),
    "grad_of_estimate": lambda solver: jax.grad(gradient_of_cube(solver)),
}
over_second_derivatives = pytest.mark.parametrize("twice", SECOND_DERIVATIVES.values(), ids=SECOND_DERIVATIVES)


@pytest.mark.compiles(100)  # some operation by operation
@over_second_derivatives
def test_second_derivative_of_reverse(twice):
    """After two half steps y = 0.75 x + 0.25 · 5."""
    solver = bx.inner.reverse(half_square, optax.sgd(0.5), 2)
    y = 0.75 * 3.0 + 0.25 * 5.0
    np.testing.assert_allclose(twice(solver)(3.0), 6 * y * 0.75**2, rtol=1e-14)


IMPLICIT = {
    "cg": bx.inner.implicit(half_square, optax.sgd(0.5), 2, ihvp=bx.ihvp.cg()),
    "exact": bx.inner.implicit(half_square, optax.sgd(0.5), 2, ihvp=bx.ihvp.exact()),
    "neumann": bx.inner.implicit(half_square, optax.sgd(0.5), 2, ihvp=bx.ihvp.neumann(terms=2, step_size=0.5)),
    "identity": bx.inner.implicit(half_square, optax.sgd(0.5), 2, ihvp=bx.ihvp.identity()),
    "sgd": bx.inner.implicit(
        half_square, optax.sgd(0.5), 2, ihvp=bx.ihvp.sgd(steps=2, step_size=0.5, sample=bx.sampling.full)
    ),
    "linear": bx.inner.implicit(half_square, optax.sgd(0.5), 2, ihvp=bx.ihvp.lineax(lineax.GMRES(1e-3, 1e-3))),
    "no_steps": bx.inner.implicit(half_square),
    "solve": bx.inner.implicit(half_square, solve=lambda x, y, batch: y),
}
CHAIN = bx.inner.chain(
    bx.inner.implicit(half_square, optax.sgd(0.5), 2), bx.inner.reverse(half_square, optax.sgd(0.5), 1)
)
refused_twice = ["does not differentiate an estimate", "got a derivative of its backward pass", "bx.differentiable"]


@pytest.mark.parametrize("solver", IMPLICIT.values(), ids=IMPLICIT)
def test_second_derivative_of_implicit(solver):
    """With v = c b of the IHVP and y'' = 0 it is 6 y c²."""
    solve = jax.jit(jax.value_and_grad(lambda x: bx.differentiable(solver)(x, jnp.array(5.0), None)))
    y, c = solve(3.0)
    np.testing.assert_allclose(jax.jit(jax.hessian(cubed(solver)))(3.0), 6 * y * c**2, rtol=1e-12)


@pytest.mark.compiles(90)  # some operation by operation
@pytest.mark.parametrize("solver", [IMPLICIT["exact"], bx.inner.fixed_point(lambda x, y, batch: x + y / 2), CHAIN])
def test_an_estimate_is_not_differentiated(solver):
    check(lambda: SECOND_DERIVATIVES["grad_of_estimate"](solver)(3.0), refused_twice, TypeError)


@pytest.mark.compiles(90)  # some operation by operation
@over_second_derivatives
def test_second_derivative_of_a_chain(twice):
    check(lambda: twice(CHAIN)(3.0), refused_twice, TypeError)


def test_forward_mode_of_differentiable():
    solve = bx.differentiable(bx.inner.reverse(inner_loss, SGD, 2))
    check(lambda: jax.jvp(lambda x: solve(x, POINT, None), (POINT,), (POINT,)), ["forward-mode"], TypeError)


def test_a_builtin_without_a_signature_is_taken_as_it_is():
    assert bx.inner.reverse(inner_loss, SGD, 2, initial=max)

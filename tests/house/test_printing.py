"""What `print` shows of the values and of the states: calls and shapes, in a few lines."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import curvature, ihvp, inner, printing
from bilevax.problem import IHVP


def affine(y, inputs):
    return inputs @ y["kernel"] + y["bias"][None]


def pair(x, batch):
    return batch


def loss(x, y, batch):
    return jnp.sum((y - x) ** 2)


def solve(x, y0, batch):
    return y0


def tail(damping):
    return ihvp.identity(damping)


def sharded(axis):
    return bx.hypergradient(loss, inner.zeroth_order(solve, axis=axis))


UNROLLED = bx.hypergradient(loss, inner.reverse(loss, optax.sgd(0.1), 1))
LOSS = curvature.ModelLoss(affine, curvature.squared_error, pair, l2=0.1)
Y = {"bias": jnp.ones(2, jnp.float32), "kernel": jnp.ones((3, 2), jnp.float32)}
BATCH = jnp.ones((5, 3), jnp.float32), jnp.ones((5, 2), jnp.float32)

VALUES = {
    "cg(maxiter=5)": lambda: ihvp.cg(maxiter=5),
    "cg(damping=0.1, preconditioner=nystrom(rank=3), curvature=gauss_newton)": lambda: ihvp.cg(
        damping=0.1, preconditioner=ihvp.nystrom(rank=3), curvature=curvature.gauss_newton
    ),
    "diagonal()": ihvp.diagonal,
    "ekfac(fisher=sampled(3))": lambda: ihvp.ekfac(fisher=curvature.fisher.sampled(3)),
    "exact(damping=0.5)": lambda: ihvp.exact(damping=jnp.asarray(0.5)),
    "identity(0.1)": lambda: ihvp.identity(0.1),
    "kfac(inverse=factored, sharing=reduce)": lambda: ihvp.kfac(
        inverse=curvature.kronecker.factored, sharing=curvature.reduce
    ),
    "neumann(terms=2, step_size=0.1, sample=minibatch(4))": lambda: ihvp.neumann(
        terms=2, step_size=0.1, sample=bx.sampling.minibatch(4)
    ),
    "random_neumann(terms=2, step_size=0.1)": lambda: ihvp.random_neumann(terms=2, step_size=0.1),
    "rescaled(kfac(), damping=0.0)": lambda: ihvp.rescaled(ihvp.kfac(), damping=0.0),
    "sgd(steps=3, step_size=0.1, sample=full)": lambda: ihvp.sgd(steps=3, step_size=0.1, sample=bx.sampling.full),
    "ModelLoss(model=affine, loss=squared_error, split=pair, l2=0.1)": lambda: LOSS,
    "implicit(loss, optax, steps=20, ihvp=cg(maxiter=5))": lambda: inner.implicit(
        loss, optax.sgd(0.1), steps=20, ihvp=ihvp.cg(maxiter=5)
    ),
    "reverse(loss, optax, 3, sample=minibatch(4), checkpoint=store_products(every=2))": lambda: inner.reverse(
        loss, optax.adam(0.1), 3, sample=bx.sampling.minibatch(4), checkpoint=inner.store_products(every=2)
    ),
    "chain(no_gradient(loss, optax, 3), reverse(loss, optax, 1, checkpoint=two_level))": lambda: inner.chain(
        inner.no_gradient(loss, optax.sgd(0.1), 3), inner.reverse(loss, optax.sgd(0.1), 1, checkpoint=inner.two_level)
    ),
    "unroll_with_tail(loss, 0.5, 4, unrolled=2, ihvp=tail)": lambda: inner.unroll_with_tail(
        loss, 0.5, 4, unrolled=2, ihvp=tail
    ),
    "forward_gradient(loss, optax, 3, sampler=hadamard, guide=several(blocks(4), running_mean(0.1)))": (
        lambda: inner.forward_gradient(
            *(loss, optax.sgd(0.1), 3),
            sampler=inner.random_directions.hadamard,
            guide=inner.guides.several(inner.guides.blocks(4), inner.guides.running_mean(0.1)),
        )
    ),
    "zeroth_order(solve, mu=0.1, difference=central)": lambda: inner.zeroth_order(
        solve, mu=0.1, difference=inner.central
    ),
    "hypergradient(loss, reverse(loss, optax, 1))": lambda: UNROLLED,
    "two_phase(3, hypergradient(loss, reverse(loss, optax, 1)), full_zeroth_order(loss, solve))": lambda: bx.two_phase(
        3, UNROLLED, bx.hypergradients.full_zeroth_order(loss, solve)
    ),
    "convex(<lambda>)": lambda: curvature.convex(lambda outputs, targets: outputs.sum(-1)),
}

PARTS = {
    "optax": optax.adam(0.1),
    "affine": affine,
    "float32[3, 2]": Y["kernel"],
    "float64[3]": np.ones(3),
    "2": jnp.asarray(2),
    "0.1": jnp.asarray(0.1, jnp.float32),
    "True": jnp.asarray(True),
    "key<fry>[]": jax.random.key(0),
    "[1, (2,), {'a': int32[4]}]": [1, (2,), {"a": jnp.zeros(4, jnp.int32)}],
    "Batch(outer=1, inner=None)": bx.Batch(1, None),
    f"[{', '.join('0' for _ in range(12))}, ...]": [0] * 100,
}


@pytest.mark.parametrize("text", VALUES)
def test_a_value_prints_as_its_call(text):
    value = VALUES[text]()
    assert repr(value) == str(value) == text


@pytest.mark.parametrize("text", PARTS)
def test_a_part_prints_in_a_few_words(text):
    assert printing.brief(PARTS[text]) == text


def test_lineax_prints_its_solver():
    lineax = pytest.importorskip("lineax")
    text = repr(ihvp.lineax(lineax.GMRES(rtol=1e-6, atol=1e-6), damping=0.1))
    assert text.startswith("lineax(GMRES(rtol=1e-06, ")
    assert text.endswith(", damping=0.1)")
    assert len(text) < 90


def test_directions_over_devices_print_as_their_call():
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("parts",))
    assert repr(bx.parallel.shard_directions(sharded, mesh)) == "shard_directions(sharded, Mesh)"


def test_a_value_made_by_hand_prints_its_fields():
    by_hand = IHVP(ihvp.cg().init, ihvp.cg().prepare)
    assert repr(by_hand) == "IHVP(init, prepare, spd)"
    assert repr(ihvp.cg(preconditioner=by_hand._replace(spd=True))) == "cg(preconditioner=IHVP(init, prepare, spd))"


def test_a_traced_number_prints_by_its_shape():
    seen = []

    @jax.jit
    def solve(damping):
        seen.append(repr(ihvp.cg(damping=damping, maxiter=3)))
        return damping

    solve(jnp.float32(0.5))
    assert seen == ["cg(damping=float32[], maxiter=3)"]


def test_states_print_by_shapes():
    state = ihvp.kfac(ema=0.95).init(0.0, Y, BATCH, LOSS)
    eigen = "Eigen(qa=float32[4, 4], qb=float32[2, 2], eigenvalues=float32[4, 2], tail=None)"
    assert str(state).splitlines() == [
        "KFACState(",
        "  step=0,",
        "  factors={'kernel': Kronecker(a=float32[4, 4], mass=0, b=float32[2, 2])},",
        "  parts=Parts(",
        f"    blocks={{'kernel': {eigen}}},",
        "    scale=0,",
        "  ),",
        ")",
    ]
    assert str(ihvp.diagonal().init(0.0, Y)).splitlines() == [
        "DiagonalState(",
        "  step=0,",
        "  moments={'bias': float32[2], 'kernel': float32[3, 2]},",
        ")",
    ]


def test_states_of_hypergradients_print_in_a_few_lines():
    x, y = jnp.ones(3, jnp.float32), {"a": jnp.ones((2, 2), jnp.float32)}
    implicit = bx.hypergradient(loss, inner.implicit(loss))
    assert str(implicit.init(x, y)).splitlines() == [
        "HypergradientState(",
        "  y={'a': float32[2, 2]},",
        "  solver=ImplicitState(v={'a': float32[2, 2]}, ihvp=()),",
        "  opt_state=EmptyState(),",
        "  t=0,",
        ")",
    ]
    assert str(bx.two_phase(3, implicit, UNROLLED).init(x, y)).splitlines()[:3] == [
        "TwoPhaseState(",
        "  y={'a': float32[2, 2]},",
        "  step=0,",
    ]
    chained = inner.chain(inner.implicit(loss, optax.sgd(0.1), 1), inner.reverse(loss, optax.sgd(0.1), 1)).init(x, y)
    assert str(chained) == "ChainState(\n  first=ImplicitState(v={'a': float32[2, 2]}, ihvp=()),\n  last=(),\n)"


MADE = {
    "hypergradient": lambda: UNROLLED[:2],
    "two_phase": lambda: bx.two_phase(1, UNROLLED, UNROLLED)[:2],
    "penalty": lambda: bx.penalty(bx.BilevelProblem(loss, loss), optax.sgd(0.1), 1, multiplier=10.0)[:2],
    "full_zeroth_order": lambda: bx.hypergradients.full_zeroth_order(loss, solve)[:2],
    "implicit": lambda: inner.implicit(loss)[:4],
    "reverse": lambda: inner.reverse(loss, optax.sgd(0.1), 1)[:4],
    "no_gradient": lambda: inner.no_gradient(loss, optax.sgd(0.1), 1)[:4],
    "chain": lambda: inner.chain(inner.implicit(loss), inner.implicit(loss))[:4],
    "zeroth_order": lambda: inner.zeroth_order(solve)[:4],
    "differentiable": lambda: [bx.differentiable(inner.implicit(loss))],
}


def of_ihvp(made):
    functions = [made.init, made.prepare]

    def prepare(key, y, batch):
        apply, state = made.prepare(key, made.init(0.0, y, batch, LOSS), LOSS, (0.0, y, batch))
        functions.append(apply)
        return state

    jax.eval_shape(prepare, jax.random.key(0), Y, BATCH)
    return functions


PROBLEM = bx.BilevelProblem(loss, loss)
MADE |= {
    "cg": lambda: of_ihvp(ihvp.cg()),
    "diagonal": lambda: of_ihvp(ihvp.diagonal()),
    "exact": lambda: of_ihvp(ihvp.exact()),
    "identity": lambda: of_ihvp(ihvp.identity()),
    "kfac": lambda: of_ihvp(ihvp.kfac()),
    "neumann": lambda: of_ihvp(ihvp.neumann(terms=2, step_size=0.1)),
    "nystrom": lambda: of_ihvp(ihvp.nystrom(rank=2)),
    "random_neumann": lambda: of_ihvp(ihvp.random_neumann(terms=2, step_size=0.1)),
    "rescaled": lambda: of_ihvp(ihvp.rescaled(ihvp.identity())),
    "sgd": lambda: of_ihvp(ihvp.sgd(steps=2, step_size=0.1, sample=bx.sampling.full)),
    "descent": lambda: bx.algorithms.descent(UNROLLED, 0.1)[:2],
    "amigo": lambda: bx.algorithms.amigo(PROBLEM, 0.1, sample=bx.sampling.full)[:2],
    "vrbo": lambda: bx.algorithms.vrbo(PROBLEM, 0.1, sample=bx.sampling.full, every=2, steps=1)[:2],
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_help_of_the_functions_that_were_made_says_what_comes(make):
    assert all(inspect.getdoc(function).endswith(".") for function in make())


def test_what_differentiable_returns_is_called_solve():
    assert bx.differentiable(inner.implicit(loss)).__name__ == "solve"


def test_a_traced_state_prints_like_a_concrete_one():
    seen = []
    jax.eval_shape(lambda state: seen.append(str(state)), ihvp.diagonal().init(0.0, Y))
    assert seen == [str(ihvp.diagonal().init(0.0, Y)).replace("step=0", "step=int32[]")]


FLOATS = {name: jnp.zeros((4, 2), jnp.float32) for name in "xy"}
OWN_STATES = {
    "adasdbo": (
        lambda problem, gossip: bx.decentralized.adasdbo(problem, gossip, 0.1),
        [
            "v=float32[4, 2]",
            "accumulated=Levels(x=float32[4], y=float32[4], v=float32[4])",
            "gossip=Levels(x=(), y=(), v=())",
        ],
    ),
    "ma_dsbo": (
        lambda problem, gossip: bx.decentralized.ma_dsbo(problem, gossip, 0.1, steps=1, v_steps=1),
        ["v=float32[4, 2]", "average=float32[4, 2]", "corrections=Levels("],
    ),
    "gbdsbo": (
        lambda problem, gossip: bx.decentralized.gbdsbo(problem, gossip, 0.1),
        [
            "last=Tracked(",
            "mixed=Tracked(",
            "gossip=()",
            "moves=((), ())",
        ],
    ),
}


@pytest.mark.parametrize("name", OWN_STATES)
def test_a_state_of_its_own_says_what_it_holds(name):
    make, parts = OWN_STATES[name]
    problem = bx.BilevelProblem(loss, loss)
    state = make(problem, bx.gossip(bx.topology.ring(4))).init(FLOATS["x"], FLOATS["y"])
    first, *lines, last = str(state).splitlines()
    assert (first.lower(), last) == (f"{name.replace('_', '')}state(", ")")
    fields = [line for line in lines if line[2] not in " )"]
    for line, start in zip(fields, ["k=0", "x=float32[4, 2]", "y=float32[4, 2]", *parts], strict=True):
        assert line.startswith(f"  {start}")
    assert max(map(len, lines)) < 120


def test_a_long_field_is_broken_over_lines():
    problem, ring = bx.BilevelProblem(loss, loss), bx.gossip(bx.topology.ring(4))
    state = bx.decentralized.sldbo(problem, ring, 0.1).init(FLOATS["x"], FLOATS["y"])
    lines = str(state._replace(corrections=(FLOATS, (), bx.Batch(["inner" * 20], 4 * (jnp.ones(3),))))).splitlines()
    start = lines.index("  corrections=(")
    assert lines[start : start + 8] == [
        "  corrections=(",
        "    {'x': float32[4, 2], 'y': float32[4, 2]},",
        "    (),",
        "    Batch(",
        f"      outer=['{'inner' * 11}inne],",
        "      inner=(float64[3], float64[3], float64[3], float64[3]),",
        "    ),",
        "  ),",
    ]
    assert all(len(line) < 120 for line in str(state).splitlines())


def estimated(hypergrad):
    x = jnp.ones(3)
    return jax.jit(lambda x: hypergrad.estimate(None, hypergrad.init(x, x), x, bx.Batch(None, None))[2])(x)


def test_the_info_of_an_estimate_prints_in_lines_with_its_numbers():
    info = estimated(bx.hypergradient(loss, inner.implicit(loss, ihvp=ihvp.cg(maxiter=3))))
    calls = "Calls(outer_gradients=1, inner_gradients=1, hessian_products=1, cross_products=1)"
    assert repr(info.inner.calls) == calls
    assert repr(info.inner.detail).startswith("IHVPInfo(iterations=0, products=1, setup_products=0, residual=0, ")
    assert repr(info).splitlines()[:6] == [
        "HypergradientInfo(",
        "  outer_loss=0,",
        "  inner=SolverInfo(",
        "    inner_loss=0,",
        "    gradient_norm=0,",
        "    breakdown=False,",
    ]
    assert f"    calls={calls}," in repr(info).splitlines()
    assert "\n" not in repr(info.inner)
    assert "  phase=0,\n  first=HypergradientInfo(\n    outer_loss=0," in repr(
        estimated(bx.two_phase(1, UNROLLED, UNROLLED))
    )
    penalty = estimated(bx.penalty(bx.BilevelProblem(loss, loss), optax.sgd(0.1), 1, multiplier=10.0))
    assert repr(penalty.inner.detail) == "PenaltyDetail(multiplier=10, gap=0, gradient_norm=0)"
    detail = inner.DirectionalInfo(*map(np.float32, range(7)))
    assert repr(detail).startswith("DirectionalInfo(variance=0, relative_error=1, cosine=2, ")


def test_a_problem_prints_its_losses_by_name():
    assert repr(bx.BilevelProblem(loss, LOSS)) == "BilevelProblem(outer_loss=loss, inner_loss=ModelLoss)"
    with pytest.raises(ValueError, match=r"got BilevelProblem\(outer_loss=loss, inner_loss=loss\)"):
        bx.hypergradient(loss, bx.BilevelProblem(loss, loss))


def test_a_constructor_of_what_has_no_text_is_told_so():
    with pytest.raises(TypeError, match=r"^pair must return a NamedTuple with a field text.*; got int"):
        printing.as_called(pair)(None, 3)

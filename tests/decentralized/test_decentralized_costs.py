"""What a decentralized method says that it costs is what it costs."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from cases import ATC, ED, EXTRA, GT, KEY, LAZY_SQUARE, STEPS, make

import bilevax as bx
from bilevax import coins, decentralized
from bilevax.testing.problems import quadratic
from bilevax.testing.problems._quadratic import PROBLEM, inner_loss

pytestmark = pytest.mark.usefixtures("uncached")

LINEAR = bx.BilevelProblem(
    lambda x, y, batch: jnp.sum(x) + jnp.sum(y), lambda x, y, batch: 0.5 * jnp.sum(y**2) + jnp.sum(x) * y[0]
)


ALL_DATA, SERIES = {"sample": bx.sampling.full, "momentum": 0.1}, {"terms": 3, "inverse_step": 0.1}
RECURSIVE = {**ALL_DATA, "rate": 1.0}


def sparkle(*forms):
    return make(decentralized.sparkle, correction=bx.Levels(*(form() for form in forms)))


FIFTH = bx.agents.compression.top_k(0.2)
COSTS = {  # bytes to each neighbour for d_x = 784 and d_y = 7840; F, G, H and J per agent; rounds
    "sldbo": (make(decentralized.sldbo), 131_712, (1, 1, 1, 1), 1),
    "sldbo_atc": (make(decentralized.sldbo, radius=None, correction=ATC()), 131_712, (1, 1, 1, 1), 2),
    "s3ldbo": (make(decentralized.s3ldbo, coins=coins.independent(0.5)), 131_712, None, 1),
    "s3ldbo_unbiased": (make(decentralized.s3ldbo_unbiased, probability=0.5), 131_712, None, 1),
    "dsvrbgd": (make(decentralized.dsvrbgd, **RECURSIVE), 131_712, (2, 2, 2, 2), 1),
    "dsvrbgd_alternating": (make(decentralized.dsvrbgd, **RECURSIVE, alternating=True), 131_712, (2, 4, 2, 2), 3),
    "sparkle_gt": (sparkle(GT, GT, GT), 131_712, (1, 2, 1, 1), 3),
    "sparkle_ed": (sparkle(ED, ED, ED), 65_856, (1, 2, 1, 1), 3),
    "sparkle_extra": (sparkle(EXTRA, EXTRA, EXTRA), 65_856, (1, 2, 1, 1), 3),
    "sparkle_mixed": (sparkle(GT, ED, EXTRA), 68_992, (1, 2, 1, 1), 3),
    "dsoba": (make(decentralized.dsoba), 65_856, (1, 1, 1, 1), 1),
    "dsoba_first_order": (make(decentralized.dsoba_first_order), 65_856, (1, 3, 0, 0), 1),
    "adasdbo": (make(decentralized.adasdbo), 65_868, (1, 1, 1, 1), 1),  # three numbers more
    "ma_dsbo": (make(decentralized.ma_dsbo, steps=10, v_steps=10), 943_936, (1, 11, 10, 1), 21),
    "ma_dsbo_tracked": (make(decentralized.ma_dsbo, steps=10, v_steps=10, track=True), 1_260_672, (1, 11, 10, 1), 21),
    "mdbo": (make(decentralized.mdbo, **RECURSIVE, **SERIES), 68_992, (1, 1, 3, 1), 1),
    "vrdbo": (make(decentralized.vrdbo, **RECURSIVE, **SERIES), 68_992, (2, 2, 6, 2), 1),
    "interact": (make(decentralized.interact, **SERIES), 6_272, (1, 1, 3, 1), 1),
    "interact_svr": (
        make(decentralized.interact_svr, **SERIES, every=2, sample=bx.sampling.full),
        6_272,
        (2, 2, 6, 2),
        1,
    ),
    "diamond": (make(decentralized.diamond, **ALL_DATA, **SERIES), 6_272, (2, 2, 6, 2), 1),
    "lopa_local": (make(decentralized.lopa_local), 3_136, (1, 1, 1, 1), 1),
    "lopa_tracking": (make(decentralized.lopa_tracking), 6_272, (1, 1, 1, 1), 1),
    # 2 · 784 numbers and 40 messages of 1568 values; half of the compressed bytes are indices
    "c2dfb": (
        make(decentralized.c2dfb, steps=10, multiplier=10.0, compressor=FIFTH, gossip_step=0.2),
        508_032,
        (11, 22, 0, 0),
        11,
    ),
}


MATRICES = {  # those that send some, for d_x = 3 and d_y = 5
    "gbdsbo": (make(decentralized.gbdsbo), 4 * (6 + 15 + 15 + 25), (1, 1, 5, 5), 1),
    "gbdsbo_factors": (
        make(decentralized.gbdsbo, sample=bx.sampling.full, terms=4, inverse_step=0.1),
        4 * (6 + 15 + 15 + 100),
        (1, 4, 20, 5),
        1,
    ),
}


@functools.cache
def infos():
    """Of all methods by one program, at the second iteration: the first one of a snapshot finds the point of init."""
    batch = bx.Batch(outer=jnp.zeros((4, 1)), inner=jnp.zeros((4, 1)))

    def info(key, name, preset):
        method, sizes = preset(LINEAR, LAZY_SQUARE), (3, 5) if name in MATRICES else (784, 7840)
        state = method.init(*(jnp.zeros((4, d), jnp.float32) for d in sizes), batch)
        second = state._replace(k=jnp.ones_like(state.k))
        return method.step(key, second, batch)[1]._replace(moves=None, breakdown=None)

    return jax.jit(lambda key: {name: info(key, name, row[0]) for name, row in {**COSTS, **MATRICES}.items()})(KEY)


@pytest.mark.parametrize("name", [*COSTS, *MATRICES])
def test_declared_cost(name):
    _, size, calls, rounds = {**COSTS, **MATRICES}[name]
    got = infos()[name]
    np.testing.assert_array_equal(got.bytes, np.full(4, 2 * size))
    assert got.rounds == rounds
    for count, expected in zip(got.calls, calls or [got.calls.outer_gradients] * 4, strict=True):
        np.testing.assert_array_equal(count, np.broadcast_to(expected, 4))
    assert set(np.asarray(got.calls.outer_gradients).tolist()) <= ({0, 1} if calls is None else {calls[0]})


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


WIDE = quadratic(0, n=4, dx=48, dy=64)


@pytest.mark.parametrize("name", ["sldbo", "dsvrbgd_alternating"])
def test_declared_calls_are_those_of_the_compiled_program(name):
    """Products with matrices of 64 rows are nearly all of the work, and the compiler counts them."""
    x, y = networks.zeros(WIDE.batch)
    unit = flops(jax.vmap(functools.partial(bx.problem.directions, PROBLEM)), x, y, y, WIDE.batch)
    gradient = flops(jax.vmap(jax.grad(inner_loss, 1)), x, y, WIDE.batch.inner)
    method = COSTS[name][0](PROBLEM, LAZY_SQUARE)
    state = jax.eval_shape(method.init, x, y)
    compiled = flops(lambda state, batch: method.step(None, state, batch)[0], state, WIDE.batch)
    f, g, *_ = COSTS[name][2]
    least = f * unit  # the second linearization of a quadratic costs nothing
    assert least < compiled < 1.05 * (least + (g - f) * gradient)


def test_skipping_really_skips():
    """A subset evaluates its own agents only; a common coin stays a branch of the program."""
    q = quadratic(0, n=16, dx=48, dy=64)
    gossip, (x, y) = bx.gossip(bx.topology.ring(16)), networks.zeros(q.batch)

    def compiled(method):
        state = jax.eval_shape(method.init, x, y, q.batch)
        return jax.jit(lambda key, state, batch: method.step(key, state, batch)[0]).lower(KEY, state, q.batch).compile()

    everybody = compiled(decentralized.sldbo(PROBLEM, gossip, STEPS))
    some = compiled(decentralized.s3ldbo(PROBLEM, gossip, STEPS, coins=coins.subset(0.25)))
    assert some.cost_analysis()["flops"] < 0.35 * everybody.cost_analysis()["flops"]
    assert " conditional(" in compiled(decentralized.s3ldbo(PROBLEM, gossip, STEPS, coins=coins.common(0.25))).as_text()
    assert " conditional(" not in everybody.as_text()

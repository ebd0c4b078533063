"""What every decentralized method, estimator and correction keeps, whatever it computes.

A new method enters `ALGORITHMS` by one line, and every contract below then holds it to account.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.testing import executed_dots

N = 4
KEY = jax.random.key(0)
STEPS = bx.Levels(0.02, 0.05, optax.constant_schedule(0.05))
RING = bx.gossip(bx.topology.ring(N))
LAZY = bx.gossip(bx.topology.lazy(bx.topology.ring(N)))
SMALL = bx.inner.minibatch(2)
ED, EXTRA, GT = bx.correction.exact_diffusion(), bx.correction.extra(), bx.correction.tracking()


def engine(estimator, correction=GT, gossip=RING, step_sizes=STEPS):
    return lambda problem, sample: bx.decentralized.single_loop(problem, gossip, step_sizes, estimator, correction)


def preset(make, *arguments, gossip=RING, **options):
    return lambda problem, sample: make(problem, gossip, STEPS, *arguments, **options)


def sampled(make, **options):
    return lambda problem, sample: make(problem, RING, STEPS, sample=sample, **options)


ADAM = bx.Levels(optax.adam(0.01), 0.05, optax.sgd(0.05, momentum=0.5))
CHOCO = bx.compression.choco(RING, bx.compression.top_k(0.5), 0.5)


COMPRESSED = {
    "inner_steps": 2,
    "multiplier": 10.0,
    "compressor": bx.compression.top_k(0.5),
    "gossip_step": 0.5,
}


def newton(ihvp):
    return bx.Levels(0.02, *[bx.decentralized.preconditioned(0.05, ihvp)] * 2)


ALGORITHMS = {
    "sldbo": preset(bx.decentralized.sldbo, radius=5.0),
    "s3ldbo_independent": preset(bx.decentralized.s3ldbo, bx.coins.independent(0.5)),
    "s3ldbo_common": preset(bx.decentralized.s3ldbo, bx.coins.common(0.5)),
    "s3ldbo_subset": preset(bx.decentralized.s3ldbo, bx.coins.subset(0.5, block=2)),
    "s3ldbo_unbiased": preset(bx.decentralized.s3ldbo_unbiased, 0.5),
    "dsvrbgd_simultaneous": sampled(bx.decentralized.dsvrbgd_simultaneous, momentum=0.5, rate=0.5),
    "dsvrbgd_alternating": sampled(bx.decentralized.dsvrbgd_alternating, momentum=0.5, rate=0.5),
    "sparkle_ed": preset(bx.decentralized.sparkle, ED, theta=0.5, gossip=LAZY),
    "sparkle_extra": preset(bx.decentralized.sparkle, EXTRA, gossip=LAZY),
    "sparkle_mixed": preset(bx.decentralized.sparkle, bx.Levels(GT, ED, EXTRA), gossip=LAZY),
    "dsoba": sampled(bx.decentralized.dsoba, theta=0.5),
    "spider": engine(bx.estimator.spider(3, SMALL)),
    "page": engine(bx.estimator.page(0.5, SMALL)),
    "saga": engine(bx.estimator.saga(2)),
    "atc": engine(bx.estimator.full(), bx.correction.tracking_atc()),
    "non_atc": engine(bx.estimator.full(), bx.correction.tracking_non_atc()),
    "adam": engine(bx.estimator.full(), step_sizes=ADAM),
    "one_peer": engine(bx.estimator.full(), gossip=bx.gossip(bx.topology.one_peer_exponential(N))),
    "push_sum": engine(bx.estimator.full(), gossip=bx.push_sum(bx.topology.exponential(N))),
    "choco": engine(bx.estimator.full(), gossip=CHOCO),
    "dsoba_first_order": sampled(bx.decentralized.dsoba_first_order, theta=0.5),
    "ma_dsbo": sampled(bx.decentralized.ma_dsbo, inner_steps=2, product_steps=3, theta=0.5),
    "ma_dsbo_tracked": sampled(bx.decentralized.ma_dsbo, inner_steps=2, product_steps=3, track=True, restart=True),
    "mdbo": sampled(bx.decentralized.mdbo, momentum=0.5, rate=0.5, terms=3, inverse_step=0.1),
    "vrdbo": sampled(bx.decentralized.vrdbo, momentum=0.5, rate=0.5, terms=3, inverse_step=0.1),
    "gbdsbo": sampled(bx.decentralized.gbdsbo),
    "gbdsbo_factors": sampled(bx.decentralized.gbdsbo, factors=2, inverse_step=0.1),
    "adasdbo": lambda problem, sample: bx.decentralized.adasdbo(problem, RING, 0.1, sample),
    "c2dfb": sampled(bx.decentralized.c2dfb, **COMPRESSED),
    "interact": preset(bx.decentralized.interact, 3, 0.1),
    "interact_svr": preset(bx.decentralized.interact_svr, 3, 0.1, 3, SMALL),
    "diamond": sampled(bx.decentralized.diamond, a=0.5, terms=3, inverse_step=0.1),
    "lopa_local": sampled(bx.decentralized.lopa_local, theta=0.5),
    "lopa_tracking": sampled(bx.decentralized.lopa_tracking),
    "preconditioned": engine(bx.estimator.full(), step_sizes=newton(bx.ihvp.identity())),
    "preconditioned_with_a_state": engine(bx.estimator.full(), step_sizes=newton(bx.ihvp.diagonal(eps=0.1))),
}
over = functools.partial(pytest.mark.parametrize, "name")


def mean_square(x, y, rows):
    (w,), scale = x, y["scale"]
    return jnp.mean((rows[:, :3] @ y["w"] - rows[:, 3:] @ w) ** 2) + jnp.sum(scale**2) + 0.1 * jnp.sum(w**2)


def regularized(x, y, rows):
    return mean_square(x, y, rows) + 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))


PROBLEM = bx.BilevelProblem(mean_square, regularized)


def make_point(dtype=jnp.float64):
    x, y = (jnp.ones(2, dtype),), {"w": jnp.zeros(3, dtype), "scale": jnp.ones((), jnp.float32)}
    return bx.replicate(x, N), bx.replicate(y, N)


def make_batch(dtype=jnp.float64):
    rows = np.random.default_rng(0).normal(size=(2, N, 6, 5))
    return bx.Batch(*jnp.asarray(rows, dtype))


@functools.cache
def jitted(name):
    """The method with its step compiled, and a counter of its traces."""
    algorithm, traces = ALGORITHMS[name](PROBLEM, SMALL), []

    def step(*arguments):
        traces.append(None)
        return algorithm.step(*arguments)

    return algorithm, jax.jit(step), traces


def spec(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf), jax.typeof(leaf).weak_type), tree)


@over(ALGORITHMS)
def test_state_keeps_its_form_and_its_dtypes(name):
    """In double, single and half precision, by tracing alone."""
    algorithm = ALGORITHMS[name](PROBLEM, SMALL)
    for dtype in (jnp.float64, jnp.float32, jnp.bfloat16):
        with jax.enable_x64(dtype == jnp.float64):
            x, y = make_point(dtype)
            batch = make_batch(dtype)
            state = jax.eval_shape(algorithm.init, x, y, batch)
            new, info = jax.eval_shape(algorithm.step, jax.eval_shape(lambda: jax.random.key(0)), state, batch)
        form = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state, new))
        assert form[0] == form[1]
        assert [leaf.dtype for leaf in jax.tree.leaves(state.x)] == [dtype]
        assert all(leaf.shape[0] == N for leaf in jax.tree.leaves((state, info)) if leaf.ndim)
        assert {leaf.shape for leaf in jax.tree.leaves(info._replace(rounds=()))} == {(N,)}


@over(ALGORITHMS)
def test_ten_steps_are_one_trace_and_move_every_agent(name):
    algorithm, step, traces = jitted(name)
    state = algorithm.init(*make_point(), make_batch())
    for key in jax.random.split(KEY, 10):
        state, info = step(key, state, make_batch())
        assert not info.breakdown.any()
    assert len(traces) == 1
    assert int(state.k) == 10
    assert all((moves > 0).all() for moves in info.moves if len(moves))


@over(["sldbo", "s3ldbo_subset", "dsvrbgd_alternating", "sparkle_mixed", "one_peer", "choco"])
def test_scan_equals_a_loop(name):
    algorithm, step, _ = jitted(name)
    start = state = algorithm.init(*make_point(), make_batch())
    keys, infos = jax.random.split(KEY, 5), []
    for key in keys:
        state, info = step(key, state, make_batch())
        infos.append(info)
    scanned = jax.lax.scan(lambda state, key: step(key, state, make_batch()), start, keys)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), scanned, (state, stacked))


@over(ALGORITHMS)
def test_nan_is_reported_by_the_agent_that_has_it(name):
    algorithm, step, _ = jitted(name)
    batch = make_batch()
    state = algorithm.init(*make_point(), batch)
    spoiled = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), state.y)
    _, info = step(KEY, state._replace(y=spoiled), batch)
    assert info.breakdown[2]


@over(["s3ldbo_common", "s3ldbo_subset", "dsvrbgd_alternating", "page", "saga", "choco"])
def test_vmap_over_keys_and_step_sizes_equals_a_loop(name):
    algorithm, step, _ = jitted(name)
    start = algorithm.init(*make_point(), make_batch())
    keys = jax.random.split(KEY, 3)

    def twice(key):
        return step(key, step(key, start, make_batch())[0], make_batch())

    together = jax.vmap(twice)(keys)
    one_by_one = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(twice(key) for key in keys))
    # a leaf of y is in single precision
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), together, one_by_one)


# Declared cost = compiled cost.


def costly_inner_loss(x, y, batch):
    """One A y in each gradient and in each pull-back, which contracts 11 to 7; one Bᵀv in each cross product."""
    A, B = batch
    return jnp.sum(jax.nn.softplus(A @ jnp.tanh(y + jnp.sum(x)))) + jnp.sum(y**2) + y @ (B @ x)


def costly_outer_loss(x, y, C):
    """One Cᵀr in each gradient, which contracts 13."""
    return jnp.sum(jax.nn.softplus(C @ (y * jnp.sum(x))))


CALLS = {  # per agent and iteration: ∇f, ∇_y g, Hessian products, cross products
    "sldbo": (1, 1, 1, 1),
    "s3ldbo_independent": None,  # evaluates all on one device, keeps the chosen
    "s3ldbo_unbiased": None,
    "s3ldbo_common": (1, 1, 1, 1),  # when the coin says so: the branch is counted
    "s3ldbo_subset": (0.5, 0.5, 0.5, 0.5),
    "dsvrbgd_simultaneous": (2, 2, 2, 2),
    "dsvrbgd_alternating": (2, 4, 2, 2),
    "sparkle_ed": (1, 2, 1, 1),
    "sparkle_extra": (1, 2, 1, 1),
    "sparkle_mixed": (1, 2, 1, 1),
    "dsoba": (1, 1, 1, 1),
    "atc": (1, 1, 1, 1),
    "non_atc": (1, 1, 1, 1),
    "saga": (1, 1, 1, 1),
    "dsoba_first_order": (1, 3, 0, 0),
    "ma_dsbo": (1, 3, 3, 1),
    "ma_dsbo_tracked": (1, 3, 3, 1),
    "mdbo": (1, 1, 3, 1),
    "vrdbo": (2, 2, 6, 2),
    "gbdsbo": lambda d: (1, 1, d, d),  # d entries of y
    "gbdsbo_factors": lambda d: (1, 2, 2 * d, d),
    "adasdbo": (1, 1, 1, 1),
    "c2dfb": (3, 6, 0, 0),
    "interact": (1, 1, 3, 1),
    "interact_svr": (1.65, 1.65, 4.95, 1.65),  # once on all data in 7 of 20 iterations, twice on samples in the others
    "diamond": (2, 2, 6, 2),
    "lopa_local": (1, 1, 1, 1),
    "lopa_tracking": (1, 1, 1, 1),
    "preconditioned": (1, 1, 1, 1),
}


def calls_of(name, d):
    return CALLS[name](d) if callable(CALLS[name]) else CALLS[name]


APART = ("dsvrbgd_alternating", "sparkle", "ma_dsbo", "mdbo", "vrdbo", "interact", "diamond")  # v and x do not share
UNREADABLE = (
    *("saga", "gbdsbo", "gbdsbo_factors"),  # the compiler merges products with all unit vectors of all agents
    "interact_svr",  # both branches are counted
)
DIFFERENCES = {"dsoba_first_order": 2, "c2dfb": 2}  # evaluations of ∇_x g, each with one Bᵀy


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="reads HLO text as it is printed since jax 0.10")
@over([name for name, calls in CALLS.items() if calls and name not in UNREADABLE])
def test_declared_calls_are_those_that_the_compiled_program_runs(name):
    random = np.random.default_rng(0)
    C, A, B = (jnp.asarray(random.normal(size=(N, *shape))) / 3 for shape in ((13, 11), (7, 11), (11, 5)))
    algorithm = ALGORITHMS[name](bx.BilevelProblem(costly_outer_loss, costly_inner_loss), bx.inner.full)
    state = algorithm.init(*bx.replicate((jnp.ones(5), jnp.ones(11)), N), bx.Batch(C, (A, B)))
    with jax.default_device(jax.devices("cpu")[0]):
        compiled = jax.jit(algorithm.step).lower(KEY, state, bx.Batch(C, (A, B))).compile()
    dots = executed_dots(compiled.as_text(), unknown_trips=1)

    def products(contracted, returned):
        """Per agent."""
        found = [dot for dot in dots if dot.contracted == contracted and returned in dot.returned]
        return sum(dot.times * math.prod(dot.returned) / returned for dot in found) / N

    outer_gradients, inner_gradients, hessian_products, cross_products = calls_of(name, 11)
    assert products(13, 11) == outer_gradients
    shared = 0 if name.startswith(APART) else cross_products  # one pull-back of v serves both products
    assert products(11, 7) == inner_gradients + hessian_products + cross_products - shared
    assert products(11, 5) == cross_products + DIFFERENCES.get(name, 0)


@over(CALLS)
def test_declared_calls_are_those_of_the_table(name):
    algorithm, step, _ = jitted(name)
    state = algorithm.init(*make_point(), make_batch())
    calls = []
    for key in jax.random.split(KEY, 20):
        state, info = step(key, state, make_batch())
        calls.append(jax.tree.leaves(info.calls))
    mean = np.array(calls).mean((0, 2))
    if CALLS[name] is None or name == "s3ldbo_common":
        assert 0 < mean[0] < 1
        assert (mean == mean[0]).all()
    else:
        assert tuple(mean) == calls_of(name, 4)

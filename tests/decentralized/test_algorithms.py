"""Every decentralized method keeps the contracts of `bilevax.testing.algorithm`.

A new method enters `METHODS` by one line; parts that `test_parts.py` checks one by one share methods. What takes a
program of its own is checked on methods that differ in how they draw, branch and remember; on all of them by `pytest -m
slow`.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import steps_of
from written import assert_read_back

import bilevax as bx
from bilevax.testing import AlgorithmSubject, algorithm, contract
from bilevax.testing.compiled import READABLE
from bilevax.testing.placement import DIRECTED

RING = bx.topology.ring(4)
SMALL = bx.sampling.minibatch(1)
GT, ED, EXTRA = (
    bx.single_loop.correction.tracking(),
    bx.single_loop.correction.exact_diffusion(),
    bx.single_loop.correction.extra(),
)
ATC, NON_ATC = bx.single_loop.correction.tracking_atc(), bx.single_loop.correction.tracking_non_atc()
ADAM = bx.Levels(optax.adam(0.01), 0.05, optax.sgd(0.05, momentum=0.5))
PLAIN = (1, 1, 1, 1)


def preset(make, **options):
    return lambda problem, gossip, steps, sample: make(problem, gossip, steps_of(make, steps), **options)


def sampled(make, **options):
    return lambda problem, gossip, steps, sample: make(problem, gossip, steps_of(make, steps), sample=sample, **options)


def engine(estimator, correction=GT, step_sizes=None):
    return lambda problem, gossip, steps, sample: bx.single_loop.single_loop(
        problem, gossip, step_sizes or steps, estimator, correction
    )


def choco(problem, gossip, steps, sample):
    compressed = bx.agents.compression.choco(gossip, bx.agents.compression.top_k(0.5), gossip_step=0.5)
    return bx.single_loop.single_loop(problem, compressed, steps, bx.single_loop.estimator.full(), GT)


def adasdbo(problem, gossip, steps, sample):
    return bx.decentralized.adasdbo(problem, gossip, 0.1, sample=sample)


def newton(y, v):
    steps = bx.Levels(0.02, bx.single_loop.preconditioned(0.05, y), bx.single_loop.preconditioned(0.05, v))
    return engine(bx.single_loop.estimator.full(), step_sizes=steps)


MOMENTUM = {"momentum": 0.5, "rate": 0.5}
SERIES = {"terms": 3, "inverse_step": 0.1}
COMPRESSED = {"steps": 2, "multiplier": 10.0, "compressor": bx.agents.compression.top_k(0.5), "gossip_step": 0.5}
MERGED = False  # not counted: the compiler merges products with all unit vectors of all agents
BRANCHES = False  # not counted: both branches of a cond would be
D = bx.decentralized
METHODS = {  # (problem, gossip, step_sizes, sample) -> method; declared calls of an iteration; graphs; counted
    "sldbo": (preset(D.sldbo, radius=5.0), PLAIN, RING),
    "s3ldbo_common": (preset(D.s3ldbo, coins=bx.coins.common(0.5)), None, RING),
    "s3ldbo_cyclic": (preset(D.s3ldbo, coins=bx.coins.cyclic(0.5, block=2), correction=ED), (0.5, 0.5, 0.5, 0.5)),
    "s3ldbo_predicted": (
        preset(D.s3ldbo, coins=bx.coins.subset(0.5, block=2), predict=bx.single_loop.prediction.secants(2)),
        (0.5, 0.5, 0.5, 0.5),
        RING,
        BRANCHES,
    ),
    "s3ldbo_unbiased": (preset(D.s3ldbo_unbiased, probability=0.5), None, RING),
    "dsvrbgd": (sampled(D.dsvrbgd, **MOMENTUM), (2, 2, 2, 2), RING),
    "dsvrbgd_alternating": (
        sampled(D.dsvrbgd, momentum=0.1, alternating=True, correction=bx.Levels(GT, ED, ED)),
        (2, 4, 2, 2),
    ),
    "sparkle_ed": (preset(D.sparkle, correction=ED, momentum=0.5), (1, 2, 1, 1)),
    "sparkle_mixed": (preset(D.sparkle, correction=bx.Levels(GT, ED, EXTRA)), (1, 2, 1, 1)),
    "dsoba": (sampled(D.dsoba, momentum=0.5), PLAIN, RING),
    "page": (engine(bx.single_loop.estimator.page(probability=0.5, sample=SMALL)), None, RING),
    "saga": (engine(bx.single_loop.estimator.saga(2)), PLAIN, RING, MERGED),
    "corrections": (engine(bx.single_loop.estimator.full(), bx.Levels(ATC, NON_ATC, EXTRA)), PLAIN),
    "adam_one_peer": (
        engine(bx.single_loop.estimator.full(), step_sizes=ADAM),
        PLAIN,
        bx.topology.one_peer_exponential(4),
    ),
    "push_sum": (engine(bx.single_loop.estimator.full()), PLAIN, DIRECTED),
    "choco": (choco, PLAIN, RING),
    "dsoba_first_order": (sampled(D.dsoba_first_order, momentum=0.5), (1, 3, 0, 0), RING),
    "ma_dsbo": (
        sampled(D.ma_dsbo, steps=2, v_steps=3, momentum=0.5, track=True, restart=True),
        (1, 3, 3, 1),
        RING,
    ),
    "mdbo": (sampled(D.mdbo, **MOMENTUM, **SERIES), (1, 1, 3, 1), RING),
    "vrdbo": (sampled(D.vrdbo, **MOMENTUM, **SERIES), (2, 2, 6, 2), RING),
    "gbdsbo": (sampled(D.gbdsbo), lambda d: (1, 1, d, d), RING, MERGED),  # d entries of y
    "gbdsbo_factors": (sampled(D.gbdsbo, terms=2, inverse_step=0.1), lambda d: (1, 2, 2 * d, d), RING, MERGED),
    "adasdbo": (adasdbo, PLAIN, RING),
    "c2dfb": (sampled(D.c2dfb, **COMPRESSED), (3, 6, 0, 0), RING),
    "interact": (preset(D.interact, **SERIES), (1, 1, 3, 1), RING),
    # once, then twice, twice
    "interact_svr": (preset(D.interact_svr, **SERIES, every=3, sample=SMALL), (1.6, 1.6, 4.8, 1.6), RING, BRANCHES),
    "diamond": (sampled(D.diamond, momentum=0.5, **SERIES), (2, 2, 6, 2), RING),
    "lopa_local": (sampled(D.lopa_local, momentum=0.5), PLAIN, RING),
    "lopa_tracking": (sampled(D.lopa_tracking), PLAIN, RING),
    "preconditioned": (newton(bx.ihvp.identity(), bx.ihvp.diagonal(eps=0.1)), PLAIN, RING),
}
EVERY_DAY = {  # methods of contracts that take a program or a trace of their own
    algorithm.state_keeps_its_form: (  # of parts see test_parts.py; these have code of their own beside
        *("s3ldbo_unbiased", "dsvrbgd", "adam_one_peer", "push_sum", "choco", "dsoba_first_order", "ma_dsbo"),
        *("gbdsbo", "gbdsbo_factors", "adasdbo", "c2dfb", "interact_svr", "lopa_tracking", "preconditioned"),
    ),
    algorithm.scan_equals_a_loop: ("s3ldbo_cyclic", "adam_one_peer"),
    algorithm.vmap_over_keys_equals_a_loop: ("s3ldbo_common",),
    algorithm.debuggers_find_nothing: ("s3ldbo_cyclic", "push_sum", "gbdsbo_factors"),
    algorithm.placement_changes_nothing: (  # of others the parts in test_parts.py, and test_parallel.py
        *("s3ldbo_unbiased", "push_sum", "choco", "gbdsbo_factors", "interact"),
    ),
}


@functools.cache
def subject(name):
    return AlgorithmSubject(*METHODS[name])


# Two contracts of this package's methods alone


@contract(
    "A coin at 1/2 chooses some: all four counts of an agent are those of its evaluations.",
    applies=lambda subject: subject.calls is None,
)
def calls_are_those_of_the_chosen(subject):
    _, _, infos = subject.history
    calls = np.asarray(jax.tree.map(lambda *parts: np.stack(parts), *[info.calls for info in infos]))
    assert (calls == calls[:1]).all()
    assert len(set(calls.flat)) == 2


def name_of(subject):
    return next(name for name, (make, *_) in METHODS.items() if make is subject.make)


APART = ("dsvrbgd_alternating", "sparkle", "ma_dsbo", "mdbo", "vrdbo", "interact", "diamond")  # v and x do not share


@contract(
    "One pull-back of v serves the Hessian and the cross product where x and v move at once.",
    applies=algorithm.calls_are_those_of_the_compiled_program.applies,
)
def pull_backs_are_shared(subject):
    name = name_of(subject)
    _, inner, hessian, cross = subject.calls
    _, passes, cross_found = subject.executed
    assert passes == inner + hessian + (cross if name.startswith(APART) else 0)
    assert cross_found == {"dsoba_first_order": 2, "c2dfb": 2}.get(name, cross)  # evaluations of ∇_x g


CONTRACTS = (*algorithm.CONTRACTS, calls_are_those_of_the_chosen, pull_backs_are_shared)


PROMOTES = (("adam_one_peer", algorithm.debuggers_find_nothing),)  # optax multiplies floats by whole numbers there


def pairs(often):
    """Methods and contracts of every day, or else those that remain."""
    return [
        pytest.param(name, one, id=f"{name}-{one.name}")
        for name in METHODS
        for one in CONTRACTS
        if one.applies(subject(name)) and (name, one) not in PROMOTES and (name in EVERY_DAY.get(one, METHODS)) == often
    ]


@pytest.mark.parametrize(("name", "contract"), pairs(often=True))
def test_contract(name, contract):
    contract.hold(name, subject(name))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "contract"), pairs(often=False))
def test_the_rest_of_the_product(name, contract):
    contract.hold(name, subject(name))


@pytest.mark.skipif(not READABLE, reason="reads HLO text as it is printed since jax 0.10")
def test_the_branch_of_a_common_coin_is_one_evaluation():
    """∇f once; ∇_y g, and one pull-back for the Hessian and the cross product."""
    assert subject("s3ldbo_common").executed == (1, 2, 1)


def test_states_are_written_and_read(tmp_path):
    """Of every method."""
    like = {
        name: jax.eval_shape(subject(name).method(subject(name).gossip).init, *subject(name).point) for name in METHODS
    }
    like = jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), like)
    other = jax.tree.map(lambda leaf: jnp.asarray(np.ones(leaf.shape, leaf.dtype)), like)
    assert_read_back(other, like, tmp_path)


def test_no_method_of_the_package_is_left_out():
    """Presets that stand in `METHODS` under other names are named here."""
    presets = {name for name in D.__all__ if inspect.isfunction(getattr(D, name))}
    others = {"s3ldbo", "sparkle"}
    assert presets - METHODS.keys() == others

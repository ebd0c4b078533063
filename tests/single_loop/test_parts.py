"""Every correction, estimator and gossip keeps the contracts of `bilevax.testing`; a new one enters by one line."""

import functools

import pytest

import bilevax as bx
from bilevax import coins
from bilevax.agents import compression
from bilevax.single_loop import correction as corrections
from bilevax.single_loop import estimator as estimators
from bilevax.testing import CorrectionSubject, EstimatorSubject, GossipSubject, correction, estimator, gossip
from bilevax.testing.placement import DIRECTED, LAZY_RING

ONE_PEER = bx.topology.one_peer_exponential(4)
CORRECTIONS = {
    "none": (corrections.none(), LAZY_RING, False),
    "none_damped": (corrections.none(0.5), LAZY_RING, False),
    "local": (corrections.local(), LAZY_RING, False),
    "tracking": (corrections.tracking(), LAZY_RING),
    "tracking_damped": (corrections.tracking(0.5), ONE_PEER),
    "tracking_atc": (corrections.tracking_atc(), ONE_PEER),
    "tracking_non_atc": (corrections.tracking_non_atc(), LAZY_RING),
    "exact_diffusion": (corrections.exact_diffusion(), LAZY_RING),
    "extra": (corrections.extra(), LAZY_RING),
    "tracking_directed": (corrections.tracking(), DIRECTED),
    "tracking_atc_directed": (corrections.tracking_atc(), DIRECTED),
    "tracking_non_atc_directed": (corrections.tracking_non_atc(), DIRECTED),
}
SMALL = bx.sampling.minibatch(2)
ESTIMATORS = {
    "full": estimators.full(),
    "stochastic": estimators.stochastic(SMALL),
    "momentum": estimators.momentum(0.2, sample=SMALL),
    "storm": estimators.storm(0.2, sample=SMALL),
    "spider": estimators.spider(every=3, sample=SMALL),
    "page": estimators.page(probability=0.3, sample=SMALL),
    "saga": estimators.saga(3),
    "snapshot_of_independent_agents": estimators.lazy_snapshot(coins.independent(0.4)),
    "snapshot_in_common": estimators.lazy_snapshot(coins.common(0.4)),
    "snapshot_of_a_subset": estimators.lazy_snapshot(coins.subset(0.5, block=2)),
    "snapshot_in_turn": estimators.lazy_snapshot(coins.cyclic(0.5, block=2)),
    "predicted_by_trusted_secants": estimators.lazy_snapshot(
        coins.subset(0.5, block=2), predict=bx.single_loop.prediction.trusted(bx.single_loop.prediction.secants(2))
    ),
}
RING = bx.gossip(bx.topology.ring(8))
GOSSIPS = {
    "shifts": (RING,),
    "dense": (bx.gossip(bx.topology.erdos_renyi(12, probability=0.4, seed=0)),),
    "edges": (bx.gossip(bx.topology.random_regular(600, degree=3, seed=0)),),
    "in_turn": (bx.gossip(ONE_PEER),),
    "push_sum": (bx.agents.push_sum(DIRECTED),),
    "top_k": (compression.choco(RING, compression.top_k(0.5), gossip_step=0.3), True),
    "random_k": (compression.choco(RING, compression.random_k(0.5), gossip_step=0.3), True),
    "sign": (compression.choco(RING, compression.sign(), gossip_step=0.3), True),
}


@functools.cache
def subject(name):
    if name in CORRECTIONS:
        return CorrectionSubject(*CORRECTIONS[name])
    return EstimatorSubject(ESTIMATORS[name]) if name in ESTIMATORS else GossipSubject(*GOSSIPS[name])


def pairs():
    for names, contracts in ((CORRECTIONS, correction), (ESTIMATORS, estimator), (GOSSIPS, gossip)):
        for name in names:
            for contract in contracts.CONTRACTS:
                if contract.applies(subject(name)):
                    yield pytest.param(name, contract, id=f"{name}-{contract.name}")


@pytest.mark.parametrize(("name", "contract"), list(pairs()))
def test_contract(name, contract):
    contract.hold(name, subject(name))

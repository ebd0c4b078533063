"""A state owns its arrays: none is the caller's, and none is there twice, so that it may be donated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx


def inner_loss(x, y, batch):
    return 0.5 * jnp.sum((y["w"] - x["w"]) ** 2) + jnp.sum(batch) * 0.0


def outer_loss(x, y, batch):
    return jnp.sum(y["w"] ** 2)


PROBLEM = bx.BilevelProblem(outer_loss, inner_loss)
ADAM = optax.adam(0.1)
IMPLICIT = bx.hypergradient(outer_loss, bx.inner.implicit(inner_loss, optax.sgd(1.0), 3))
UNROLLED = bx.hypergradient(outer_loss, bx.inner.reverse(inner_loss, optax.contrib.schedule_free_sgd(0.1), 2))
GUIDE = bx.inner.guides.running_mean(0.5)
PUSHED = bx.inner.forward_gradient(inner_loss, ADAM, 2, directions=2, guide=GUIDE)
HYPERGRADIENTS = {
    "implicit": IMPLICIT,
    "reverse": UNROLLED,
    "forward_gradient": bx.hypergradient(outer_loss, PUSHED),
    "penalty": bx.penalty(PROBLEM, ADAM, 2, multiplier=10.0),
    "two_phase": bx.two_phase(2, IMPLICIT, UNROLLED),
    "full_zeroth_order": bx.hypergradients.full_zeroth_order(outer_loss, lambda x, y, batch: x, directions=2),
}
A, D, FULL = bx.algorithms, bx.decentralized, bx.sampling.full
ONE_MACHINE = {
    "descent": A.descent(IMPLICIT, ADAM),
    "vrbo": A.vrbo(PROBLEM, (ADAM, 0.1, 0.1), sample=FULL, every=3),
    "amigo": A.amigo(PROBLEM, 0.1, sample=FULL),
    "srba": A.srba(PROBLEM, 0.1, sample=FULL, every=3),
}
RING, TRACKING = bx.gossip(bx.topology.ring(4)), bx.single_loop.correction.tracking()
COMPRESSED = {"steps": 2, "multiplier": 10.0, "compressor": bx.agents.compression.top_k(0.5), "gossip_step": 0.5}
FULL_DIRECTIONS = bx.single_loop.estimator.full()
AGENTS = {
    "sldbo": D.sldbo(PROBLEM, RING, 0.1),
    "adam": bx.single_loop.single_loop(PROBLEM, RING, bx.Levels(ADAM, 0.1, 0.1), FULL_DIRECTIONS, TRACKING),
    "dsvrbgd": D.dsvrbgd(PROBLEM, RING, 0.1, momentum=0.5, rate=0.5, sample=FULL),
    "ma_dsbo": D.ma_dsbo(PROBLEM, RING, 0.1, steps=2, v_steps=2, sample=FULL),
    "gbdsbo": D.gbdsbo(PROBLEM, RING, 0.1, sample=FULL),
    "adasdbo": D.adasdbo(PROBLEM, RING, 0.1, sample=FULL),
    "c2dfb": D.c2dfb(PROBLEM, RING, 0.1, **COMPRESSED),
}
ALL = HYPERGRADIENTS | ONE_MACHINE | AGENTS


def given(name):
    """One array for x, y and the batch."""
    w = jnp.asarray(np.ones((4, 3) if name in AGENTS else 3, np.float32))
    return {"w": w}, {"w": w}, bx.Batch(w, w)


def places(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.unsafe_buffer_pointer() for path, leaf in leaves}


@pytest.mark.compiles(60)
@pytest.mark.parametrize("name", ALL)
def test_no_two_arrays_share_memory(name):
    point = given(name)
    at = places(ALL[name].init(*point))
    theirs = set(places(point).values())
    assert len(theirs) == 1
    assert not [leaf for leaf, place in at.items() if place in theirs]
    assert len(set(at.values())) == len(at)


@pytest.mark.parametrize("name", ["penalty", "dsvrbgd"])
def test_a_state_may_be_donated(name):
    x, y, batch = given(name)

    def run(state, x, key, batch):
        if name in HYPERGRADIENTS:
            return ALL[name].estimate(key, state, x, batch)[1]
        return ALL[name].step(key, state, batch)[0]

    run, state = jax.jit(run, donate_argnums=0), ALL[name].init(x, y, batch)
    for _ in range(3):
        old, state = state, run(state, x, jax.random.key(0), batch)
        assert old.y["w"].is_deleted()
    assert not y["w"].is_deleted()
    assert np.isfinite(state.y["w"]).all()

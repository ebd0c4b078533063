"""Curvature of agents: what gossip makes of factors, and factors over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import findings, start

import bilevax as bx

AGENTS, ROWS = 4, 6
EXACT = bx.curvature.fisher.exact
LOSS = bx.curvature.ModelLoss(
    model=lambda y, inputs: jnp.tanh(inputs @ y["first"]) @ y["last"],
    loss=bx.curvature.softmax_cross_entropy,
    split=lambda x, batch: batch,
    weights=lambda x, batch: jnp.ones(len(batch[1])) * x,
    l2=0.1,
)


@jax.jit
def solve(found, x, batch, y):
    """With the factors of one agent."""
    return bx.curvature.inverted(found, LOSS, x, y, batch, damping=1e-2)(y)


def rounds_of(gossip, rounds):
    return jax.jit(lambda f: bx.agents.mix_factors(None, gossip, gossip.init(f), f, rounds=rounds)[0])


@pytest.fixture(scope="module")
def setting():
    keys = jax.random.split(jax.random.key(0), 4)
    y = {"first": jax.random.normal(keys[0], (3, 5)), "last": jax.random.normal(keys[1], (5, 2))}
    batch = (jax.random.normal(keys[2], (AGENTS, ROWS, 3)), jax.random.randint(keys[3], (AGENTS, ROWS), 0, 2))
    weights = jnp.array([0.5, 1.0, 1.5, 2.0])  # one for all examples of an agent

    def measure(x, batch):
        return bx.curvature.kronecker.factors(None, LOSS, x, y, batch, fisher=EXACT)

    return y, batch, weights, jax.jit(jax.vmap(measure))(weights, batch)


def test_one_round_on_a_complete_graph_is_the_curvature_of_all_data(setting):
    y, batch, weights, factors = setting
    gossip = bx.gossip(bx.topology.complete(AGENTS))
    mixed = rounds_of(gossip, 1)(factors)
    pooled = jax.tree.map(lambda leaf: leaf.reshape(AGENTS * ROWS, *leaf.shape[2:]), batch)
    pooled_loss = bx.curvature.ModelLoss(
        LOSS.model, LOSS.loss, LOSS.split, weights=lambda x, batch: jnp.repeat(x, ROWS), l2=0.1
    )
    point = (weights, y, pooled)

    @jax.jit
    def pooled_solve(b, point):
        return bx.ihvp.kfac(damping=1e-2, fisher=EXACT).prepare(None, (), pooled_loss, point)[0](b)[0]

    expected = pooled_solve(y, point)
    for agent in range(AGENTS):
        mine = jax.tree.map(lambda leaf, agent=agent: np.asarray(leaf)[agent], (mixed, weights, batch))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), solve(*mine, y), expected)
    alone = solve(*jax.tree.map(lambda leaf: np.asarray(leaf)[0], (factors, weights, batch)), y)
    assert not np.allclose(alone["last"], expected["last"], rtol=0.05), "agents must differ for this to be a test"


def test_rounds_on_a_ring_approach_the_mean(setting):
    _, _, _, factors = setting
    gossip = bx.gossip(bx.topology.ring(AGENTS))
    errors = []
    for rounds in (1, 5, 20):
        mixed = jax.tree.map(np.asarray, rounds_of(gossip, rounds)(factors))
        errors.append(max(np.abs(leaf - leaf.mean(0)).max() for leaf in jax.tree.leaves(mixed)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a.mean(0), b.mean(0), rtol=1e-12), mixed, factors)
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_the_mean_of_inverses_is_another_thing(setting):
    """Why factors travel and not what is made of them."""
    y, batch, weights, factors = setting
    every = jax.jit(jax.vmap(solve, (0, 0, 0, None)))
    inverses = every(factors, weights, batch, y)["last"].mean(0)
    mean = jax.tree.map(lambda leaf: np.broadcast_to(np.asarray(leaf).mean(0), leaf.shape), factors)
    inverse = every(mean, weights, batch, y)["last"][0]
    assert not np.allclose(inverses, inverse, rtol=0.05)


def test_bad_input(setting):
    y, batch, _, factors = setting
    gossip = bx.gossip(bx.topology.ring(8))
    with pytest.raises(ValueError, match=r"factors must have leaves \[8, ...\].*got shape \(4, "):
        bx.agents.mix_factors(None, gossip, (), factors)
    with pytest.raises(ValueError, match="rounds must be an int >= 1; got 0"):
        bx.agents.mix_factors(None, gossip, (), factors, rounds=0)
    with pytest.raises(ValueError, match="gossip must be a Gossip"):
        bx.agents.mix_factors(None, bx.topology.ring(8), (), factors)
    one = {"first": factors["first"]}
    with pytest.raises(
        ValueError, match=r"found must hold the factors of the blocks.*'first', 'last'.*got \['first'\]"
    ):
        bx.curvature.inverted(one, LOSS, 1.0, y, jax.tree.map(lambda leaf: leaf[0], batch))


def test_sharded_parameters():
    (found,) = findings(start(4, "sharded_curvature.py"))
    assert found["devices"] == 4
    assert found["off"] < 1e-10

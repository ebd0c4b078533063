"""The distance of agents to their mean is that of numpy, wherever the agents are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax.testing import placement

RING = bx.gossip(bx.topology.ring(4))
RANDOM = np.random.default_rng(0)
TREE = {"a": RANDOM.normal(size=(4, 2, 3)), "b": RANDOM.normal(size=4)}
FLAT = np.column_stack([TREE["a"].reshape(4, 6), TREE["b"]])
EXPECTED = np.sqrt(((FLAT - FLAT.mean(0)) ** 2).sum(1).mean())


@pytest.mark.parametrize("topology", [bx.topology.ring(4), placement.DIRECTED], ids=["ring", "directed"])
def test_distance_to_the_mean(topology):
    """Of push-sum too: what agents have is not weighed again."""
    assert bx.agents.consensus_error(placement.on_one_device(topology), TREE) == pytest.approx(EXPECTED, rel=1e-14)

    def spread(gossip, tree):
        return jnp.full(2, bx.agents.consensus_error(gossip, tree))  # a row for each agent of this part

    assert placement.on_two_parts(spread, topology, TREE) == pytest.approx(np.full(4, EXPECTED), rel=1e-14)


def test_agents_in_consensus_are_not_apart_and_half_precision_counts_in_single():
    assert bx.agents.consensus_error(RING, bx.replicate(jnp.ones(3), 4)) == 0
    error = bx.agents.consensus_error(RING, jnp.array([1.0, 3.0, 1.0, 3.0], jnp.bfloat16))
    assert (error.dtype, float(error)) == (jnp.float32, 1.0)


def test_its_gradient_is_that_of_the_formula_and_zero_where_all_agree():
    def error(x):
        return bx.agents.consensus_error(RING, x)

    x = RANDOM.normal(size=(4, 3))
    away = x - x.mean(0)
    np.testing.assert_allclose(jax.grad(error)(x), away / 4 / error(x), rtol=1e-12)
    np.testing.assert_array_equal(jax.grad(error)(jnp.ones((4, 3))), 0)
    assert jnp.isnan(error(x * jnp.nan))


def test_bad_input():
    with pytest.raises(ValueError, match="gossip must be"):
        bx.agents.consensus_error(bx.topology.ring(4), TREE)
    with pytest.raises(ValueError, match=r"tree must have leaves \[4, ...\].*tree\['b'\]"):
        bx.agents.consensus_error(RING, jax.tree.map(lambda leaf: leaf[:3], TREE) | {"a": TREE["a"]})
    for tree, message in (((), "tree must hold at least one"), ({"count": jnp.arange(4)}, r"got int\d+ at tree")):
        with pytest.raises(ValueError, match=message):
            bx.agents.consensus_error(RING, tree)

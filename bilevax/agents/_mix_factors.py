"""Curvature of agents who share one inner variable: the sums that factors are made of travel, never inverses."""

from typing import Any

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.typing import Key, PyTree


def mix_factors(key: Key | None, gossip: Gossip, state: Any, factors: PyTree, *, rounds: int = 1) -> tuple[PyTree, Any]:
    """Averages the Kronecker factors of agents by gossip, before anything is inverted.

        (Σ_n w ā āᵀ, Σ_n w, Σ_n w u uᵀ)_i ← Σ_j w_ij (…)_j          rounds times

    The inverse of a mean is not the mean of inverses: with one global inner variable the agents average these sums,
    which are means over their data, and each then decomposes what it holds, `curvature.inverted`. On a complete graph
    one round gives every agent the factors of all data together, where agents hold equally many examples (or weights
    that make their means count as they should).

    Args:
      key: for a gossip that draws; None otherwise.
      gossip: of n agents.
      state: from `gossip.init(factors)`.
      factors: of `jax.vmap(kronecker.factors)`, leaves [n, ...].
      rounds: of gossip, >= 1.

    Returns:
      The mixed factors, leaves [n, ...], and the state.

    Raises:
      ValueError: if rounds < 1, or leaves have no axis of n agents.

    Cost: `rounds` rounds; each agent sends its factors, d_in² + d_out² + 1 numbers for each layer where they are whole,
    `gossip.bytes(state, factors)`.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> gossip = bx.gossip(bx.topology.complete(2))
        >>> factors = {"w": jnp.array([[1.0], [3.0]])}
        >>> mixed, _ = bx.agents.mix_factors(None, gossip, gossip.init(factors), factors)
        >>> mixed["w"].tolist()
        [[2.0], [2.0]]
    """
    checks.instance("gossip", gossip, Gossip, "Pass, say, bx.gossip(bx.topology.ring(8)).")
    rounds = checks.count("rounds", rounds, minimum=1)
    checks.agents_axis("factors", factors, gossip.n, "Measure them under jax.vmap, one agent for each row.")
    sums = gossip.weigh(state, factors)
    for _ in range(rounds):
        sums, state = gossip.mix(key, state, sums)
    return gossip.debias(state, sums), state

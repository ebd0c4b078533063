"""Averages over the agents that their neighbours alone bring about, in as few rounds as the graph allows."""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevax.agents import topology as graphs
from bilevax.agents._gossip import Gossip
from bilevax.sampling import fold
from bilevax.typing import Array, Key, PyTree

MOST = 10_000  # periods over a directed graph


class Average(NamedTuple):
    """Rounds of gossip until what agents differ by has shrunk to a given part.

    Attributes:
      apply: `apply(key, tree) -> (tree, bytes [local])`, leaves [n, ...]: what each agent then has, and has sent.
      rounds: of one call.
    """

    apply: Callable[[Key, PyTree], tuple[PyTree, Array]]
    rounds: int


def average(gossip: Gossip, error: float) -> Average:
    """Averaging to a relative error: Chebyshev's semi-iteration over one symmetric W, plain rounds over any other.

        s_1 = W s_0,      s_{j+1} = ω_{j+1} (W s_j − s_{j−1}) + s_{j−1},
        ω_2 = 2 / (2 − σ²),      ω_{j+1} = 1 / (1 − σ² ω_j / 4)

    with σ the second largest size of an eigenvalue of W: about √(2 / (1 − σ)) rounds where plain ones are 1 / (1 − σ),
    for each factor e. Over push-sum agents take z / ω.

    Args:
      gossip: that adds no memory of its own to the message.
      error: what may be left of the agents' differences, in (0, 1).

    Returns:
      `Average`.

    Raises:
      ValueError: if gossip keeps a copy of each message, as compression does: its error shrinks at another rate; if a
        directed graph takes more than ten thousand periods.
    """
    graph, message = gossip.topology, jnp.zeros((*gossip.agents().shape, 2))
    if any(leaf.shape == message.shape for leaf in jax.tree.leaves(jax.eval_shape(gossip.init, message))):
        raise ValueError(
            f"gossip must send its messages as they are; got {gossip!r:.80}, which keeps copies of them, as "
            f"compression does. Pass bx.gossip(topology) of the same graph, and compress in make."
        )
    plain = gossip.weights(gossip.init(message)) is None
    one = isinstance(graph, graphs.Topology)
    sequence = (graph,) if one else tuple(graph)
    if any(part.directed for part in sequence):
        weights = np.ones(len(sequence) * _directed(sequence, error))
    elif plain and one and graphs.is_symmetric(graph):
        weights = _chebyshev(1 - graphs.spectral_gap(graph), error)
    else:
        weights = np.ones(len(sequence) * _plain(1 - graphs.spectral_gap(graph), error))

    def apply(key: Key, tree: PyTree) -> tuple[PyTree, Array]:
        def turn(carry: Any, parts: tuple[Array, Array]) -> tuple[Any, Array]:
            before, now, state = carry
            number, weight = parts
            sent = jnp.asarray(gossip.bytes(state, now), float)
            mixed, state = gossip.mix(fold(key, number), state, now)
            step = optax.tree.add(before, optax.tree.scale(weight, optax.tree.sub(mixed, before)))
            return (now, optax.tree.cast_like(step, now), state), sent

        start = gossip.weigh(gossip.init(tree), tree)
        each = jnp.arange(len(weights)), jnp.asarray(weights, float)
        (_, last, state), sent = jax.lax.scan(turn, (start, start, gossip.init(tree)), each)
        return gossip.debias(state, last), sent.sum(0)

    return Average(apply, len(weights))


def _directed(sequence: Sequence[graphs.Topology], error: float) -> int:
    """Periods of push-sum until what agents have, z / ω, is near the mean: counted, as no eigenvalue of W bounds it.

    ‖diag(ω)⁻¹ Wᵏ − 11ᵀ/n‖ in Frobenius' norm, with ω = Wᵏ 1.
    """
    period = reduce(lambda past, one: one.matrix @ past, sequence, np.eye(sequence[0].n))
    mixed = period
    for number in range(1, MOST + 1):
        if np.linalg.norm(mixed / mixed.sum(1, keepdims=True) - 1 / len(mixed)) <= error:
            return number
        mixed = period @ mixed
    raise ValueError(
        f"gossip must bring its agents within {error:g} of their mean in {MOST} periods of its directed graph; got "
        f"{sequence[0]!r:.80}, which does not. Pass one that joins all agents, such as bx.topology.exponential(8)."
    )


def _plain(sigma: float, error: float) -> int:
    return 1 if sigma < error else math.ceil(math.log(error) / math.log(sigma))


def _chebyshev(sigma: float, error: float) -> np.ndarray:
    """The weights ω of as many rounds as are needed: 2 ρʲ / (1 + ρ²ʲ) <= error for ρ = (1 − √(1 − σ²)) / σ."""
    if sigma < error:
        return np.ones(1)
    base = (1 - math.sqrt(1 - sigma**2)) / sigma
    weights = [1.0, 2 / (2 - sigma**2)]
    while 2 * base ** len(weights) / (1 + base ** (2 * len(weights))) > error:
        weights.append(1 / (1 - sigma**2 * weights[-1] / 4))
    return np.array(weights)

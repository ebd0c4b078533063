"""Coins: who refreshes its derivatives in an iteration of a snapshot method.

A coin is a function `(key, k, gossip) -> choice`; the choice is a scalar bool (all or none), a bool [n] of the agents
held here, or int [m], global ids, where the id of no agent chooses nobody. k counts the coins from 0; the first one is
thrown twice, since the first iteration finds the point of `init`. Draws fold the global id of the agent (or of its
block) into the key, so that the number of devices changes nothing.
"""

from fractions import Fraction
from math import ceil, gcd
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.printing import brief
from bilevax.sampling import needed
from bilevax.single_loop.estimator.estimator_type import Coins
from bilevax.typing import Array, Key, Scalar

__all__ = [
    "common",
    "cyclic",
    "independent",
    "subset",
]


DIGITS = 10_000  # largest denominator of p · block in turns


def __dir__() -> list[str]:
    return __all__


def independent(probability: Scalar) -> Coins:
    """Each agent throws its own coin, which shows heads with probability p (or p_i).

    On one device every agent is evaluated and the chosen ones are kept: the declared calls are those of the chosen.
    With one agent on each device the others are skipped for good.

    Args:
      probability: p in (0, 1], or one for each agent [n].

    Returns:
      `(key, k, gossip) -> bool [n]`.

    Raises:
      ValueError: if a concrete `probability` is not in (0, 1]; when it draws, if there is no key, or if
        there is another number of them.

    Cost: one draw for each agent.

    Example:
        >>> import bilevax as bx, jax
        >>> bx.coins.independent(1.0)(jax.random.key(0), 0, bx.gossip(bx.topology.ring(4))).tolist()
        [True, True, True, True]
    """
    checks.fraction("probability", probability)

    def choose(key: Key | None, k: Scalar, gossip: Gossip) -> Array:
        agents = gossip.agents()
        keys = jax.vmap(lambda agent: jax.random.fold_in(needed(key, "a random choice"), agent))(agents)
        if jnp.shape(probability) not in ((), (gossip.n,)):
            raise ValueError(
                f"probability must be one number, or one for each of {gossip.n} agents; got shape "
                f"{jnp.shape(probability)}. Pass probability [{gossip.n}]."
            )
        return jax.vmap(jax.random.bernoulli)(keys, jnp.broadcast_to(jnp.asarray(probability, float), gossip.n)[agents])

    choose.__name__ = f"independent({brief(probability)})"  # as print shows it
    return choose


def common(probability: Scalar) -> Coins:
    """One coin for all agents: all of them evaluate with probability p, and otherwise none does.

    Args:
      probability: p in (0, 1].

    Returns:
      `(key, k, gossip) -> bool`, the same on every device.

    Raises:
      ValueError: if a concrete `probability` is not in (0, 1]; when it draws, if there is no key.

    Cost: one draw. The program skips the evaluation (`lax.cond`), but not under a `vmap` that batches the key.

    Example:
        >>> import bilevax as bx, jax
        >>> bool(bx.coins.common(1.0)(jax.random.key(0), 0, bx.gossip(bx.topology.ring(4))))
        True
    """
    checks.fraction("probability", probability)
    if jnp.ndim(probability):
        raise ValueError(
            f"probability must be one number for all agents; got shape {jnp.shape(probability)}. Take "
            f"coins.independent."
        )

    def choose(key: Key | None, k: Scalar, gossip: Gossip) -> Array:
        return jax.random.bernoulli(needed(key, "a random choice"), probability)

    choose.__name__ = f"common({brief(probability)})"
    return choose


def subset(probability: float, *, block: int | None = None) -> Coins:
    """A uniformly drawn subset of ⌈p · block⌉ agents in each block of consecutive agents: skipping really skips.

    The number of agents that evaluate is the same in every iteration, so that a program gathers them, evaluates those
    alone, and scatters the results. What counts as p is thus ⌈p · block⌉ / block.

    Args:
      probability: p in (0, 1].
      block: agents per block, a divisor of the number of agents on a device; None for one block of all agents, on one
        device.

    Returns:
      `(key, k, gossip) -> int [m]`, ids of the chosen agents held here.

    Raises:
      ValueError: if `probability` is not in (0, 1] or `block` < 1; when it draws, if there is no key, or if the blocks
        do not fit the agents or span two devices.

    Cost: one permutation of each block; with thousands of agents take blocks.

    Example:
        >>> import bilevax as bx, jax
        >>> bx.coins.subset(0.25)(jax.random.key(0), 0, bx.gossip(bx.topology.ring(16))).shape
        (4,)
    """
    probability, block = _fixed(probability, block)

    def choose(key: Key | None, k: Scalar, gossip: Gossip) -> Array:
        first, size = _blocks(block, gossip)
        keys = jax.vmap(lambda agent: jax.random.fold_in(needed(key, "a random choice"), agent // size))(first)
        drawn = jax.vmap(lambda key: jax.random.permutation(key, size)[: _number(probability, size)])(keys)
        return (first[:, None] + drawn.astype(first.dtype)).reshape(-1)

    choose.__name__ = f"subset({probability})" if block is None else f"subset({probability}, block={block})"
    return choose


def cyclic(probability: float, *, block: int | None = None) -> Coins:
    """The agents of each block take turns, p · block at a time: no draws, and nobody waits longer than another.

        chosen at k = the agents ⌊k p b⌋, …, ⌊(k + 1) p b⌋ − 1 of the block, modulo its size b

    Everybody refreshes once in 1/p iterations on average, also where p · b is no whole number: with p = 0.1 one of 8
    agents refreshes in each of 8 iterations out of 10, spread evenly, and nobody in the two others. In ⌈1/p⌉ iterations
    one after the other, wherever they begin, everybody refreshes: no direction is older. Skipping really skips, as that
    of `subset`; but where p · b is no whole number and m > 1, or there are several blocks, the program evaluates m
    agents of each, and drops what was not chosen. Frozen directions gain nothing by turns: S3LDBO
    needed as many evaluations on hyper-cleaning as with independent coins, or a third more
    (`benchmarks/decentralized/RESULTS.md`). Take it where runs have to be without chance, and where directions are
    predicted.

    Args:
      probability: p in (0, 1]; p · b counts to four digits.
      block: b, agents per block, a divisor of the number of agents on a device; None for one block of all agents, on
        one device.

    Returns:
      `(key, k, gossip) -> int [·]`, m = ⌈p · b⌉ ids of agents held here for each block; where fewer are chosen the
      rest is n, which is the id of nobody. It reads no key.

    Raises:
      ValueError: if `probability` is not in (0, 1] or `block` < 1; when it chooses, if the blocks do not fit the agents
        or span two devices.

    Cost: none.

    Example:
        >>> import bilevax as bx
        >>> [bx.coins.cyclic(0.25)(None, k, bx.gossip(bx.topology.ring(8))).tolist() for k in range(4)]
        [[0, 1], [2, 3], [4, 5], [6, 7]]
    """
    probability, block = _fixed(probability, block)

    def choose(key: Key | None, k: Scalar, gossip: Gossip) -> Array:
        first, size = _blocks(block, gossip)
        begin, count = _turn(probability, size, jnp.asarray(k))
        places = jnp.arange(_number(probability, size), dtype=first.dtype)
        turn = jnp.where(places < count, (begin.astype(first.dtype) + places) % size, gossip.n)
        return jnp.minimum(first[:, None] + turn[None, :], gossip.n).reshape(-1)

    choose.__name__ = f"cyclic({probability})" if block is None else f"cyclic({probability}, block={block})"
    return choose


def _fixed(probability: Any, block: int | None) -> tuple[float, int | None]:
    """Both, where they are plain numbers, from which the shape of the program follows; raises ValueError."""
    if isinstance(probability, jax.core.Tracer) or jnp.ndim(probability):
        raise ValueError(
            f"probability must be a plain number: it fixes the shape of the program; got {probability!r}. Pass, say, "
            f"probability=0.25."
        )
    checks.fraction("probability", probability)
    return float(probability), None if block is None else checks.count("block", block, minimum=1)


def _blocks(block: int | None, gossip: Gossip) -> tuple[Array, int]:
    """The first agent of each block held here, and the size of a block."""
    agents = gossip.agents()
    size = gossip.n if block is None else block
    if agents.size % size:
        fits = gcd(size, agents.size)
        fix = (
            f"block={fits}"
            if fits > 1
            else "bx.coins.independent(probability), which skips where a device holds one agent"
        )
        raise ValueError(
            f"block must divide the number of agents on a device; got blocks of {size} and {agents.size} agents "
            f"on each device. Take {fix}, or fewer devices."
        )
    return agents[::size], size


def _turn(probability: float, size: int, k: Array) -> tuple[Array, Array]:
    """⌊k p b⌋ modulo b, and how many whole numbers there are from k p b up to (k + 1) p b; in integers of 32 bits."""
    pace = max(Fraction(probability * size).limit_denominator(DIGITS), Fraction(1, DIGITS))
    whole, part = divmod(pace.numerator, pace.denominator)
    rounds, rest = jnp.divmod(k, pace.denominator)
    before, after = rest * part // pace.denominator, (rest + 1) * part // pace.denominator
    begin = rounds % size * (pace.numerator % size) + rest * (whole % size) + before
    return begin % size, whole + after - before


def _number(probability: float, size: int) -> int:
    return ceil(probability * size - 1e-9)

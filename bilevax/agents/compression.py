"""Compressed gossip: what an agent sends is a few entries or bits of the change of its vector (CHOCO-Gossip).

A compressor without suffix is contractive, E‖Q(v) − v‖² ≤ (1 − δ)‖v‖² with some δ > 0, as `choco` needs it. Those with
the suffix `_unbiased`, E Q(v) = v, are contractive only where their variance is small; they are here for comparison.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.agents.topology import Topology
from bilevax.printing import as_called, by_shape, by_text
from bilevax.problem import norm, widen
from bilevax.typing import Array, PyTree, Scalar

__all__ = [
    "CHOCOState",
    "Compressor",
    "choco",
    "qsgd",
    "qsgd_unbiased",
    "random_k",
    "random_k_unbiased",
    "sign",
    "top_k",
]


def __dir__() -> list[str]:
    return __all__


class Compressor(NamedTuple):
    """What is sent in place of a vector, and how long the message is.

    Attributes:
      compress: a function (key, vector [d]) -> vector [d], what the receivers read from the message of one agent. The
        key may be None where nothing is random.
      bytes: a function (d, dtype) -> float, bytes of that message, which a network would carry. (What devices exchange
        in a simulation are dense vectors.)
      text: what `print` shows.

    Example:
        >>> from bilevax.agents.compression import top_k
        >>> top_k(0.1).bytes(50, "float32")  # five values and their indices
        40.0
    """

    compress: Callable[[Any, Array], Array]
    bytes: Callable[[int, Any], float]
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


@as_called
def top_k(fraction: float) -> Compressor:
    """Keeps the k = ⌈fraction · d⌉ entries of the largest size.

    Contractive with δ = k/d. The message holds k values and k indices of 4 bytes.

    Args:
      fraction: share of the entries that are kept, in (0, 1].

    Returns:
      A `Compressor` that needs no key.

    Raises:
      ValueError: if fraction is outside (0, 1].

    Cost: one partial sort of d numbers.

    Reference: Stich, Cordonnier, Jaggi, "Sparsified SGD with memory", arXiv 1809.07599.

    Example:
        >>> import jax.numpy as jnp
        >>> [float(entry) for entry in top_k(0.5).compress(None, jnp.array([1.0, -3.0, 0.5, 2.0]))]
        [0.0, -3.0, 0.0, 2.0]
    """
    _check_fraction(fraction)

    def compress(key: Any, vector: Array) -> Array:
        _, indices = jax.lax.top_k(jnp.abs(vector), _kept(fraction, vector.size))
        return _only(indices, vector)

    return Compressor(compress, lambda size, dtype: float(_kept(fraction, size) * (_itemsize(dtype) + 4)))


@as_called
def random_k(fraction: float) -> Compressor:
    """Keeps k = ⌈fraction · d⌉ entries chosen at random, without replacement.

    Contractive with δ = k/d in expectation. The message holds k values and no index: the choice follows from the key,
    which all agents share, and from the sender's id, so that the receivers draw it themselves.

    Args:
      fraction: share of the entries that are kept, in (0, 1].

    Returns:
      A `Compressor` that needs a key.

    Raises:
      ValueError: if fraction is outside (0, 1], or, when it draws, if there is no key.

    Cost: one random permutation of d numbers.

    Reference: Stich, Cordonnier, Jaggi, "Sparsified SGD with memory", arXiv 1809.07599.

    Example:
        >>> import jax
        >>> float(random_k(0.5).compress(jax.random.key(0), jax.numpy.ones(4)).sum())
        2.0
    """
    _check_fraction(fraction)

    def compress(key: Any, vector: Array) -> Array:
        _check_key("random_k", key)
        return _only(jax.random.choice(key, vector.size, (_kept(fraction, vector.size),), replace=False), vector)

    return Compressor(compress, lambda size, dtype: float(_kept(fraction, size) * _itemsize(dtype)))


@as_called
def random_k_unbiased(fraction: float) -> Compressor:
    """Keeps entries as `random_k` does, and multiplies them by d/k, so that the expectation is the vector itself.

    E‖Q(v) − v‖² = (d/k − 1)‖v‖²: for k ≤ d/2 it is not contractive, and `choco` may blow up at any step.

    Args:
      fraction: share of the entries that are kept, in (0, 1].

    Returns:
      A `Compressor` that needs a key.

    Raises:
      ValueError: if fraction is outside (0, 1], or, when it draws, if there is no key.

    Cost: that of `random_k`.

    Reference: Stich, Cordonnier, Jaggi, "Sparsified SGD with memory", arXiv 1809.07599.

    Example:
        >>> import jax
        >>> float(random_k_unbiased(0.5).compress(jax.random.key(0), jax.numpy.ones(4)).sum())
        4.0
    """
    biased = random_k(fraction)

    def compress(key: Any, vector: Array) -> Array:
        return biased.compress(key, vector) * (vector.size / max(_kept(fraction, vector.size), 1))

    return biased._replace(compress=compress)


@as_called
def qsgd(bits: int) -> Compressor:
    """Rounds |v_j|/‖v‖ at random to one of s = 2^bits − 1 levels, and shrinks the result by its variance.

        Q(v)_j = ‖v‖ sign(v_j) ξ_j / (s τ),    τ = 1 + min(d/s², √d/s),    E ξ_j = s |v_j| / ‖v‖

    Contractive with δ = 1/τ. The message holds bits + 1 bits for each entry (level and sign), packed, and the norm.

    Args:
      bits: bits for the level of an entry, >= 1 and <= 16.

    Returns:
      A `Compressor` that needs a key.

    Raises:
      ValueError: if bits is not an int from 1 to 16, or, when it draws, if there is no key.

    Cost: one norm and d random numbers.

    Reference: Alistarh et al., "QSGD", arXiv 1610.02132; the factor 1/τ: Koloskova, Stich, Jaggi, arXiv 1902.00340.

    Example:
        >>> qsgd(4).bytes(100, "float32")  # 500 bits, and the norm
        67.0
    """
    unbiased = qsgd_unbiased(bits)
    levels = 2**bits - 1

    def compress(key: Any, vector: Array) -> Array:
        variance = min(vector.size / levels**2, math.sqrt(vector.size) / levels)
        return unbiased.compress(key, vector) / (1 + variance)

    return unbiased._replace(compress=compress)


@as_called
def qsgd_unbiased(bits: int) -> Compressor:
    """Rounds as `qsgd` does, without τ, so that the expectation is the vector itself.

    E‖Q(v) − v‖² ≤ min(d/s², √d/s)‖v‖²: where that factor exceeds 1, `choco` may blow up at any step.

    Args:
      bits: bits for the level of an entry, >= 1 and <= 16.

    Returns:
      A `Compressor` that needs a key.

    Raises:
      ValueError: if bits is not an int from 1 to 16, or, when it draws, if there is no key.

    Cost: that of `qsgd`.

    Reference: Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD", arXiv 1610.02132.

    Example:
        >>> import jax
        >>> [round(float(e), 5) for e in qsgd_unbiased(4).compress(jax.random.key(0), jax.numpy.array([3.0, 0.0]))]
        [3.0, 0.0]
    """
    if checks.count("bits", bits, minimum=1) > 16:
        raise ValueError(f"bits must be an int from 1 to 16; got {bits}. Pass bits=8, or mix without compression.")
    levels = 2**bits - 1

    def compress(key: Any, vector: Array) -> Array:
        _check_key("qsgd", key)
        wide, length = widen(vector), norm(vector)
        exact = levels * jnp.abs(wide) / jnp.where(length > 0, length, 1)
        level = jnp.minimum(jnp.floor(exact + jax.random.uniform(key, exact.shape, exact.dtype)), levels)
        return (length * jnp.sign(wide) * level / levels).astype(vector.dtype)

    return Compressor(compress, lambda size, dtype: float(math.ceil(size * (bits + 1) / 8) + _scale_bytes(dtype)))


@as_called
def sign() -> Compressor:
    """Sends the signs of the entries, and their mean size.

        Q(v) = (‖v‖₁/d) sign(v),    sign(0) = 1

    Contractive with δ = ‖v‖₁²/(d‖v‖²). The message holds one bit for each entry, packed, and the scale.

    Returns:
      A `Compressor` that needs no key.

    Cost: one pass over the vector.

    Reference: Karimireddy, Rebjock, Stich, Jaggi, "Error feedback fixes SignSGD", arXiv 1901.09847.

    Example:
        >>> import jax.numpy as jnp
        >>> [float(entry) for entry in sign().compress(None, jnp.array([1.0, -3.0]))]
        [2.0, -2.0]
    """

    def compress(key: Any, vector: Array) -> Array:
        wide = widen(vector)
        scale = jnp.sum(jnp.abs(wide)) / max(vector.size, 1)
        return jnp.where(wide < 0, -scale, scale).astype(vector.dtype)

    return Compressor(compress, lambda size, dtype: float(math.ceil(size / 8) + _scale_bytes(dtype)))


class CHOCOState(NamedTuple):
    """State of compressed gossip.

    Attributes:
      copies: x̂, what everybody knows of each agent's tree; leaves [n, ...].
      gossip: state of the gossip underneath.

    Example:
        >>> import bilevax as bx
        >>> gossip = choco(bx.gossip(bx.topology.ring(4)), sign(), gossip_step=0.1)
        >>> gossip.init({"w": jnp.ones((4, 3), jnp.float32)})
        CHOCOState(
          copies={'w': float32[4, 3]},
          gossip=(),
        )
    """

    copies: PyTree
    gossip: Any

    def __repr__(self) -> str:
        return by_shape(self)


@as_called
def choco(gossip: Gossip, compressor: Compressor, *, gossip_step: Scalar) -> Gossip:
    """Mixes by compressed messages (CHOCO-Gossip).

        x̂_i⁺ = x̂_i + Q(x_i − x̂_i),    x_i⁺ = x_i − step · Σ_j w_ij (x̂_i⁺ − x̂_j⁺)

    The copies x̂ start at zero. The mean of x is kept whatever Q is. Consensus is reached at a linear rate where Q is
    contractive and the step small enough, the smaller the stronger the compression; too large a step blows up. (On a
    ring of 8 with d = 50, top 10 % works with 0.2 and not with 0.5, top 2 % with 0.03 and not with 0.2.) Under exact
    diffusion and EXTRA, which sum up what `laplacian` gives, the step has to be smaller than under tracking. Each leaf
    of a tree is one vector and one message. The draw of an agent depends on the key, its id and the leaf alone.

    Args:
      gossip: what mixes without compression: `bx.gossip` of one doubly stochastic topology.
      compressor: `top_k(...)`, `random_k(...)`, `qsgd(...)`, `sign()` or one of your own.
      gossip_step: a number > 0, usually below 1; 1 without compression is the plain gossip.

    Returns:
      A `Gossip` with a `CHOCOState`; `laplacian` is x − mix(x), i.e. the step is in it, and `bytes` counts the
      compressed messages, one for each neighbour.

    Raises:
      ValueError: if step is not positive, or if the graph changes with time (who misses a round loses the copies); from
        `init`, if the gossip is push-sum; and, when it mixes, if a random compressor gets no key.

    Cost: one compression per agent, leaf and round; one more copy of the tree.

    Reference: Koloskova, Stich, Jaggi, "Decentralized stochastic optimization and gossip algorithms with compressed
    communication", arXiv 1902.00340, algorithm 1.

    Example:
        >>> import bilevax as bx
        >>> compressed = choco(bx.gossip(bx.topology.ring(8)), top_k(0.1), gossip_step=0.1)
    """
    checks.instance("gossip", gossip, Gossip, "Pass, say, bx.gossip(bx.topology.ring(8)).")
    checks.instance("compressor", compressor, Compressor, "Pass, say, top_k(0.1).")
    checks.positive("gossip_step", gossip_step)
    _check_fixed(gossip)

    def init(tree: PyTree) -> CHOCOState:
        state = gossip.init(tree)
        if jax.tree.leaves(state) and gossip.weights(state) is not None:
            raise ValueError(
                "gossip must be doubly stochastic to be compressed; got push-sum, whose weights the copies would lack. "
                "Pass a gossip over an undirected or doubly stochastic graph, say bx.gossip(bx.topology.ring(8))."
            )
        return CHOCOState(jax.tree.map(jnp.zeros_like, tree), state)

    def laplacian(key: Any, state: CHOCOState, tree: PyTree) -> tuple[PyTree, CHOCOState]:
        changes = _compressed(compressor, key, gossip.agents(), jax.tree.map(jnp.subtract, tree, state.copies))
        copies = jax.tree.map(jnp.add, state.copies, changes)
        differences, inner = gossip.laplacian(key, state.gossip, copies)
        return jax.tree.map(lambda leaf: (gossip_step * leaf).astype(leaf.dtype), differences), CHOCOState(
            copies, inner
        )

    def mix(key: Any, state: CHOCOState, tree: PyTree) -> tuple[PyTree, CHOCOState]:
        differences, state = laplacian(key, state, tree)
        return jax.tree.map(jnp.subtract, tree, differences), state

    def sent(state: CHOCOState, tree: PyTree) -> Array:
        leaves = jax.tree.leaves(tree)
        neighbours = gossip.bytes(state.gossip, jnp.zeros(leaves[0].shape[:1], jnp.float32)) / 4
        return neighbours * sum(compressor.bytes(math.prod(leaf.shape[1:]), leaf.dtype) for leaf in leaves)

    return gossip._replace(init=init, mix=mix, laplacian=laplacian, bytes=sent)


def _compressed(compressor: Compressor, key: Any, agents: Array, tree: PyTree) -> PyTree:
    """Compresses the vector of each agent, leaf by leaf."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    leaves, structure = jax.tree.flatten(tree)
    messages = []
    for number, leaf in enumerate(leaves):
        keys = None if key is None else fold(jax.random.fold_in(key, number), agents)
        vectors = leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:]))
        messages.append(jax.vmap(compressor.compress)(keys, vectors).reshape(leaf.shape))
    return jax.tree.unflatten(structure, messages)


def _kept(fraction: float, size: int) -> int:
    return math.ceil(round(fraction * size, 9))  # 0.07 · 100 is above 7 in floating point


def _only(indices: Array, vector: Array) -> Array:
    return jnp.zeros_like(vector).at[indices].set(vector[indices])


def _itemsize(dtype: Any) -> int:
    return jnp.dtype(dtype).itemsize


def _scale_bytes(dtype: Any) -> int:
    return max(_itemsize(dtype), 4)


def _check_fraction(fraction: Any) -> None:
    checks.fraction("fraction", fraction)
    if isinstance(fraction, jax.core.Tracer) or np.ndim(fraction):
        raise ValueError(
            f"fraction must be one plain number, since it fixes the shape of a message; got {type(fraction).__name__} "
            f"of shape {np.shape(fraction)}. Pass, say, fraction=0.1."
        )


def _check_key(name: str, key: Any) -> None:
    if key is None:
        raise ValueError(f"key must be a jax.random.key for {name}, which draws; got None. Pass jax.random.key(0).")


def _check_fixed(gossip: Gossip) -> None:
    if not isinstance(gossip.topology, Topology):
        raise ValueError(
            f"gossip must mix over one fixed graph to be compressed; got a sequence of {len(gossip.topology)}. Who "
            f"misses a round loses the copies: pass a gossip of one topology, say bx.gossip(bx.topology.ring(8))."
        )

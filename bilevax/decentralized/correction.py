"""Corrections for heterogeneity: how one level moves along local directions that differ from agent to agent.

For one variable s with local direction d, step a and mixing matrix W; the mean over the agents moves by
mean s⁺ = mean s − a · mean d in all of them.

| correction         | recursion                               | vectors | rounds | W                              |
|--------------------|-----------------------------------------|---------|--------|--------------------------------|
| `none`             | s⁺ = W (s − a d)                        | 1       | 1      | any; biased                    |
| `local`            | s⁺ = s − a d                            | 0       | 0      | not used; a level of one's own |
| `tracking`         | s⁺ = W (s − a t), t⁺ = W t + d⁺ − d     | 2       | 1      | any                            |
| `tracking_atc`     | s⁺ = W (s − a t), t⁺ = W (t + d⁺ − d)   | 2       | 2      | any                            |
| `tracking_non_atc` | s⁺ = W s − a t, t⁺ = W t + d⁺ − d       | 2       | 1      | any                            |
| `exact_diffusion`  | s⁺⁺ = W (2 s⁺ − s − a (d⁺ − d))         | 1       | 1      | symmetric, fixed, λ_min > −1/3 |
| `extra`            | s⁺⁺ = W (2 s⁺ − s) − a (d⁺ − d)         | 1       | 1      | symmetric, fixed, λ_min > −1/3 |

On a curvature L and an eigenvalue λ of W they are stable if

    none               |λ (1 − a L)| < 1
    tracking           a L λ < (1 + λ)²/2 for λ > 0,  a L < (1 − λ²)/|λ| for λ < 0
    tracking_atc       a L < (1 + λ)²/(2 λ²)
    tracking_non_atc   a L < (1 + λ)²/2
    exact_diffusion    2 a L λ < 1 + 3 λ for λ > 0,  a L < 1 + 1/|λ| for λ < 0
    extra              2 a L < 1 + 3 λ
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.decentralized import topology as graphs
from bilevax.decentralized.gossip import Gossip, per_agent
from bilevax.sampling import fold

__all__ = [
    "Correction",
    "Move",
    "exact_diffusion",
    "extra",
    "local",
    "none",
    "share",
    "tracking",
    "tracking_atc",
    "tracking_non_atc",
]


class Move(NamedTuple):
    """How a corrected direction becomes a displacement: a step size, or an optax transformation for each agent.

    Attributes:
      init: `init(s) -> state`.
      apply: `apply(t, state, s) -> (displacement, state)`, −a t for a step size a.
      linear: True for a step size.

    Example:
        >>> import bilevax as bx
        >>> bx.correction.Move._fields
        ('init', 'apply', 'linear')
    """

    init: Callable
    apply: Callable
    linear: bool


class Correction(NamedTuple):
    """How one level mixes and moves, as a pair of pure functions.

    Attributes:
      init: `init(gossip, s, move) -> state`.
      update: `update(key, state, gossip, s, d, move) -> (s⁺, state, bytes [n])`.
      rounds: rounds of communication in one update.

    Example:
        >>> import bilevax as bx
        >>> bx.correction.tracking().rounds, bx.correction.tracking_atc().rounds
        (1, 2)
    """

    init: Callable
    update: Callable
    rounds: int


class CorrectionState(NamedTuple):
    """What one level remembers: the states of its gossip and its move, and the memory of its correction."""

    gossip: Any
    move: Any
    memory: Any


class Tracker(NamedTuple):
    """Of gradient tracking: the mixed tracker W t (of `tracking_atc`: the tracker t), and the last directions."""

    mixed: chex.ArrayTree
    last: chex.ArrayTree


def none(damping: chex.Numeric = 1.0) -> Correction:
    """No correction: decentralized descent, adapt then combine.

        s⁺ = s + η (W (s − a d) − s)

    With a constant step and different local losses its limit is biased by O(a).

    Args:
      damping: η in (0, 1]; 1 switches it off.

    Returns:
      `Correction` with the memory ().

    Raises:
      ValueError: if a concrete `damping` is not in (0, 1].

    Cost: one vector in one round.

    Example:
        >>> import bilevax as bx
        >>> bx.correction.none().rounds
        1
    """
    checks.scalar("damping", damping)
    checks.fraction("damping", damping)

    def init(gossip: Gossip, s: chex.ArrayTree, move: Move) -> CorrectionState:
        return CorrectionState(gossip.init(s), move.init(s), ())

    def update(key: Any, state: CorrectionState, gossip: Gossip, s: Any, d: Any, move: Move) -> tuple:
        step, moved = move.apply(share(gossip, state.gossip, d), state.move, s)
        message = optax.apply_updates(s, step)
        new, mixing = gossip.mix(key, state.gossip, message)
        return _damped(damping, s, new), CorrectionState(mixing, moved, ()), gossip.bytes(state.gossip, message)

    return Correction(init, update, rounds=1)


def local() -> Correction:
    """No communication: each agent descends alone, on a level of its own (a personalised lower level).

        s_i⁺ = s_i − a d_i

    Args:
      (none)

    Returns:
      `Correction` with the memory ().

    Raises:
      (nothing)

    Cost: nothing is sent, no round.

    Example:
        >>> import bilevax as bx
        >>> bx.correction.local().rounds
        0
    """

    def init(gossip: Gossip, s: chex.ArrayTree, move: Move) -> CorrectionState:
        return CorrectionState((), move.init(s), ())

    def update(key: Any, state: CorrectionState, gossip: Gossip, s: Any, d: Any, move: Move) -> tuple:
        step, moved = move.apply(d, state.move, s)
        return optax.apply_updates(s, step), state._replace(move=moved), jnp.zeros(gossip.agents().shape)

    return Correction(init, update, rounds=0)


def tracking(damping: chex.Numeric = 1.0) -> Correction:
    """Gradient tracking, semi-ATC: the default. It has the widest range of steps, and takes any W, fixed or not.

        t = m + d − d_last,      (s⁺, m) = W (s − a t, t)      s⁺ ← s + η (s⁺ − s)

    m = 0 and d_last = 0 at first, so that t_0 = d_0. At every step mean t = mean d.

    Args:
      damping: η in (0, 1]; 1 switches it off.

    Returns:
      `Correction` with the memory `Tracker(mixed, last)`.

    Raises:
      ValueError: if a concrete `damping` is not in (0, 1].

    Cost: two vectors in one round.

    Reference: Nedić, Olshevsky and Shi, arXiv 1607.03218 (DIGing); the name is of the unified analysis of Alghunaim,
    Ryu, Yuan and Sayed, arXiv 1909.06479.

    Example:
        >>> import bilevax as bx
        >>> bx.correction.tracking(damping=0.5).rounds
        1
    """
    return _tracking(damping, adapt_first=True)


def tracking_non_atc(damping: chex.Numeric = 1.0) -> Correction:
    """Gradient tracking, non-ATC: mixes first, then moves along the agent's own tracker.

        t = m + d − d_last,      (s⁺, m) = (W s − a t, W t)      s⁺ ← s + η (s⁺ − s)

    Args:
      damping: η in (0, 1]; 1 switches it off.

    Returns:
      `Correction` with the memory `Tracker(mixed, last)`.

    Raises:
      ValueError: if a concrete `damping` is not in (0, 1].

    Cost: two vectors in one round.

    Reference: Nedić, Olshevsky and Shi, arXiv 1607.03218 (DIGing).

    Example:
        >>> import bilevax as bx
        >>> bx.correction.tracking_non_atc().rounds
        1
    """
    return _tracking(damping, adapt_first=False)


def _tracking(damping: chex.Numeric, adapt_first: bool) -> Correction:
    checks.scalar("damping", damping)
    checks.fraction("damping", damping)

    def init(gossip: Gossip, s: chex.ArrayTree, move: Move) -> CorrectionState:
        zeros = optax.tree.zeros_like(s)
        return CorrectionState(gossip.init((s, zeros)), move.init(s), Tracker(zeros, zeros))

    def update(key: Any, state: CorrectionState, gossip: Gossip, s: Any, d: Any, move: Move) -> tuple:
        change = share(gossip, state.gossip, optax.tree.sub(d, state.memory.last))
        t = optax.tree.add(state.memory.mixed, change)
        step, moved = move.apply(t, state.move, s)
        message = (optax.apply_updates(s, step) if adapt_first else s, t)
        (new, m), mixing = gossip.mix(key, state.gossip, message)
        new = new if adapt_first else optax.apply_updates(new, step)
        sent = gossip.bytes(state.gossip, message)
        return _damped(damping, s, new), CorrectionState(mixing, moved, Tracker(m, d)), sent

    return Correction(init, update, rounds=1)


def tracking_atc(damping: chex.Numeric = 1.0) -> Correction:
    """Gradient tracking, ATC: adapts, then combines, for the tracker too.

        t⁺ = W (t + d − d_last),      s⁺ = W (s − a t⁺)      s⁺ ← s + η (s⁺ − s)

    t = 0 and d_last = 0 at first, so that t_0 = W d_0, as in the primal-dual form of the method.

    Args:
      damping: η in (0, 1]; 1 switches it off.

    Returns:
      `Correction` with the memory `Tracker(mixed, last)`.

    Raises:
      ValueError: if a concrete `damping` is not in (0, 1].

    Cost: two vectors in two rounds.

    Reference: Alghunaim, Ryu, Yuan and Sayed, "Decentralized proximal gradient algorithms with linear convergence
    rates", arXiv 1909.06479.

    Example:
        >>> import bilevax as bx
        >>> bx.correction.tracking_atc().rounds
        2
    """
    checks.scalar("damping", damping)
    checks.fraction("damping", damping)

    def init(gossip: Gossip, s: chex.ArrayTree, move: Move) -> CorrectionState:
        zeros = optax.tree.zeros_like(s)
        return CorrectionState((gossip.init(zeros), gossip.init(s)), move.init(s), Tracker(zeros, zeros))

    def update(key: Any, state: CorrectionState, gossip: Gossip, s: Any, d: Any, move: Move) -> tuple:
        of_t, of_s = state.gossip
        change = share(gossip, of_t, optax.tree.sub(d, state.memory.last))
        sent = gossip.bytes(of_t, change) + gossip.bytes(of_s, s)
        t, of_t = gossip.mix(fold(key, 0), of_t, optax.tree.add(state.memory.mixed, change))
        step, moved = move.apply(t, state.move, s)
        new, of_s = gossip.mix(fold(key, 1), of_s, optax.apply_updates(s, step))
        return _damped(damping, s, new), CorrectionState((of_t, of_s), moved, Tracker(t, d)), sent

    return Correction(init, update, rounds=2)


def exact_diffusion() -> Correction:
    """Exact diffusion (D²): one vector, no bias.

        r = s − a d − P,      s⁺ = r − L r,      P⁺ = P + L r            L = I − W, P = 0 at first

    which is s⁺⁺ = W (2 s⁺ − s − a (d⁺ − d)) with s_1 = W (s_0 − a d_0). L r is summed edge by edge and P keeps the mean
    0: the recursion in s itself drifts in single precision.

    Args:
      (none)

    Returns:
      `Correction` with the memory P.

    Raises:
      ValueError: from `init`, if W is not symmetric, not fixed, or λ_min(W) <= −1/3, where it is not stable: take
        `bx.topology.lazy`; or if the step size is an optax transformation.

    Cost: one vector in one round.

    Reference: Yuan, Ying, Zhao and Sayed, "Exact diffusion for distributed optimization and learning", arXiv
    1702.05122; Tang et al., "D²", arXiv 1803.07068.

    Example:
        >>> import bilevax as bx
        >>> bx.correction.exact_diffusion().rounds
        1
    """

    def update(key: Any, state: CorrectionState, gossip: Gossip, s: Any, d: Any, move: Move) -> tuple:
        step, moved = move.apply(d, state.move, s)
        r = optax.tree.sub(optax.apply_updates(s, step), state.memory)
        slope, mixing = gossip.laplacian(key, state.gossip, r)
        memory = optax.tree.add(state.memory, slope)
        return optax.tree.sub(r, slope), CorrectionState(mixing, moved, memory), gossip.bytes(state.gossip, r)

    return Correction(_primal_dual("exact_diffusion"), update, rounds=1)


def extra() -> Correction:
    """EXTRA: one vector, no bias.

        s⁺ = s − 2 L s − P − a d,      P⁺ = P + L s            L = I − W, P = 0 at first

    which is s⁺⁺ = W (2 s⁺ − s) − a (d⁺ − d) with s_1 = W s_0 − a d_0 from a common start. L s is summed edge by edge
    and P keeps the mean 0: the recursion in s itself drifts in single precision.

    Args:
      (none)

    Returns:
      `Correction` with the memory P.

    Raises:
      ValueError: from `init`, if W is not symmetric, not fixed, or λ_min(W) <= −1/3, where no step is stable: take
        `bx.topology.lazy`; or if the step size is an optax transformation.

    Cost: one vector in one round.

    Reference: Shi, Ling, Wu and Yin, "EXTRA: an exact first-order algorithm for decentralized consensus optimization",
    arXiv 1404.6264.

    Example:
        >>> import bilevax as bx
        >>> bx.correction.extra().rounds
        1
    """

    def update(key: Any, state: CorrectionState, gossip: Gossip, s: Any, d: Any, move: Move) -> tuple:
        step, moved = move.apply(d, state.move, s)
        slope, mixing = gossip.laplacian(key, state.gossip, s)
        dual = optax.tree.add(state.memory, slope)
        new = optax.apply_updates(optax.tree.sub(s, optax.tree.add(dual, slope)), step)
        return new, CorrectionState(mixing, moved, dual), gossip.bytes(state.gossip, s)

    return Correction(_primal_dual("extra"), update, rounds=1)


def _primal_dual(name: str) -> Callable:
    def init(gossip: Gossip, s: chex.ArrayTree, move: Move) -> CorrectionState:
        _check_symmetric(name, gossip)
        if not move.linear:
            raise ValueError(
                f"step_sizes of a level with {name} must be numbers or schedules; got an optax transformation, with "
                f"which its limit would be wrong. Take bx.correction.tracking() for that level."
            )
        return CorrectionState(gossip.init(s), move.init(s), optax.tree.zeros_like(s))

    return init


def _check_symmetric(name: str, gossip: Gossip) -> None:
    graph = gossip.topology
    if not isinstance(graph, graphs.Topology) or abs(graph.matrix - graph.matrix.T).max() > 1e-6:
        what = "one that is not symmetric" if isinstance(graph, graphs.Topology) else "a sequence of matrices"
        raise ValueError(
            f"{name} needs one fixed symmetric W; got {what}. Take bx.correction.tracking(), which takes any doubly "
            f"stochastic matrices."
        )
    smallest = graphs.smallest_eigenvalue(graph)
    if smallest <= -1 / 3 + 1e-9:
        raise ValueError(
            f"{name} needs a W whose smallest eigenvalue is above -1/3; got {smallest:.6g}, where it diverges or does "
            f"not converge. Take bx.gossip(bx.topology.lazy(topology)), that is (I + W)/2."
        )


def share(gossip: Gossip, state: Any, d: chex.ArrayTree) -> chex.ArrayTree:
    """Divides a direction by the push-sum weights ω, as every correction must, so that directed graphs may be used.

    Args:
      gossip: that of the level.
      state: its state.
      d: a direction, leaves [n, ...].

    Returns:
      d / ω; d itself where W is doubly stochastic.

    Raises:
      (nothing)

    Cost: one division of each entry.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.correction.share(bx.gossip(bx.topology.ring(4)), (), jnp.ones(4)).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    weights = gossip.weights(state)
    return d if isinstance(weights, float) else per_agent(lambda w, leaf: leaf / w, weights, d)


def _damped(damping: chex.Numeric, s: chex.ArrayTree, new: chex.ArrayTree) -> chex.ArrayTree:
    if isinstance(damping, float | int) and damping == 1:
        return new
    return jax.tree.map(lambda s, new: (s + damping * (new - s)).astype(s.dtype), s, new)

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

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.decentralized.correction_type import Correction, CorrectionState, Move
from bilevax.decentralized.gossip import Gossip, per_agent
from bilevax.decentralized.primal_dual import exact_diffusion, extra
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

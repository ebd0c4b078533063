"""Gradient tracking: what agents send beside their variable averages their directions."""

from typing import Any, NamedTuple

import optax

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.sampling import fold
from bilevax.single_loop.correction.correction_type import Correction, CorrectionState, Move, damped, share
from bilevax.typing import PyTree, Scalar


class Tracker(NamedTuple):
    """Of gradient tracking: the mixed tracker W t (of `tracking_atc`: the tracker t), and the last directions."""

    mixed: PyTree
    last: PyTree


def tracking(rate: Scalar = 1.0) -> Correction:
    """Gradient tracking, semi-ATC: the default. It has the widest range of steps, and takes any W, fixed or not.

        t = m + d − d_last,      (s⁺, m) = W (s − a t, t)      s⁺ ← s + η (s⁺ − s)

    m = 0 and d_last = 0 at first, so that t_0 = d_0. At every step mean t = mean d.

    Args:
      rate: η in (0, 1]; 1 switches it off.

    Returns:
      `Correction` with the memory `Tracker(mixed, last)`.

    Raises:
      ValueError: if a concrete `rate` is not in (0, 1].

    Cost: two vectors in one round.

    Reference: Nedić, Olshevsky and Shi, arXiv 1607.03218 (DIGing); the name is of the unified analysis of Alghunaim,
    Ryu, Yuan and Sayed, arXiv 1909.06479.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.correction.tracking(rate=0.5).rounds
        1
    """
    return _tracking(rate, adapt_first=True)


def tracking_non_atc(rate: Scalar = 1.0) -> Correction:
    """Gradient tracking, non-ATC: mixes first, then moves along the agent's own tracker.

        t = m + d − d_last,      (s⁺, m) = (W s − a t, W t)      s⁺ ← s + η (s⁺ − s)

    Args:
      rate: η in (0, 1]; 1 switches it off.

    Returns:
      `Correction` with the memory `Tracker(mixed, last)`.

    Raises:
      ValueError: if a concrete `rate` is not in (0, 1].

    Cost: two vectors in one round.

    Reference: Nedić, Olshevsky and Shi, arXiv 1607.03218 (DIGing).

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.correction.tracking_non_atc().rounds
        1
    """
    return _tracking(rate, adapt_first=False)


def _tracking(rate: Scalar, adapt_first: bool) -> Correction:
    checks.scalar("rate", rate)
    checks.fraction("rate", rate)

    def init(gossip: Gossip, s: PyTree, move: Move) -> CorrectionState:
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
        return damped(rate, s, new), CorrectionState(mixing, moved, Tracker(m, d)), sent

    return Correction(init, update, rounds=1)


def tracking_atc(rate: Scalar = 1.0) -> Correction:
    """Gradient tracking, ATC: adapts, then combines, for the tracker too.

        t⁺ = W (t + d − d_last),      s⁺ = W (s − a t⁺)      s⁺ ← s + η (s⁺ − s)

    t = 0 and d_last = 0 at first, so that t_0 = W d_0, as in the primal-dual form of the method.

    Args:
      rate: η in (0, 1]; 1 switches it off.

    Returns:
      `Correction` with the memory `Tracker(mixed, last)`.

    Raises:
      ValueError: if a concrete `rate` is not in (0, 1].

    Cost: two vectors in two rounds.

    Reference: Alghunaim, Ryu, Yuan and Sayed, "Decentralized proximal gradient algorithms with linear convergence
    rates", arXiv 1909.06479.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.correction.tracking_atc().rounds
        2
    """
    checks.scalar("rate", rate)
    checks.fraction("rate", rate)

    def init(gossip: Gossip, s: PyTree, move: Move) -> CorrectionState:
        zeros = optax.tree.zeros_like(s)
        return CorrectionState((gossip.init(zeros), gossip.init(s)), move.init(s), Tracker(zeros, zeros))

    def update(key: Any, state: CorrectionState, gossip: Gossip, s: Any, d: Any, move: Move) -> tuple:
        of_t, of_s = state.gossip
        change = share(gossip, of_t, optax.tree.sub(d, state.memory.last))
        sent = gossip.bytes(of_t, change) + gossip.bytes(of_s, s)
        t, of_t = gossip.mix(fold(key, 0), of_t, optax.tree.add(state.memory.mixed, change))
        step, moved = move.apply(t, state.move, s)
        new, of_s = gossip.mix(fold(key, 1), of_s, optax.apply_updates(s, step))
        return damped(rate, s, new), CorrectionState((of_t, of_s), moved, Tracker(t, d)), sent

    return Correction(init, update, rounds=2)

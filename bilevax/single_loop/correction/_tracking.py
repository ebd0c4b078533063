"""Gradient tracking: what agents send beside their variable averages their directions."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.printing import as_called
from bilevax.sampling import fold
from bilevax.single_loop.correction.correction_type import (
    Correction,
    CorrectionState,
    LargestStep,
    Move,
    Sent,
    damped,
)
from bilevax.typing import Key, PyTree, Scalar

OF_TRACKER, OF_S = 0, 1  # what the keys of the two messages of `tracking_atc` fold in


class Tracker(NamedTuple):
    """Of gradient tracking: the mixed tracker W t (of `tracking_atc`: the tracker t), and the last directions."""

    mixed: PyTree
    last: PyTree


class MixedApart(NamedTuple):
    """Of `tracking_atc`, whose tracker is a message of its own: the tracker, and the state of its gossip."""

    tracker: Tracker
    gossip: Any


@as_called
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
        >>> bx.single_loop.correction.tracking(rate=0.5)
        tracking(rate=0.5)
    """
    return _tracking(rate, adapt_first=True)


@as_called
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
        >>> bx.single_loop.correction.tracking_non_atc()
        tracking_non_atc()
    """
    return _tracking(rate, adapt_first=False)


def _tracking(rate: Scalar, adapt_first: bool) -> Correction:
    checks.scalar("rate", rate)
    checks.fraction("rate", rate)

    def init(gossip: Gossip, s: PyTree, move: Move) -> CorrectionState:
        zeros = optax.tree.zeros_like(s)
        return CorrectionState(gossip.init((s, zeros)), move.init(s), Tracker(zeros, zeros))

    def update(
        key: Key | None, state: CorrectionState, gossip: Gossip, s: PyTree, d: PyTree, move: Move, k: Scalar
    ) -> tuple[PyTree, CorrectionState, Sent]:
        t = optax.tree.add(state.memory.mixed, optax.tree.sub(d, state.memory.last))
        step, moved = move.apply(t, state.move, s)
        message = (optax.apply_updates(s, step) if adapt_first else s, t)
        (new, m), mixing = gossip.mix(key, state.gossip, message)
        new = new if adapt_first else optax.apply_updates(new, step)
        sent = Sent(gossip.bytes(state.gossip, message), 1)
        return damped(rate, s, new), CorrectionState(mixing, moved, Tracker(m, d)), sent

    return Correction(init, update, largest_step=_largest_step(rate, mixes=1 if adapt_first else 0))


@as_called
def tracking_atc(rate: Scalar = 1.0) -> Correction:
    """Gradient tracking, ATC, also known as Aug-DGM: adapts, then combines, for the tracker too.

        t⁺ = W (t + d − d_last),      s⁺ = W (s − a t⁺)      s⁺ ← s + η (s⁺ − s)

    t = 0 and d_last = 0 at first, so that t_0 = W d_0, as in the primal-dual form of the method.

    Args:
      rate: η in (0, 1]; 1 switches it off.

    Returns:
      `Correction` with the memory `MixedApart(Tracker(t, last), gossip)`.

    Raises:
      ValueError: if a concrete `rate` is not in (0, 1].

    Cost: two vectors in two rounds.

    Reference: Xu, Zhu, Soh and Xie, "Augmented distributed gradient methods for multi-agent optimization under
    uncoordinated constant stepsizes", CDC 2015 (Aug-DGM); Alghunaim, Ryu, Yuan and Sayed, "Decentralized proximal
    gradient algorithms with linear convergence rates", arXiv 1909.06479.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.correction.tracking_atc()
        tracking_atc()
    """
    checks.scalar("rate", rate)
    checks.fraction("rate", rate)

    def init(gossip: Gossip, s: PyTree, move: Move) -> CorrectionState:
        zeros = optax.tree.zeros_like(s)
        memory = MixedApart(Tracker(zeros, zeros), gossip.init(zeros))
        return CorrectionState(gossip.init(s), move.init(s), memory)

    def update(
        key: Key | None, state: CorrectionState, gossip: Gossip, s: PyTree, d: PyTree, move: Move, k: Scalar
    ) -> tuple[PyTree, CorrectionState, Sent]:
        (t, last), of_t = state.memory
        sent = Sent(gossip.bytes(of_t, t) + gossip.bytes(state.gossip, s), 2)
        t, of_t = gossip.mix(fold(key, OF_TRACKER), of_t, optax.tree.add(t, optax.tree.sub(d, last)))
        step, moved = move.apply(t, state.move, s)
        new, of_s = gossip.mix(fold(key, OF_S), state.gossip, optax.apply_updates(s, step))
        return damped(rate, s, new), CorrectionState(of_s, moved, MixedApart(Tracker(t, d), of_t)), sent

    return Correction(init, update, largest_step=_largest_step(rate, mixes=2))


def _largest_step(rate: Scalar, mixes: int) -> LargestStep:
    """The bound of a form in which W stands so many times between d and s⁺.

    At an eigenvalue λ, with μ = 1 − η + η λ and c = η a L λ^mixes, (s, t) moves by a matrix of trace μ + λ − c and
    determinant μ λ − c, whose eigenvalues are inside the unit circle if μ λ − 1 < c < min(1 + μ λ, (1 + μ)(1 + λ)/2).
    """

    def largest_step(eigenvalues: Any) -> Scalar:
        values = jnp.asarray(eigenvalues)
        damped, weight = 1 - rate + rate * values, rate * values**mixes
        above = jnp.minimum(1 + damped * values, (1 + damped) * (1 + values) / 2)
        return jnp.min(jnp.where(weight < 0, 1 - damped * values, above) / jnp.abs(weight))

    return largest_step

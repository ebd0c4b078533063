"""Corrections that correct nothing: plain descent with the neighbours, and without them."""

from typing import Any

import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.printing import as_called
from bilevax.single_loop.correction.correction_type import Correction, CorrectionState, Move, Sent, damped
from bilevax.typing import Key, PyTree, Scalar


@as_called
def none(rate: Scalar = 1.0) -> Correction:
    """No correction: decentralized descent, adapt then combine.

        s⁺ = s + η (W (s − a d) − s)

    With a constant step and different local losses its limit is biased by O(a).

    Args:
      rate: η in (0, 1]; 1 switches it off.

    Returns:
      `Correction` with the memory ().

    Raises:
      ValueError: if a concrete `rate` is not in (0, 1].

    Cost: one vector in one round.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.correction.none(rate=0.5)
        none(rate=0.5)
    """
    checks.scalar("rate", rate)
    checks.fraction("rate", rate)

    def init(gossip: Gossip, s: PyTree, move: Move) -> CorrectionState:
        return CorrectionState(gossip.init(s), move.init(s), ())

    def update(
        key: Key | None, state: CorrectionState, gossip: Gossip, s: PyTree, d: PyTree, move: Move, k: Scalar
    ) -> tuple[PyTree, CorrectionState, Sent]:
        step, moved = move.apply(d, state.move, s)
        message = optax.apply_updates(s, step)
        new, mixing = gossip.mix(key, state.gossip, message)
        sent = Sent(gossip.bytes(state.gossip, message), 1)
        return damped(rate, s, new), CorrectionState(mixing, moved, ()), sent

    def largest_step(eigenvalues: Any) -> Scalar:
        values = jnp.asarray(eigenvalues)
        size = jnp.abs(values)
        return jnp.min(jnp.where(values > 0, 1 + (2 - rate) / (rate * size), 1 + 1 / size))

    return Correction(init, update, largest_step=largest_step)


@as_called
def local() -> Correction:
    """No communication: each agent descends alone, on a level of its own (a personalised lower level).

        s_i⁺ = s_i − a d_i

    Returns:
      `Correction` with the memory ().

    Cost: nothing is sent, no round.

    Example:
        >>> import bilevax as bx
        >>> bx.Levels(x=bx.single_loop.correction.tracking(), y=bx.single_loop.correction.local()).y  # a y of one's own
        local()
    """

    def init(gossip: Gossip, s: PyTree, move: Move) -> CorrectionState:
        return CorrectionState((), move.init(s), ())

    def update(
        key: Key | None, state: CorrectionState, gossip: Gossip, s: PyTree, d: PyTree, move: Move, k: Scalar
    ) -> tuple[PyTree, CorrectionState, Sent]:
        step, moved = move.apply(d, state.move, s)
        sent = Sent(jnp.zeros(gossip.agents().shape), 0)
        return optax.apply_updates(s, step), state._replace(move=moved), sent

    return Correction(init, update)

"""How one level moves: over which graph it mixes, how it is corrected, and how far it steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.problem import norm
from bilevax.single_loop._preconditioned import Place
from bilevax.single_loop.correction.correction_type import Correction, Move, Sent
from bilevax.single_loop.step_sizes import StepSize, move
from bilevax.typing import Key, PyTree, Scalar


class Level(NamedTuple):
    """One level of a method, with all that moves it.

    Attributes:
      name: "x", "y" or "v", for messages.
      gossip: over which graph it mixes.
      correction: how it mixes and moves although the directions differ from agent to agent.
      step_size: a number, a schedule k -> number, an optax transformation, or `preconditioned`.
      radius: of the ball that it is projected on, agent by agent; None for no projection.
    """

    name: str
    gossip: Gossip
    correction: Correction
    step_size: StepSize
    radius: Scalar | None = None

    def init(self, s: PyTree, place: Place) -> Any:
        """The memory of the level at its start s."""
        state = self.correction.init(self.gossip, s, move(self.step_size, 0, place))
        if "gossip" not in getattr(state, "_fields", ()):
            raise ValueError(
                f"correction.init must return a NamedTuple with the field gossip, the state of the gossip that mixes "
                f"s; got {state!r:.80}. Return, say, CorrectionState(gossip.init(s), move.init(s), memory)."
            )
        return state

    def update(
        self, key: Key | None, state: Any, s: PyTree, d: PyTree, place: Place, k: Scalar
    ) -> tuple[PyTree, Any, Sent]:
        """The next s, the memory, and what was sent: the only place that knows of push-sum weights."""
        how = _of_sums(self.gossip, state.gossip, move(self.step_size, k, place))
        z = self.gossip.weigh(state.gossip, s)
        parts = self.correction.update(key, state, _once_each(self.gossip), z, d, how, k)
        z_new, state, sent = checks.parts("correction.update", parts, "s⁺", "state", "Sent(bytes, rounds)")
        checks.same_shapes(f"{self.name} after correction.update", z_new, z, "Return s⁺ like s.")
        checks.instance(
            "what correction.update returns last", sent, Sent, "Return Sent(bytes=gossip.bytes(...), rounds=1)."
        )
        checks.one_for_each_agent("bytes of correction.update", sent.bytes, self.gossip.agents())
        checks.scalar("rounds of correction.update", sent.rounds)
        s_new = self.gossip.debias(state.gossip, z_new)
        return s_new if self.radius is None else _projected(s_new, self.radius), state, sent


def _of_sums(gossip: Gossip, state: Any, how: Move) -> Move:
    """The move of z = ω s along the tracker of sums: that of s along what it says of one agent, times ω."""
    if how.linear or not jax.tree.leaves(state) or gossip.weights(state) is None:
        return how

    weights = state

    def apply(t: PyTree, state: Any, s: PyTree) -> tuple[PyTree, Any]:
        step, state = how.apply(gossip.debias(weights, t), state, gossip.debias(weights, s))
        return gossip.weigh(weights, step), state

    return how._replace(apply=apply)


def _once_each(gossip: Gossip) -> Gossip:
    """The gossip of one update, in which each state mixes one message once.

    Two messages that share a state are off under push-sum, whose weights then advance twice, under compression, whose
    copies are of one message, and over graphs that change from round to round.
    """
    used: list[Any] = []

    def once(send: Any) -> Any:
        def call(key: Key | None, state: Any, tree: PyTree) -> tuple[PyTree, Any]:
            if any(leaf is one for leaf in jax.tree.leaves(state) for one in used):
                raise ValueError(
                    "state of a gossip must mix one message once in an update; got one that has mixed already. Make a "
                    "state for each message with gossip.init, and keep them all in the state of the correction."
                )
            mixed, after = send(key, state, tree)
            used.extend(jax.tree.leaves((state, after)))
            checks.same_shapes("what gossip mixes", mixed, tree, "Return from mix and laplacian a tree like theirs.")
            return mixed, after

        return call

    return gossip._replace(mix=once(gossip.mix), laplacian=once(gossip.laplacian))


def _projected(v: PyTree, radius: Scalar) -> PyTree:
    def one(v: PyTree) -> PyTree:
        scale = jnp.minimum(1.0, radius / jnp.maximum(norm(v), jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), v)

    return jax.vmap(one)(v)

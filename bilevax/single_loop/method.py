"""What all single-loop methods share: their state, what an iteration reports, and the checks of what they are given."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.printing import by_shape
from bilevax.problem import Batch, Calls, norm
from bilevax.sampling import check_key
from bilevax.single_loop._levels import Levels, levels
from bilevax.typing import Array, PyTree, Scalar


class State(NamedTuple):
    """The state of a single-loop method. Leaves are [n, ...], agents first, but for counters, which are scalars.

    Attributes:
      k: iterations so far; scalar.
      x: outer variables.
      y: inner variables.
      v: inverse-Hessian-vector products, 0 at the start; () in a method without them. `state._replace(v=...)` starts
        them warm, but not after the `init` of a snapshot method, which has evaluated its first directions at v = 0.
      previous: `Levels`, the point of the iteration before; () unless the estimator asks for it.
      estimators: the memory of the estimator, one for each group of the order.
      corrections: `Levels` of the memories of the corrections.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> gossip, zeros = bx.gossip(bx.topology.ring(4)), jnp.zeros(4, "float32")
        >>> method = bx.decentralized.sldbo(problem, gossip, 0.1)
        >>> method.init(zeros, zeros)._replace(corrections=())
        State(
          k=0,
          x=float32[4],
          y=float32[4],
          v=float32[4],
          previous=(),
          estimators=((),),
          corrections=(),
        )
    """

    k: Array
    x: PyTree
    y: PyTree
    v: PyTree
    previous: Any
    estimators: Any
    corrections: Any

    def __repr__(self) -> str:
        return by_shape(self)


class Info(NamedTuple):
    """What one iteration reports, agent by agent.

    Attributes:
      moves: `Levels` of ‖s⁺ − s‖ for each agent [n]: they vanish where a method converges. () for a level that a method
        does not have.
      breakdown: True [n] where an agent's x, y or v is not finite.
      calls: `Calls` with leaves [n]: evaluations of ∇f and ∇_y g (each with all its arguments) and products with ∇²_yy
        g and ∇²_xy g, each on whatever batch the estimator drew; what `init` evaluates comes on top.
      bytes: sent by each agent [n] to all its neighbours together.
      rounds: rounds of communication, one after the other; scalar.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> method = bx.decentralized.sldbo(problem, bx.gossip(bx.topology.ring(4)), 0.1)
        >>> state, batch = method.init(jnp.ones(4), jnp.ones(4)), bx.Batch(jnp.zeros(4), jnp.zeros(4))
        >>> state, infos = jax.lax.scan(lambda state, _: method.step(None, state, batch), state, length=10)
        >>> int(infos.rounds.sum()), int(infos.calls.hessian_products[:, 0].sum())  # of agent 0
        (10, 10)
    """

    moves: Levels[PyTree]
    breakdown: Array
    calls: Calls
    bytes: Array
    rounds: Scalar

    def __repr__(self) -> str:
        return by_shape(self)


def moved(start: Levels[PyTree], end: Levels[PyTree]) -> tuple[Levels[PyTree], Array]:
    """How far each level of each agent has moved, and which agents are no longer finite: two fields of `Info`.

        moves_i = ‖s_i⁺ − s_i‖      for s = x, y, v

    Args:
      start: `Levels` before an iteration, leaves [n, ...]; () for a level that the method does not have.
      end: the same after it.

    Returns:
      `(moves, breakdown)`: `Levels` of [n], () where there is none, and bool [n], True where a move is not finite.

    Cost: one pass over the leaves; nothing is sent.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> start, end = (bx.Levels(jnp.full(4, s), jnp.full(4, s), ()) for s in (0.0, 0.5))
        >>> moves, breakdown = bx.single_loop.moved(start, end)
        >>> moves.y.tolist(), moves.v, breakdown.tolist()
        ([0.5, 0.5, 0.5, 0.5], (), [False, False, False, False])
    """

    def distance(new: PyTree, old: PyTree) -> Any:
        return jax.vmap(norm)(optax.tree.sub(new, old)) if jax.tree.leaves(new) else ()

    moves = Levels(*map(distance, end, start))
    return moves, ~jnp.isfinite(sum(jax.tree.leaves(moves)))


K = TypeVar("K")


def of_kind(name: str, value: Any, kind: type[K], fix: str) -> Levels[K]:
    """Reads `Levels` of values of one kind."""
    values = levels(name, value)
    for one in values:
        checks.instance(name, one, kind, fix)
    return values


def read_gossips(gossip: Any) -> Levels[Gossip]:
    """Reads a gossip for each level, all with one number of agents."""
    gossips = of_kind("gossip", gossip, Gossip, "Pass bx.gossip(bx.topology.ring(8)).")
    if len({one.n for one in gossips}) > 1:
        raise ValueError(
            f"gossip must have one number of agents on all levels; got {[one.n for one in gossips]}. Take equal n."
        )
    return gossips


def check_start(gossip: Gossip, x: PyTree, y: PyTree, batch: Batch | None) -> None:
    """Refuses a start whose leaves lack the axis of the agents held here."""
    local = len(gossip.agents())
    for name, tree in (("x", x), ("y", y)):
        checks.floating(name, tree)
        checks.agents_axis(name, tree, local, f"Give each agent its own copy with bx.replicate({name}, {local}).")
    if batch is not None:
        _check_batch(batch, local)


def check_step(gossip: Gossip, key: Any, state: Any, kind: type, batch: Batch) -> None:
    """Refuses a state, a key or a batch that is none."""
    checks.instance("state", state, kind, "Pass step(key, state, batch) the state of init or of the last step.")
    _check_batch(batch, len(gossip.agents()))
    check_key(key)


def _check_batch(batch: Any, n: int) -> None:
    checks.instance("batch", batch, Batch, "Pass bx.Batch(outer=..., inner=...), leaves [n, ...].")
    checks.agents_axis("batch", batch, n, "Stack the agents' data; bx.replicate gives all of them the same.")

"""The engine of the decentralized single-loop methods: three independent choices make a method.

    an Estimator    what each agent believes its directions d_x, d_y, d_v to be
    a Correction    how a level moves although the directions differ from agent to agent, one for each level
    an order        which levels move at once: JACOBI all three, GAUSS_SEIDEL y, then v, then x

One iteration, for each group of the order: estimate the directions of the group's levels at the present point, correct
them, mix and move.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.decentralized.correction import Correction, Move
from bilevax.decentralized.estimator import Estimator, Oracle
from bilevax.decentralized.gossip import Gossip
from bilevax.decentralized.levels import Levels, at, levels
from bilevax.problem import Batch, BilevelProblem, Calls, arrays, directions, norm
from bilevax.sampling import check_key, fold

Order = tuple[tuple[str, ...], ...]

JACOBI: Order = (("x", "y", "v"),)
GAUSS_SEIDEL: Order = (("y",), ("v",), ("x",))


class Algorithm(NamedTuple):
    """A whole method as a pair of pure functions; one `jax.lax.scan` drives it.

    Attributes:
      init: `init(x, y, batch=None) -> state`, leaves [n, ...]; the batch where the method evaluates at the start.
      step: `step(key, state, batch) -> (state, info)`; the key may be None where nothing is random.

    Example:
        >>> import bilevax as bx
        >>> bx.Algorithm._fields
        ('init', 'step')
    """

    init: Callable
    step: Callable


class State(NamedTuple):
    """The state of a single-loop method. Leaves are [n, ...], agents first, but for counters, which are scalars.

    Attributes:
      k: iterations so far; scalar.
      x: outer variables.
      y: inner variables.
      v: inverse-Hessian-vector products, 0 at the start. `state._replace(v=...)` starts them warm, but not after the
        `init` of a snapshot method, which has evaluated its first directions at v = 0.
      previous: `Levels`, the point of the iteration before; () unless the estimator asks for it.
      estimators: the memory of the estimator, one for each group of the order.
      corrections: `Levels` of the memories of the corrections.

    Example:
        >>> import bilevax as bx
        >>> bx.decentralized.State._fields
        ('k', 'x', 'y', 'v', 'previous', 'estimators', 'corrections')
    """

    k: chex.Array
    x: chex.ArrayTree
    y: chex.ArrayTree
    v: chex.ArrayTree
    previous: Any
    estimators: Any
    corrections: Levels


class Info(NamedTuple):
    """What one iteration reports, agent by agent.

    Attributes:
      moves: `Levels` of ‖s⁺ − s‖ for each agent [n]: they vanish where a method converges.
      breakdown: True [n] where an agent's x, y or v is not finite.
      calls: `Calls` with leaves [n]: evaluations of ∇f and ∇_y g (each with all its arguments) and products with ∇²_yy
        g and ∇²_xy g, each on whatever batch the estimator drew; what `init` evaluates comes on top.
      bytes: sent by each agent [n] to all its neighbours together.
      rounds: rounds of communication, one after the other; scalar.

    Example:
        >>> import bilevax as bx
        >>> bx.decentralized.Info._fields
        ('moves', 'breakdown', 'calls', 'bytes', 'rounds')
    """

    moves: Levels
    breakdown: chex.Array
    calls: Calls
    bytes: chex.Array
    rounds: chex.Numeric


def single_loop(
    problem: BilevelProblem,
    gossip: Any,
    step_sizes: Any,
    estimator: Estimator,
    corrections: Any,
    order: Order = JACOBI,
    radius: chex.Numeric | None = None,
) -> Algorithm:
    """A decentralized single-loop bilevel method out of an estimator, corrections and an order.

        u = estimate of the directions at (x, y, v)      s⁺ = correct, mix and move s along u,  s in the group
        v⁺ ← v⁺ · min(1, radius/‖v⁺‖), agent by agent

    Args:
      problem: f_i and g_i, one signature for all agents: what differs is their batch.
      gossip: a `Gossip`, or `Levels` of them: one graph for each level.
      step_sizes: `Levels(x, y, v)` (or a tuple in that order) of numbers, schedules k -> number, or optax
        transformations, applied to each agent's corrected direction apart; one value holds for all levels.
      estimator: see `bx.estimator`.
      corrections: see `bx.correction`; one, or `Levels` of them.
      order: groups of level names, such as `JACOBI` or `GAUSS_SEIDEL`; each level once.
      radius: of the ball that v is projected on, agent by agent, > 0; None for no projection.

    Returns:
      `Algorithm(init, step)` with `State` and `Info`.

    Raises:
      ValueError: if an argument is of another kind, if the graphs differ in their number of agents, if the order misses
        a level; from `init` and `step`, if a leaf lacks the agents' axis.

    Cost: that of the estimator and of the corrections. Jacobi: one ∇f, one ∇_y g and one pull-back of v for each
    evaluation; Gauss–Seidel: one ∇_y g more, since y moves in between. (Estimators that branch, such as PAGE or a
    common coin, share nothing between the groups of an order: one ∇f and one ∇_y g more than declared.)

    Example:
        >>> import bilevax as bx
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> gossip = bx.gossip(bx.topology.ring(4))
        >>> method = bx.decentralized.single_loop(problem, gossip, 0.1, bx.estimator.full(), bx.correction.tracking())
    """
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    checks.instance("estimator", estimator, Estimator, "Pass, say, bx.estimator.full().")
    gossips = _kind("gossip", gossip, Gossip, "Pass bx.gossip(bx.topology.ring(8)).")
    corrections = _kind("corrections", corrections, Correction, "Pass, say, bx.correction.tracking().")
    steps = levels("step_sizes", step_sizes)
    _check_steps(steps)
    _check_order(order)
    if len({one.n for one in gossips}) > 1:
        raise ValueError(
            f"gossip must have one number of agents on all levels; got {[one.n for one in gossips]}. Take equal n."
        )
    if radius is not None:
        checks.scalar("radius", radius)
        checks.positive("radius", radius)
    oracles = [Oracle(partial(_evaluate, problem, group), gossips.x, group) for group in order]
    unit_calls = _unit_calls(order)

    def init(x: chex.ArrayTree, y: chex.ArrayTree, batch: Batch | None = None) -> State:
        local = len(gossips.x.agents())
        for name, tree in (("x", x), ("y", y)):
            checks.floating(name, tree)
            checks.agents_axis(name, tree, local, f"Give each agent its own copy with bx.replicate({name}, {local}).")
        if batch is not None:
            _check_batch(batch, local)
        point = Levels(arrays(x), arrays(y), optax.tree.zeros_like(arrays(y)))
        memories = [
            correction.init(one, s, _move(step, 0))
            for correction, one, s, step in zip(corrections, gossips, point, steps, strict=True)
        ]
        estimators = tuple(estimator.init(oracle, point, batch) for oracle in oracles)
        previous = point if estimator.remembers else ()
        return State(jnp.zeros((), jnp.int32), *point, previous, estimators, Levels(*memories))

    def step(key: chex.PRNGKey | None, state: State, batch: Batch) -> tuple[State, Info]:
        checks.instance("state", state, State, "Pass step(key, state, batch) the state of init or of the last step.")
        _check_batch(batch, len(gossips.x.agents()))
        check_key(key)
        key = fold(key, state.k)
        start = point = Levels(state.x, state.y, state.v)
        previous, estimators, memories, spent, sent = state.previous, [], state.corrections, [], []
        for oracle, memory, unit in zip(oracles, state.estimators, unit_calls, strict=True):
            oracle = oracle._replace(previous=previous)
            d, memory, evaluations = estimator.update(fold(key, 0), memory, oracle, point, batch, state.k)
            estimators.append(memory)
            spent.append(jax.tree.map(lambda calls, times=evaluations: calls * times, unit))
            for name in oracle.group:
                s, new, size = getattr(corrections, name).update(
                    fold(key, 1 + Levels._fields.index(name)),
                    getattr(memories, name),
                    getattr(gossips, name),
                    getattr(point, name),
                    getattr(d, name),
                    _move(getattr(steps, name), state.k),
                )
                s = _projected(s, radius) if name == "v" and radius is not None else s
                point, memories = point._replace(**{name: s}), memories._replace(**{name: new})
                sent.append(size)
                previous = previous._replace(**{name: getattr(start, name)}) if estimator.remembers else ()
        rounds = sum(max(getattr(corrections, name).rounds for name in group) for group in order)
        calls = jax.tree.map(lambda *parts: sum(parts), *spent)
        info = Info(*_moved(start, point), calls, sum(sent), rounds)
        return State(state.k + 1, *point, previous, tuple(estimators), memories), info

    return Algorithm(init, step)


def _evaluate(problem: BilevelProblem, group: tuple[str, ...], point: Levels, batch: Batch) -> Levels:
    d = jax.vmap(partial(directions, problem))(point.x, point.y, point.v, batch)
    return Levels(*(getattr(d, name) if name in group else None for name in Levels._fields))


def _unit_calls(order: Order) -> list[Calls]:
    """The calls of one evaluation of each group; what two groups read at one (x, y) is evaluated once."""
    units, known_f, known_g = [], False, False
    for group in order:
        reads_f = "x" in group or "v" in group
        units.append(Calls(int(reads_f and not known_f), int(not known_g), int("v" in group), int("x" in group)))
        stays = not {"x", "y"} & set(group)
        known_f, known_g = stays and (known_f or reads_f), stays
    return units


def _move(step: Any, k: chex.Numeric) -> Move:
    if isinstance(step, optax.GradientTransformation):
        return Move(jax.vmap(step.init), jax.vmap(step.update), linear=False)

    def apply(t: chex.ArrayTree, state: tuple, s: chex.ArrayTree) -> tuple[chex.ArrayTree, tuple]:
        a = at(k, step)
        return jax.tree.map(lambda leaf: (-a * leaf).astype(leaf.dtype), t), state

    return Move(lambda s: (), apply, linear=True)


def _projected(v: chex.ArrayTree, radius: chex.Numeric) -> chex.ArrayTree:
    def one(v: chex.ArrayTree) -> chex.ArrayTree:
        scale = jnp.minimum(1.0, radius / jnp.maximum(norm(v), jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), v)

    return jax.vmap(one)(v)


def _moved(start: Levels, end: Levels) -> tuple[Levels, chex.Array]:
    moves = Levels(*(jax.vmap(norm)(optax.tree.sub(new, old)) for new, old in zip(end, start, strict=True)))
    return moves, ~jnp.isfinite(sum(moves))


def _kind(name: str, value: Any, kind: type, fix: str) -> Levels:
    values = levels(name, value)
    for one in values:
        checks.instance(name, one, kind, fix)
    return values


def _check_steps(steps: Levels) -> None:
    for name, step in steps._asdict().items():
        if isinstance(step, optax.GradientTransformation):
            continue
        if callable(step):
            checks.function(f"step_sizes.{name}", step, "k")
        elif isinstance(step, tuple | list | dict | str) or hasattr(step, "gradient_transformation") or step is None:
            raise ValueError(
                f"step_sizes must hold a number, a schedule or an optax transformation for each level; got "
                f"{step!r:.80} for {name}. Pass, say, bx.Levels(x=0.01, y=0.1, v=0.1); of optax.MultiSteps its "
                f"gradient_transformation()."
            )
        else:
            checks.scalar(f"step_sizes.{name}", step)
            checks.nonnegative(f"step_sizes.{name}", step)


def _check_order(order: Order) -> None:
    groups = order if isinstance(order, tuple | list) and all(isinstance(one, tuple | list) for one in order) else ()
    if sorted(str(name) for group in groups for name in group) != ["v", "x", "y"]:
        raise ValueError(
            f"order must name x, y and v once each, in groups; got {order!r:.80}. Take JACOBI or GAUSS_SEIDEL."
        )


def _check_batch(batch: Any, n: int) -> None:
    checks.instance("batch", batch, Batch, "Pass bx.Batch(outer=..., inner=...), leaves [n, ...].")
    checks.agents_axis("batch", batch, n, "Stack the agents' data; bx.replicate gives all of them the same.")

"""The engine of the decentralized single-loop methods: four independent choices make a method.

    LocalDirections what each agent can evaluate: its directions d_x, d_y, d_v, by default from one pull-back
    an Estimator    what each agent believes its directions to be
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
from bilevax.decentralized.local_directions import LocalDirections, second_order
from bilevax.decentralized.preconditioned import Preconditioned, Setting, preconditioned_move
from bilevax.problem import Batch, BilevelProblem, Calls, arrays, norm
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
      v: inverse-Hessian-vector products, 0 at the start; () in a method without them. `state._replace(v=...)` starts
        them warm, but not after the `init` of a snapshot method, which has evaluated its first directions at v = 0.
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
    corrections: Any


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
    local_directions: LocalDirections | None = None,
) -> Algorithm:
    """A decentralized single-loop bilevel method out of local directions, an estimator, corrections and an order.

        u = estimate of the directions at (x, y, v)      s⁺ = correct, mix and move s along u,  s in the group
        v⁺ ← v⁺ · min(1, radius/‖v⁺‖), agent by agent

    Args:
      problem: f_i and g_i, one signature for all agents: what differs is their batch.
      gossip: a `Gossip`, or `Levels` of them: one graph for each level.
      step_sizes: `Levels(x, y, v)` (or a tuple in that order) of numbers, schedules k -> number, or optax
        transformations, applied to each agent's corrected direction apart; of y and v also
        `bx.decentralized.preconditioned`. One value holds for all levels.
      estimator: see `bx.estimator`.
      corrections: see `bx.correction`; one, or `Levels` of them.
      order: groups of level names, such as `JACOBI` or `GAUSS_SEIDEL`; each level once.
      radius: of the ball that v is projected on, agent by agent, > 0; None for no projection.
      local_directions: see `bx.local_directions`; None for `second_order()`. Without a level v, what the other
        arguments say of it does not count.

    Returns:
      `Algorithm(init, step)` with `State` and `Info`.

    Raises:
      ValueError: if an argument is of another kind, if the graphs differ in their number of agents, if the order misses
        a level; from `init` and `step`, if a leaf lacks the agents' axis.

    Cost: that of the local directions, the estimator and the corrections. By default, in Jacobi order: one ∇f, one
    ∇_y g and one pull-back of v for each evaluation; Gauss–Seidel: one ∇_y g more, since y moves in between.
    (Estimators that branch, such as PAGE or a common coin, share nothing between the groups of an order: one ∇f and
    one ∇_y g more than declared.)

    Example:
        >>> import bilevax as bx
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> gossip = bx.gossip(bx.topology.ring(4))
        >>> method = bx.decentralized.single_loop(problem, gossip, 0.1, bx.estimator.full(), bx.correction.tracking())
    """
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    checks.instance("estimator", estimator, Estimator, "Pass, say, bx.estimator.full().")
    rule = second_order() if local_directions is None else local_directions
    checks.instance("local_directions", rule, LocalDirections, "Pass, say, bx.local_directions.second_order().")
    gossips = read_gossips(gossip)
    corrections = of_kind("corrections", corrections, Correction, "Pass, say, bx.correction.tracking().")
    steps = read_steps(step_sizes)
    _check_order(order)
    order = tuple(group for group in (tuple(name for name in group if name in rule.levels) for group in order) if group)
    if radius is not None:
        checks.scalar("radius", radius)
        checks.positive("radius", radius)
    oracles = [Oracle(partial(_evaluate, rule, problem, group), gossips.x, group) for group in order]
    unit_calls = _unit_calls(rule, order)

    def init(x: chex.ArrayTree, y: chex.ArrayTree, batch: Batch | None = None) -> State:
        check_start(gossips.x, x, y, batch)
        x, y = arrays(x), arrays(y)
        point = Levels(x, y, optax.tree.zeros_like(y) if "v" in rule.levels else ())
        memories = {
            name: getattr(corrections, name).init(
                getattr(gossips, name),
                getattr(point, name),
                move(getattr(steps, name), 0, Setting(problem, point, batch)),
            )
            for name in rule.levels
        }
        estimators = tuple(estimator.init(oracle, point, batch) for oracle in oracles)
        previous = point if estimator.remembers else ()
        start = jnp.zeros((), jnp.int32)
        return State(start, *point, previous, estimators, Levels((), (), ())._replace(**memories))

    def step(key: chex.PRNGKey | None, state: State, batch: Batch) -> tuple[State, Info]:
        check_step(gossips.x, key, state, State, batch)
        key = fold(key, state.k)
        start = point = Levels(state.x, state.y, state.v)
        previous, estimators, memories, spent, sent = state.previous, [], state.corrections, [], []
        for oracle, memory, unit in zip(oracles, state.estimators, unit_calls, strict=True):
            oracle = oracle._replace(previous=previous)
            d, memory, evaluations = estimator.update(fold(key, 0), memory, oracle, point, batch, state.k)
            estimators.append(memory)
            spent.append(jax.tree.map(lambda calls, times=evaluations: calls * times, unit))
            here = point
            for name in oracle.group:
                level_key = fold(key, 1 + Levels._fields.index(name))
                s, new, size = getattr(corrections, name).update(
                    level_key,
                    getattr(memories, name),
                    getattr(gossips, name),
                    getattr(point, name),
                    getattr(d, name),
                    move(
                        getattr(steps, name), state.k, Setting(problem, here, batch, fold(key, 4), gossips.x.agents())
                    ),
                )
                s = _projected(s, radius) if name == "v" and radius is not None else s
                point, memories = point._replace(**{name: s}), memories._replace(**{name: new})
                sent.append(size)
                previous = previous._replace(**{name: getattr(start, name)}) if estimator.remembers else ()
        rounds = sum(max(getattr(corrections, name).rounds for name in group) for group in order)
        calls = jax.tree.map(lambda *parts: sum(parts), *spent)
        info = Info(*moved(start, point), calls, sum(sent), rounds)
        return State(state.k + 1, *point, previous, tuple(estimators), memories), info

    return Algorithm(init, step)


def _evaluate(
    rule: LocalDirections, problem: BilevelProblem, group: tuple[str, ...], point: Levels, batch: Batch
) -> Levels:
    d = jax.vmap(partial(rule.evaluate, problem))(point.x, point.y, point.v, batch)
    return Levels(*(getattr(d, name) if name in group else None for name in Levels._fields))


def _unit_calls(rule: LocalDirections, order: Order) -> list[Calls]:
    """The calls of one evaluation of each group; what two groups read at one (x, y) is evaluated once."""
    units: list[Calls] = []
    seen: tuple[str, ...] = ()
    for group in order:
        units.append(rule.calls(group, seen))
        seen = () if {"x", "y"} & {*group} else seen + group
    return units


def move(step: Any, k: chex.Numeric, setting: Setting) -> Move:
    """How a level moves along a corrected direction, for the step size of that level at iteration k."""
    if isinstance(step, Preconditioned):
        return preconditioned_move(step, at(k, step.step_size), setting)
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

    return jax.vmap(one)(v) if jax.tree.leaves(v) else v


def moved(start: Levels, end: Levels) -> tuple[Levels, chex.Array]:
    """How far each level of each agent has moved, and which agents are no longer finite."""

    def distance(new: chex.ArrayTree, old: chex.ArrayTree) -> Any:
        return jax.vmap(norm)(optax.tree.sub(new, old)) if jax.tree.leaves(new) else ()

    moves = Levels(*map(distance, end, start))
    return moves, ~jnp.isfinite(sum(jax.tree.leaves(moves)))


def of_kind(name: str, value: Any, kind: type, fix: str) -> Levels:
    """Reads `Levels` of values of one kind."""
    values = levels(name, value)
    for one in values:
        checks.instance(name, one, kind, fix)
    return values


def read_gossips(gossip: Any) -> Levels:
    """Reads a gossip for each level, all with one number of agents."""
    gossips = of_kind("gossip", gossip, Gossip, "Pass bx.gossip(bx.topology.ring(8)).")
    if len({one.n for one in gossips}) > 1:
        raise ValueError(
            f"gossip must have one number of agents on all levels; got {[one.n for one in gossips]}. Take equal n."
        )
    return gossips


def read_steps(step_sizes: Any) -> Levels:
    """Reads a step size, a schedule or a transformation for each level."""
    steps = levels("step_sizes", step_sizes)
    for name, step in steps._asdict().items():
        if isinstance(step, optax.GradientTransformation):
            continue
        if isinstance(step, Preconditioned):
            if name == "x":
                raise ValueError(
                    "step_sizes.x must be a number, a schedule or an optax transformation; got preconditioned(...), "
                    "which has the curvature of y. Precondition y and v."
                )
        elif callable(step):
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
    return steps


def _check_order(order: Order) -> None:
    groups = order if isinstance(order, tuple | list) and all(isinstance(one, tuple | list) for one in order) else ()
    if sorted(str(name) for group in groups for name in group) != ["v", "x", "y"]:
        raise ValueError(
            f"order must name x, y and v once each, in groups; got {order!r:.80}. Take JACOBI or GAUSS_SEIDEL."
        )


def check_start(gossip: Gossip, x: chex.ArrayTree, y: chex.ArrayTree, batch: Batch | None) -> None:
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

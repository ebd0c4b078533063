"""The engine of the decentralized single-loop methods: four independent choices make a method.

    LocalDirections what each agent can evaluate: its directions d_x, d_y, d_v, by default from one pull-back
    an Estimator    what each agent believes its directions to be
    a Correction    how a level moves although the directions differ from agent to agent, one for each level
    an order        which levels move at once: JACOBI all three, GAUSS_SEIDEL y, then v, then x

One iteration, for each group of the order: estimate the directions of the group's levels at the present point, correct
them, mix and move.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.problem import Algorithm, Batch, BilevelProblem, Calls, arrays, norm
from bilevax.sampling import fold
from bilevax.single_loop._levels import Levels
from bilevax.single_loop._preconditioned import Setting
from bilevax.single_loop.correction.correction_type import Correction
from bilevax.single_loop.estimator import Estimator, Oracle
from bilevax.single_loop.local_directions import LocalDirections, second_order
from bilevax.single_loop.method import Info, State, check_start, check_step, moved, of_kind, read_gossips
from bilevax.single_loop.step_sizes import move, read_steps
from bilevax.typing import Key, PyTree, Scalar

Order = tuple[tuple[str, ...], ...]

JACOBI: Order = (("x", "y", "v"),)
GAUSS_SEIDEL: Order = (("y",), ("v",), ("x",))


def single_loop(
    problem: BilevelProblem,
    gossip: Any,
    step_sizes: Any,
    estimator: Estimator,
    correction: Any,
    *,
    order: Order = JACOBI,
    radius: Scalar | None = None,
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
        `bx.single_loop.preconditioned`. One value holds for all levels.
      estimator: see `bx.single_loop.estimator`.
      correction: see `bx.single_loop.correction`; one, or `Levels` of them.
      order: groups of level names, such as `JACOBI` or `GAUSS_SEIDEL`; each level once.
      radius: of the ball that v is projected on, agent by agent, > 0; None for no projection.
      local_directions: see `bx.single_loop.local_directions`; None for `second_order()`. Without a level v, what the
        other arguments say of it does not count.

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
        >>> from bilevax.single_loop import correction, estimator, single_loop
        >>> method = single_loop(problem, bx.gossip(bx.topology.ring(4)), 0.1, estimator.full(), correction.tracking())
    """
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    checks.instance("estimator", estimator, Estimator, "Pass, say, bx.single_loop.estimator.full().")
    rule = second_order() if local_directions is None else local_directions
    checks.instance(
        "local_directions", rule, LocalDirections, "Pass, say, bx.single_loop.local_directions.second_order()."
    )
    gossips = read_gossips(gossip)
    correction = of_kind("correction", correction, Correction, "Pass, say, bx.single_loop.correction.tracking().")
    steps = read_steps(step_sizes)
    _check_order(order)
    order = tuple(group for group in (tuple(name for name in group if name in rule.levels) for group in order) if group)
    if radius is not None:
        checks.scalar("radius", radius)
        checks.positive("radius", radius)
    oracles = [Oracle(partial(_evaluate, rule, problem, group), gossips.x, group) for group in order]
    unit_calls = _unit_calls(rule, order)

    def init(x: PyTree, y: PyTree, batch: Batch | None = None) -> State:
        check_start(gossips.x, x, y, batch)
        x, y = arrays(x), arrays(y)
        point = Levels(x, y, optax.tree.zeros_like(y) if "v" in rule.levels else ())
        memories = {
            name: getattr(correction, name).init(
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

    def step(key: Key | None, state: State, batch: Batch) -> tuple[State, Info]:
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
                s, new, size = getattr(correction, name).update(
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
        rounds = sum(max(getattr(correction, name).rounds for name in group) for group in order)
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


def _projected(v: PyTree, radius: Scalar) -> PyTree:
    def one(v: PyTree) -> PyTree:
        scale = jnp.minimum(1.0, radius / jnp.maximum(norm(v), jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), v)

    return jax.vmap(one)(v) if jax.tree.leaves(v) else v


def _check_order(order: Order) -> None:
    groups = order if isinstance(order, tuple | list) and all(isinstance(one, tuple | list) for one in order) else ()
    if sorted(str(name) for group in groups for name in group) != ["v", "x", "y"]:
        raise ValueError(
            f"order must name x, y and v once each, in groups; got {order!r:.80}. Take JACOBI or GAUSS_SEIDEL."
        )

"""The engine of the decentralized single-loop methods: four independent choices make a method.

    LocalDirections what each agent can evaluate: its directions d_x, d_y, d_v, by default from one pull-back
    an Estimator    what each agent believes its directions to be
    a Correction    how a level moves although the directions differ from agent to agent, one for each level
    an order        which levels move at once: JACOBI all three, GAUSS_SEIDEL y, then v, then x

One iteration, for each group of the order: estimate the directions of the group's levels at the present point, correct
them, mix and move.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.agents._gossip import Gossip, Mix
from bilevax.printing import as_called
from bilevax.problem import Algorithm, Batch, BilevelProblem, Calls, Directions, arrays, norm, owned
from bilevax.sampling import fold
from bilevax.single_loop._levels import Levels, PerLevel
from bilevax.single_loop._preconditioned import Place
from bilevax.single_loop.correction.correction_type import Correction, Move, Sent
from bilevax.single_loop.estimator import Estimator, Oracle
from bilevax.single_loop.local_directions import LocalDirections, second_order
from bilevax.single_loop.method import Info, State, check_start, check_step, moved, of_kind, read_gossips
from bilevax.single_loop.step_sizes import StepSize, StepSizes, move, read_steps
from bilevax.typing import Array, Key, PyTree, Scalar

Order = tuple[tuple[str, ...], ...]

ESTIMATE, LEVEL, PRECONDITION = 0, Levels(x=1, y=2, v=3), 4  # what the keys of an iteration fold in

JACOBI: Order = (("x", "y", "v"),)
GAUSS_SEIDEL: Order = (("y",), ("v",), ("x",))


@as_called
def single_loop(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    estimator: Estimator,
    correction: PerLevel[Correction],
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
    corrections = of_kind("correction", correction, Correction, "Pass, say, bx.single_loop.correction.tracking().")
    _check_functions(rule, estimator, corrections)
    steps = read_steps(step_sizes, rule.levels)
    if radius is not None:
        checks.scalar("radius", radius)
        checks.positive("radius", radius)
    radii = Levels(None, None, radius)
    parts = zip(Levels._fields, gossips, corrections, steps, radii, strict=True)
    levels = Levels(*(Level(*one) if one[0] in rule.levels else None for one in parts))
    groups = _groups(order, levels, rule, problem, gossips.x)

    def init(x: PyTree, y: PyTree, batch: Batch | None = None) -> State:
        """The first state, from leaves [n, ...]; the batch where the estimator evaluates at the start."""
        check_start(gossips.x, x, y, batch)
        x, y = arrays(x), arrays(y)
        point = Levels(x, y, () if levels.v is None else optax.tree.zeros_like(y))
        place = Place(problem, point, batch)
        memories = Levels(*(level.init(s, place) if level else () for level, s in zip(levels, point, strict=True)))
        estimators = tuple(estimator.init(group.oracle, point, batch) for group in groups)
        previous = point if estimator.remembers else ()
        return owned(State(jnp.zeros((), jnp.int32), *point, previous, estimators, memories))

    def step(key: Key | None, state: State, batch: Batch) -> tuple[State, Info]:
        """One iteration, on a batch with leaves [n, ...]; state.k is folded into the key."""
        check_step(gossips.x, key, state, State, batch)
        key, agents = fold(key, state.k), gossips.x.agents()
        start = point = Levels(state.x, state.y, state.v)
        previous, memories = state.previous, state.corrections
        estimators, spent, sent = [], [], []
        for group, memory in zip(groups, state.estimators, strict=True):
            oracle = group.oracle._replace(previous=previous)
            parts = estimator.update(fold(key, ESTIMATE), memory, oracle, point, batch, state.k)
            d, memory, evaluations = _estimated(parts, memory, agents, group, point)
            place = Place(problem, point, batch, fold(key, PRECONDITION), agents)
            moves = [
                level.update(fold(key, number), old, s, along, place, state.k) if level else (s, old, None)
                for number, level, old, s, along in zip(LEVEL, group.levels, memories, point, d, strict=True)
            ]
            point, memories = (Levels(*(move[part] for move in moves)) for part in (0, 1))
            if estimator.remembers:
                before = zip(group.levels, start, previous, strict=True)
                previous = Levels(*(s if level else old for level, s, old in before))
            estimators.append(memory)
            spent.append(jax.tree.map(lambda calls, times=evaluations: calls * times, group.calls))
            sent.append([move[2] for move in moves if move[2]])
        calls = jax.tree.map(lambda *parts: sum(parts), *spent)
        size = sum((jnp.asarray(one.bytes, float) for group in sent for one in group), start=jnp.zeros(agents.shape))
        info = Info(*moved(start, point), calls, size, sum(map(_most_rounds, sent)))
        return State(state.k + 1, *point, previous, tuple(estimators), memories), info

    return Algorithm(init, step)


class Level(NamedTuple):
    """One level of a method, with all that moves it.

    Attributes:
      name: "x", "y" or "v", for messages.
      gossip: over which graph it mixes.
      correction: how it mixes and moves although the directions differ from agent to agent.
      step_size: a number, a schedule k -> number, an optax transformation, or `preconditioned`.
      radius: of the ball that it is projected on, agent by agent; None for no projection.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> gossip, correction = bx.gossip(bx.topology.ring(4)), bx.single_loop.correction.none()
        >>> level, place = bx.single_loop.Level("x", gossip, correction, 0.5), bx.single_loop.Place(None, None, None)
        >>> s, d = jnp.zeros(4), jnp.ones(4)
        >>> s, state, sent = level.update(None, level.init(s, place), s, d, place, k=0)
        >>> s.tolist(), sent.rounds
        ([-0.5, -0.5, -0.5, -0.5], 1)
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
        local = len(self.gossip.agents())
        checks.agents_axis(f"direction of {self.name}", d, local, "Return directions of all agents that are held here.")
        how = _of_sums(self.gossip, state.gossip, move(self.step_size, k, place))
        z = self.gossip.weigh(state.gossip, s)
        gossip, mixed = _once_each(self.gossip)
        parts = self.correction.update(key, state, gossip, z, d, how, k)
        z_new, after, sent = checks.parts("correction.update", parts, "s⁺", "state", "Sent(bytes, rounds)")
        checks.same_form(f"{self.name} after correction.update", z_new, z, "Return s⁺ like s.")
        checks.same_form("state after correction.update", after, state, "Return it in the form in which init made it.")
        checks.instance(
            "what correction.update returns last", sent, Sent, "Return Sent(bytes=gossip.bytes(...), rounds=1)."
        )
        fix = "Return gossip.bytes(state.gossip, message), of several messages the sum."
        checks.one_for_each_agent("bytes of correction.update", sent.bytes, self.gossip.agents(), fix)
        checks.scalar("rounds of correction.update", sent.rounds, "Return the number of rounds, one after the other.")
        if any(record.state is leaf for leaf in jax.tree.leaves(after.gossip) for record in mixed if not record.tree):
            raise ValueError(
                "state.gossip after correction.update must be what gossip.mix returned; got one that has mixed. Keep "
                "what mix returns: new, mixing = gossip.mix(key, state.gossip, message)."
            )
        s_new = self.gossip.debias(after.gossip, z_new)
        return s_new if self.radius is None else _projected(s_new, self.radius), after, sent


def _of_sums(gossip: Gossip, state: Any, how: Move) -> Move:
    """The move of z = ω s along the tracker of sums: that of s along what it says of one agent, times ω."""
    if how.linear or not jax.tree.leaves(state) or gossip.weights(state) is None:
        return how

    weights = state

    def apply(t: PyTree, state: Any, s: PyTree) -> tuple[PyTree, Any]:
        step, state = how.apply(gossip.debias(weights, t), state, gossip.debias(weights, s))
        return gossip.weigh(weights, step), state

    return how._replace(apply=apply)


class Mixed(NamedTuple):
    """An array of a gossip state, and the arrays of the one message that it may mix next; () if it has mixed."""

    state: Any
    tree: tuple[Any, ...]


def _once_each(gossip: Gossip) -> tuple[Gossip, list[Mixed]]:
    """The gossip of one update, in which each state mixes one message, and what it has mixed.

    Two messages that share a state are off under push-sum, whose weights then advance twice, under compression, whose
    copies are of one message, and over graphs that change from round to round. Several rounds of one message may follow
    each other. What is compared are the arrays of a trace themselves, not their values.
    """
    record: list[Mixed] = []

    def once(send: Mix) -> Mix:
        def call(key: Key | None, state: Any, tree: PyTree) -> tuple[PyTree, Any]:
            arrays, leaves = jax.tree.leaves(state), tuple(jax.tree.leaves(tree))
            if not arrays and jax.tree.leaves(jax.eval_shape(gossip.init, tree)):
                raise ValueError(
                    f"state of a gossip must be that of gossip.init, or what mix returned; got {state!r:.80}. Keep "
                    f"gossip.init(message) in the state of the correction."
                )
            if any(
                array is one.state and [*map(id, leaves)] != [*map(id, one.tree)] for array in arrays for one in record
            ):
                raise ValueError(
                    "state of a gossip must mix one message once in an update; got one that has mixed already. Make a "
                    "state for each message with gossip.init, and keep them all in the state of the correction."
                )
            parts = checks.parts("gossip.mix", send(key, state, tree), "tree", "state")
            checks.same_form("what gossip mixes", parts[0], tree, "Return from mix and laplacian a tree like theirs.")
            later = jax.tree.leaves(parts[1])
            record.extend(Mixed(array, ()) for array in arrays if not any(array is one for one in later))
            record.extend(Mixed(array, tuple(jax.tree.leaves(parts[0]))) for array in later)
            return parts[0], parts[1]

        return call

    return gossip._replace(mix=once(gossip.mix), laplacian=once(gossip.laplacian)), record


def _projected(v: PyTree, radius: Scalar) -> PyTree:
    def one(v: PyTree) -> PyTree:
        scale = jnp.minimum(1.0, radius / jnp.maximum(norm(v), float(jnp.finfo(jnp.float32).tiny)))
        return jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), v)

    return jax.vmap(one)(v)


class Group(NamedTuple):
    """Levels that move at once; None at those that do not, and what one evaluation of their directions costs."""

    levels: Levels[Level | None]
    oracle: Oracle
    calls: Calls


def _groups(
    order: Order, levels: Levels[Level | None], rule: LocalDirections, problem: BilevelProblem, gossip: Gossip
) -> list[Group]:
    """The groups of the order; what two of them read at one (x, y) is evaluated once."""
    _check_order(order)
    groups: list[Group] = []
    seen: tuple[str, ...] = ()
    for names in order:
        names = tuple(name for name in names if name in rule.levels)
        if names:
            chosen = Levels(*(level if level and level.name in names else None for level in levels))
            calls = rule.calls(names, seen)
            checks.instance("what local_directions.calls returns", calls, Calls, "Return bx.problem.Calls(...).")
            oracle = Oracle(partial(_evaluate, rule, problem, chosen), gossip, names, problem=problem)
            groups.append(Group(chosen, oracle, calls))
            seen = () if {"x", "y"} & {*names} else seen + names
    return groups


def _evaluate(
    rule: LocalDirections, problem: BilevelProblem, chosen: Levels[Level | None], point: Levels[PyTree], batch: Batch
) -> Levels[PyTree]:
    d = jax.vmap(partial(rule.evaluate, problem))(point.x, point.y, point.v, batch)
    checks.instance("what local_directions.evaluate returns", d, Directions, "Return bx.problem.Directions(x, y, v).")
    for level, along, s in zip(chosen, d, point, strict=True):
        if level:
            fix = "Return directions like x, y and y."
            checks.same_form(f"the direction of {level.name}", along, s, fix)
    return Levels(*(along if level else None for level, along in zip(chosen, d, strict=True)))


def _estimated(
    parts: Any, memory: Any, agents: Array, group: Group, point: Levels[PyTree]
) -> tuple[Levels[PyTree], Any, Array]:
    """What an estimator returns, if it is what it should be; a correction of its own may take other directions."""
    d, after, evaluations = checks.parts("estimator.update", parts, "directions", "state", "evaluations")
    checks.instance("what estimator.update returns first", d, Levels, "Return bx.Levels, None at levels that stay.")
    checks.same_form("state after estimator.update", after, memory, "Return it in the form in which init made it.")
    fix = "Return how often each agent evaluated, say jnp.ones_like(oracle.gossip.agents())."
    checks.one_for_each_agent("evaluations of estimator.update", evaluations, agents, fix)
    for level, along, s in zip(group.levels, d, point, strict=True):
        if level:
            name = f"direction of {level.name} of estimator.update"
            if along is None:
                raise ValueError(
                    f"{name} must be given, for this level moves now; got None. Return what evaluate does."
                )
            if checks.Shapes.of(along).structure == checks.Shapes.of(s).structure:
                checks.same_form(name, along, s, "Return directions like the point: cast with .astype(leaf.dtype).")
    return d, after, evaluations


def _most_rounds(sent: list[Sent]) -> Scalar:
    """Of levels that move at once, which send at once."""
    rounds = [one.rounds for one in sent]
    return max(rounds) if all(isinstance(one, int) for one in rounds) else reduce(jnp.maximum, rounds)


def _check_functions(rule: LocalDirections, estimator: Estimator, corrections: Levels[Correction]) -> None:
    """Raises ValueError unless the functions of the parts take what they are given."""
    checks.function("local_directions.evaluate", rule.evaluate, "problem", "x", "y", "v", "batch")
    checks.function("local_directions.calls", rule.calls, "group", "seen")
    checks.function("estimator.init", estimator.init, "oracle", "point", "batch")
    checks.function("estimator.update", estimator.update, "key", "state", "oracle", "point", "batch", "k")
    for correction in corrections:
        checks.function("correction.init", correction.init, "gossip", "s", "move")
        checks.function("correction.update", correction.update, "key", "state", "gossip", "s", "d", "move", "k")


def _check_order(order: Order) -> None:
    groups = order if isinstance(order, tuple | list) and all(isinstance(one, tuple | list) for one in order) else ()
    if sorted(str(name) for group in groups for name in group) != ["v", "x", "y"]:
        raise ValueError(
            f"order must name x, y and v once each, in groups; got {order!r:.80}. Take JACOBI or GAUSS_SEIDEL."
        )

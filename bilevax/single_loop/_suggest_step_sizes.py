"""Step sizes that agents find by themselves: the curvature of the mean g, and short pilots of the method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.agents import topology as graphs
from bilevax.agents._gossip import Gossip
from bilevax.printing import by_shape
from bilevax.problem import Algorithm, Batch, BilevelProblem, Calls, directions, norm
from bilevax.sampling import check_key, fold, needed
from bilevax.single_loop._averaging import Average, average
from bilevax.single_loop._curvatures import Averages, Spent, curvatures
from bilevax.single_loop._levels import Levels, PerLevel
from bilevax.single_loop.correction import Correction, Move, tracking
from bilevax.single_loop.method import check_start, of_kind
from bilevax.typing import Array, Key, PyTree, Scalar

ROUGH, FINE = 0.1, 1e-6  # what averages of vectors and of numbers leave of the agents' differences
WARM, LENGTH, CONFIRMED = 10, 5, 15  # ∇f of each agent in a warm-up, a pilot and after it; after each losses are read
RISES = 0.2  # of what a loss falls in a run, how much it may rise in between
ROUNDING = 1e-3  # part of g that is no rise
GROWTH = 2.0  # of the moves of y and v in a warm-up, at most
LONGEST = 100.0  # iterations for each ∇f of an agent, at most
MOST_UNLIKE = 1.5  # steps over b / L_i of an agent need not be stable, whatever the mean is
SHORTER_X, SHORTER_Y = 4.0, 2.0  # what the steps are divided by after a pilot that fails, y and v at the first
CURVATURE, SLOPE, RUN = range(3)  # what the key folds in


MakeAlgorithm = Callable[[Levels[Any]], Algorithm]


class StepSizesInfo(NamedTuple):
    """What `suggest_step_sizes` found, and what it spent.

    Attributes:
      curvature: L, the largest eigenvalue of ∇²_yy of the mean g in size; where each agent has a y of its own, of any
        g_i. Ten power iterations stay below it, by a fifth on dense spectra of twelve: a_y leaves room for that.
      steps: `Levels` of the steps of each pilot [pilots]; NaN for those that were not run.
      scores: mean f at the end of each pilot [pilots]; inf where f was not finite or did not keep falling, NaN where
        none was run.
      breakdown: True where no pilot was good, or f did not keep falling after the best of them: the step of x is then
        NaN, which no method takes.
      calls: `Calls` with leaves [n], of everything: products, warm-up and pilots.
      bytes: sent by each agent [n] to all its neighbours together.
      rounds: of communication, one after the other; scalar.
      state: of the method at the end of the chosen run: who goes on from it, and not from the start, wastes none of it.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: 2 * (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> make, start = lambda steps: bx.decentralized.sldbo(problem, gossip, steps), jnp.zeros(4)
        >>> _, info = bx.single_loop.suggest_step_sizes(make, problem, gossip, start, start, batch, jax.random.key(0))
        >>> info.state.k == info.calls.outer_gradients[0] - 1 - 5  # but for the slope and a pilot that was not chosen
        Array(True, dtype=bool)
    """

    curvature: Array
    steps: Levels[Array]
    scores: Array
    breakdown: Array
    calls: Calls
    bytes: Array
    rounds: Array
    state: Any

    def __repr__(self) -> str:
        return by_shape(self)


def suggest_step_sizes(
    make: MakeAlgorithm,
    problem: BilevelProblem,
    gossip: Gossip,
    x: PyTree,
    y: PyTree,
    batch: Batch,
    key: Key | None,
    *,
    pilots: int = 6,
    correction: PerLevel[Correction] | None = None,
) -> tuple[Levels[Array], StepSizesInfo]:
    """Step sizes of a method from the curvature of the mean g and short runs of the method itself; nobody sends data.

        p_i = ∇²_yy g_i u_i,      t ← W̃ (t + p − p_last),      u_i = t_i / ‖t_i‖             ten times; L = mean ‖t_i‖
        a_y = a_v = b / 2 max(L, ⅔ max L_i),      b = min over y and v of correction.largest_step(eigenvalues of W)
        a_x = min(1, a_y L) · mean f / (4 ‖mean d_x‖²)      after a warm-up of y and v with a_x = 0

    with W̃ as many rounds as take nine tenths of a difference away, and L_i of each agent alone: steps over b / max L_i
    need not be stable where agents differ, whatever L is. Where still the mean g does not keep falling in the warm-up,
    or y and v move ever farther, a_y and a_v are halved and it starts anew.

    The first pilot runs with these steps from the end of the warm-up. It fails if f, averaged at the agents' own y, is
    not finite or rises in between by more than a fifth of what it falls and twice what it rises in half of the warm-up:
    then a_y and a_v are halved, after later ones that fail a_x is divided by 4, and the next one runs. After a good one
    a_x / 4 is tried. The better of both goes on three times as long; where f does not keep falling then, all steps are
    halved, and the run starts at the end of the warm-up again: it may rise there for as long as a pilot, as it does
    where agents come closer. Where agents skip, a_y and a_v are multiplied by 4 / (3 + T) for T iterations between two
    refreshes.

    f should have its lower bound near 0, as cross entropies and squares do: a_x is a quarter of Polyak's step, which
    short runs, that gain from any longer step, do not exceed. What is found is good for the beginning: what grows
    slowly does not show in so few iterations, nor a curvature that grows later; `moves` of the method's Info tell. Over
    a directed graph or a sequence of graphs, and for a correction that does not say more, b = 2, as for descent, and
    the runs alone tell what is stable.

    Args:
      make: `make(step_sizes) -> Algorithm`, for `Levels` of traced numbers; its state has fields x, y and v, its Info
        moves, calls, bytes and rounds.
      problem: f_i and g_i, as in `make`.
      gossip: over which numbers and products are averaged, that of `make` or a better one; not compressed.
      x: start, leaves [n, ...].
      y: start, leaves [n, ...].
      batch: of all agents, leaves [n, ...].
      key: one random key.
      pilots: at most so many, >= 1, and as many tries of the warm-up before and of the longer run after them.
      correction: of `make`, or `Levels` of them; None for `tracking()`. Where it is `local()` for y, L is that of the
        agent with the largest.

    Returns:
      `(Levels(x, y, v), StepSizesInfo)`, scalars.

    Raises:
      ValueError: if an argument is of another kind, `make` returns no `Algorithm`, `pilots` < 1, key is not one key,
        gossip is compressed, or the method has no v.

    Cost: one ∇_y g and twenty Hessian products, one evaluation of the directions and, counted in ∇f of an agent, ten
    for each warm-up, five for each pilot, of which two or three are usual, and fifteen for each run after the best of
    them: all in `info.calls` and `info.bytes`, but for f and g at about every one of these, and for what the method
    evaluates at `init`. `info.state` keeps thirty of them, or fewer where steps were halved after the best pilot. Ten
    averages of y and one of x, of about 3 / √(2 (1 − σ)) rounds each where W is symmetric and fixed, and some of single
    numbers.

    Reference: power iteration, with the dynamic average of gradient tracking in it (arXiv 1607.03218) and Chebyshev's
    acceleration of each average; Polyak's step, "Introduction to optimization", 1987. The factors are what held on the
    tasks of `python -m benchmarks decentralized-step-sizes`, which shows how far they are from tuned steps.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: 2 * (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> make = lambda step_sizes: bx.decentralized.sldbo(problem, gossip, step_sizes)
        >>> start, key = jnp.zeros(4), jax.random.key(0)
        >>> steps, info = bx.single_loop.suggest_step_sizes(make, problem, gossip, start, start, batch, key)
        >>> round(float(info.curvature), 4), round(float(steps.y), 4), bool(info.breakdown)
        (4.0, 0.25, False)
    """
    checks.function("make", make, "step_sizes")
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    checks.instance("gossip", gossip, Gossip, "Pass bx.gossip(bx.topology.ring(8)).")
    checks.instance("batch", batch, Batch, "Pass bx.Batch(outer=..., inner=...), leaves [n, ...].")
    pilots = checks.count("pilots", pilots, minimum=1)
    check_start(gossip, x, y, batch)
    check_key(key)
    key = needed(key, "the start of the power iteration")
    corrections = of_kind(
        "correction", tracking() if correction is None else correction, Correction, "Pass, say, tracking()."
    )
    _check_made(make, x, y, batch)
    averages = Averages(average(gossip, ROUGH), average(gossip, FINE))
    bound, own = _bound(gossip, corrections), not _mixes(corrections.y, gossip, y)

    @jax.jit  # one program, in place of one for each part
    def find(key: Key, x: PyTree, y: PyTree, batch: Batch) -> tuple[Levels[Array], StepSizesInfo]:
        found, spent = curvatures(fold(key, CURVATURE), problem, gossip, averages, x, y, batch)
        level = found.largest if own else found.mean
        a = jnp.asarray(bound / (2 * jnp.maximum(level, found.largest / MOST_UNLIKE)), float)
        run = _runner(make, problem, gossip, averages.fine, fold(key, RUN), batch)
        start = make(Levels(jnp.zeros_like(a), a, a)).init(x, y, batch)
        a, warm, read, spent = _warm_up(run, start, a, pilots, spent)
        slope, spent = _slope(fold(key, SLOPE), problem, gossip, averages, warm, batch, spent)
        quick = jnp.minimum(1.0, a * level)
        steps = Levels(jnp.asarray(quick * jnp.abs(read[-1]) / (4 * slope), float), a, a)
        return _search(run, warm, steps, pilots, _risen(read[WARM // 2 :]), level, spent)

    return find(key, x, y, batch)


Run = Callable[[Levels[Array], Any, int, Spent], tuple[Any, Array, Spent]]


def _runner(
    make: MakeAlgorithm,
    problem: BilevelProblem,
    gossip: Gossip,
    fine: Average,
    key: Key,
    batch: Batch,
) -> Run:
    """`run(steps, state, length, spent) -> (state, read [4, length + 1], spent)`, the same draws in each.

    Its length is told in ∇f of an agent, at most one in each iteration; read are the mean f, g, and moves of y and v.
    """

    def look(state: Any, moves: Array) -> Array:
        pair = (jax.vmap(loss)(state.x, state.y, data) for loss, data in zip(problem, batch, strict=True))
        return jnp.stack([*(jnp.asarray(each, float) for each in pair), *moves])

    def run(steps: Levels[Array], state: Any, length: int, spent: Spent) -> tuple[Any, Array, Spent]:
        begun, still = spent, jnp.zeros((2, *gossip.agents().shape))

        def part(carry: tuple[Any, ...], number: Array) -> tuple[tuple[Any, ...], Array]:
            enough, most = begun.refreshes + number + 1.0, begun.iterations + LONGEST * (number + 1.0)

            def goes_on(carry: tuple[Any, ...]) -> Array:
                return (carry[1].refreshes < enough) & (carry[1].iterations < most)

            def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
                state, spent, _ = carry
                paced = Levels(steps.x, spent.pace() * steps.y, spent.pace() * steps.v)
                state, info = make(paced).step(key, state, batch)
                moves = jnp.stack([jnp.asarray(part, float) for part in info.moves[1:]])
                return state, spent.with_iteration(info, gossip), moves

            state, spent, moves = jax.lax.while_loop(goes_on, step, carry)
            return (state, spent, moves), look(state, moves)

        (end, spent, _), later = jax.lax.scan(part, (state, spent, still), jnp.arange(length))
        read = jnp.concatenate([look(state, still)[None], later])
        means, size = fine.apply(key, jnp.transpose(read, (2, 1, 0)))
        return end, gossip.mean(means), spent.sent(size, fine.rounds)

    return run


def _risen(read: Array, since: Scalar = 0) -> Array:
    """What a loss rises along a run, from one of its readings on."""
    rises = jnp.maximum(jnp.diff(read), 0)
    return jnp.where(jnp.arange(rises.size) >= since, rises, 0).sum()


def _falls(read: Array, usual: Scalar, since: Scalar = 0) -> Array:
    """Whether a loss keeps falling, but for a fifth of what it falls and for twice what is usual."""
    return jnp.isfinite(read).all() & (_risen(read, since) <= RISES * jnp.maximum(read[0] - read[-1], 0) + 2 * usual)


def _warm_up(run: Run, start: Any, a: Array, most: int, spent: Spent) -> tuple[Array, Any, Array, Spent]:
    """Runs of y and v alone, with steps halved until g falls and moves do not grow; with them the mean f along it."""

    def once(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        number, a, _, _, _, spent = carry
        a = jnp.where(number > 0, a / 2, a)
        state, (outer, inner, *moves), spent = run(Levels(jnp.zeros_like(a), a, a), start, WARM, spent)
        calm = moves[0][-1] + moves[1][-1] <= GROWTH * (moves[0][1] + moves[1][1])
        good = _falls(inner, ROUNDING * jnp.abs(inner[0])) & jnp.isfinite(outer).all() & calm
        return number + 1, a, state, outer, good, spent

    nothing = jnp.zeros((), jnp.int32), a, start, jnp.zeros(WARM + 1), jnp.zeros((), bool), spent
    _, a, warm, read, _, spent = jax.lax.while_loop(lambda carry: (carry[0] < most) & ~carry[4], once, nothing)
    return a, warm, read, spent


def _search(
    run: Run, warm: Any, steps: Levels[Array], pilots: int, usual: Array, curvature: Array, spent: Spent
) -> tuple[Levels[Array], StepSizesInfo]:
    """Pilots, each from the warm state, until one is not better than the one before, which was good."""
    none = jnp.full(pilots, jnp.nan, steps.x.dtype)
    best = Pilot(Levels(none[0], steps.y, steps.v), jnp.full_like(none[0], jnp.inf), warm)
    first = Trials(jnp.zeros((), jnp.int32), steps, best, Levels(none, none, none), none, jnp.zeros((), bool), spent)

    def pilot(now: Trials) -> Trials:
        state, (read, *_), spent = run(now.steps, warm, LENGTH, now.spent)
        good = _falls(read, usual)
        trial = Pilot(now.steps, jnp.where(good, read[-1], jnp.inf), state)
        better = trial.score < now.best.score
        paced = Levels(now.steps.x, spent.pace() * now.steps.y, spent.pace() * now.steps.v)
        tried = jax.tree.map(lambda all, one: all.at[now.number].set(one), now.tried, paced)
        x, y, v = now.steps
        inner = jnp.where(~good & (now.number == 0), 1 / SHORTER_Y, 1.0)
        return Trials(
            now.number + 1,
            Levels(jnp.where(inner < 1, x, x / SHORTER_X), inner * y, inner * v),
            jax.tree.map(lambda new, old: jnp.where(better, new, old), trial, now.best),
            tried,
            now.scores.at[now.number].set(trial.score),
            jnp.isfinite(now.best.score) & ~better,
            spent,
        )

    end = jax.lax.while_loop(lambda now: (now.number < pilots) & ~now.done, pilot, first)
    (x, y, v), state, good, spent = _confirmed(run, warm, end.best, pilots, usual, end.spent)
    steps = Levels(jnp.where(good, x, jnp.nan), spent.pace() * y, spent.pace() * v)
    told = (curvature, end.tried, end.scores, ~good, spent.calls, spent.bytes, spent.rounds, state)
    return steps, StepSizesInfo(*told)


def _confirmed(
    run: Run, warm: Any, best: "Pilot", most: int, usual: Array, spent: Spent
) -> tuple[Levels[Array], Any, Array, Spent]:
    """Goes on with the best pilot; where f does not keep falling, all steps are halved, from the warm state on.

    There agents that come closer may raise f, whatever the steps are: a rise as long as a pilot takes is no sign.
    """

    def once(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        number, steps, state, _, spent = carry
        again = number > 0
        steps = jax.tree.map(lambda step: jnp.where(again, step / 2, step), steps)
        state = jax.tree.map(lambda old, start: jnp.where(again, start, old), state, warm)
        end, (read, *_), spent = run(steps, state, CONFIRMED, spent)
        return number + 1, steps, end, _falls(read, usual, jnp.where(again, LENGTH, 0)), spent

    failed = jnp.isinf(best.score)
    first = jnp.zeros((), jnp.int32), best.steps, best.state, jnp.zeros((), bool), spent
    _, steps, state, good, spent = jax.lax.while_loop(
        lambda carry: (carry[0] < most) & ~carry[3] & ~failed, once, first
    )
    return steps, state, good, spent


class Pilot(NamedTuple):
    """Steps, the mean f at the end, and the state there."""

    steps: Levels[Array]
    score: Array
    state: Any


class Trials(NamedTuple):
    """Pilots so far, the next steps, the best pilot, what was tried [pilots], and whether that is enough."""

    number: Array
    steps: Levels[Array]
    best: Pilot
    tried: Levels[Array]
    scores: Array
    done: Array
    spent: Spent


def _slope(
    key: Key, problem: BilevelProblem, gossip: Gossip, averages: Averages, state: Any, batch: Batch, spent: Spent
) -> tuple[Array, Spent]:
    """‖mean d_x‖² on all data."""
    d = jax.vmap(lambda *parts: directions(problem, *parts).x)(state.x, state.y, state.v, batch)
    together, size = averages.rough.apply(key, d)
    ones = jnp.ones_like(gossip.agents())
    spent = spent.sent(size, averages.rough.rounds).with_calls(Calls(ones, ones, ones, ones))
    squares, size = averages.fine.apply(key, jax.vmap(norm)(together) ** 2)
    return gossip.mean(squares), spent.sent(size, averages.fine.rounds)


def _bound(gossip: Gossip, corrections: Levels[Correction]) -> Array:
    """The least a L below which y and v are stable on this graph, that of the mean where W is not fixed or directed."""
    graph = gossip.topology
    known = isinstance(graph, graphs.Topology) and graphs.is_symmetric(graph)
    values = [1.0, graphs.smallest_eigenvalue(graph)] if known else [1.0]
    return jnp.minimum(*(correction.largest_step(values) for correction in corrections[1:]))


def _mixes(correction: Correction, gossip: Gossip, s: PyTree) -> bool:
    """Whether a correction mixes: of one that does not, the state of the gossip is ()."""
    marked = gossip._replace(init=lambda tree: jnp.zeros(()))
    still = Move(lambda s: (), lambda t, state, s: (t, state), linear=True)
    return bool(jax.tree.leaves(jax.eval_shape(lambda s: correction.init(marked, s, still).gossip, s)))


def _check_made(make: MakeAlgorithm, x: PyTree, y: PyTree, batch: Batch) -> None:
    def start(step: Array) -> Any:
        fix = "Return, say, bx.decentralized.sldbo(problem, gossip, step_sizes)."
        method = make(Levels(step, step, step))
        checks.instance("what make returns", method, Algorithm, fix)
        return method.init(x, y, batch)

    state = jax.eval_shape(start, jnp.zeros(()))
    fields = getattr(state, "_fields", ())
    if not {"x", "y", "v"} <= {*fields} or not jax.tree.leaves(state.v):
        raise ValueError(
            f"make must return a method whose state has x, y and v; got {type(state).__name__} without all of them. "
            f"Take a method with a level v, such as bx.decentralized.sldbo."
        )

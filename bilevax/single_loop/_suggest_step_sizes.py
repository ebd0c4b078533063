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
WARM_UP, PILOTS, CONFIRMATION, END = range(4)  # the phases
LENGTHS = WARM, LENGTH, CONFIRMED = 10, 5, 15  # ∇f of each agent in a run of each; after each losses are read
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
        steps = Levels(jnp.zeros_like(a), a, a)
        start = make(steps).init(x, y, batch)

        def polyak(state: Any, a: Array, outer: Array, spent: Spent) -> tuple[Array, Spent]:
            slope, spent = _slope(fold(key, SLOPE), problem, gossip, averages, state, batch, spent)
            return jnp.asarray(jnp.minimum(1.0, a * level) * jnp.abs(outer) / (4 * slope), float), spent

        draws = fold(key, RUN)
        run, read = _runner(make, problem, gossip, draws, batch), _reader(gossip, averages.fine, draws)
        end = _search(run, read, polyak, start, steps, pilots, spent)
        (x_step, y_step, v_step), pace = end.steps, end.spent.pace()
        told = (level, end.tried, end.scores, ~end.good, end.spent.calls, end.spent.bytes, end.spent.rounds, end.state)
        return Levels(jnp.where(end.good, x_step, jnp.nan), pace * y_step, pace * v_step), StepSizesInfo(*told)

    return find(key, x, y, batch)


Run = Callable[[Levels[Array], Any, Array, Spent], tuple[Any, Array, Spent]]
Read = Callable[[Array, Spent], tuple[Array, Spent]]
FirstStep = Callable[[Any, Array, Array, Spent], tuple[Array, Spent]]


def _runner(make: MakeAlgorithm, problem: BilevelProblem, gossip: Gossip, key: Key, batch: Batch) -> Run:
    """`run(steps, state, length, spent) -> (state, seen [1 + the longest, 4, n], spent)`, the same draws in each.

    Its length is told in ∇f of an agent, at most one in each iteration, and traced: a program holds one copy of the
    method's step. Seen are each agent's f, g, and moves of y and v; zeros after the end.
    """

    def look(state: Any, moves: Array) -> Array:
        pair = (jax.vmap(loss)(state.x, state.y, data) for loss, data in zip(problem, batch, strict=True))
        return jnp.stack([*(jnp.asarray(each, float) for each in pair), *moves])

    def run(steps: Levels[Array], state: Any, length: Array, spent: Spent) -> tuple[Any, Array, Spent]:
        begun, still = spent, jnp.zeros((2, *gossip.agents().shape))

        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            state, spent, _ = carry
            paced = Levels(steps.x, spent.pace() * steps.y, spent.pace() * steps.v)
            state, info = make(paced).step(key, state, batch)
            moves = jnp.stack([jnp.asarray(part, float) for part in info.moves[1:]])
            return state, spent.with_iteration(info, gossip), moves

        def part(number: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:  # of number 0 there is the look alone
            enough, most = begun.refreshes + number, begun.iterations + LONGEST * number

            def goes_on(carry: tuple[Any, ...]) -> Array:
                return (carry[1].refreshes < enough) & (carry[1].iterations < most)

            state, spent, moves, seen = carry
            state, spent, moves = jax.lax.while_loop(goes_on, step, (state, spent, moves))
            return state, spent, moves, seen.at[number].set(look(state, moves))

        nothing = jnp.zeros((1 + max(LENGTHS), 4, *gossip.agents().shape))
        end, spent, _, seen = jax.lax.fori_loop(0, length + 1, part, (state, spent, still, nothing))
        return end, seen, spent

    return run


def _reader(gossip: Gossip, fine: Average, key: Key) -> Read:
    """`read(seen [length + 1, 4, n], spent) -> (means [4, length + 1], spent)`."""

    def read(seen: Array, spent: Spent) -> tuple[Array, Spent]:
        means, size = fine.apply(key, jnp.transpose(seen, (2, 1, 0)))
        return gossip.mean(means), spent.sent(size, fine.rounds)

    return read


def _risen(read: Array, since: Scalar = 0) -> Array:
    """What a loss rises along a run, from one of its readings on."""
    rises = jnp.maximum(jnp.diff(read), 0)
    return jnp.where(jnp.arange(rises.size) >= since, rises, 0).sum()


def _falls(read: Array, usual: Scalar, since: Scalar = 0) -> Array:
    """Whether a loss keeps falling, but for a fifth of what it falls and for twice what is usual."""
    return jnp.isfinite(read).all() & (_risen(read, since) <= RISES * jnp.maximum(read[0] - read[-1], 0) + 2 * usual)


class Pilot(NamedTuple):
    """Steps, the mean f at the end, and the state there."""

    steps: Levels[Array]
    score: Array
    state: Any


class Search(NamedTuple):
    """The next run: its phase, how many that had, steps and state it begins with; and what was found so far.

    That is the state after the warm-up, what f usually rises, the best pilot, what was tried [pilots], and whether the
    last run was good. At the end, `steps` and `state` are those of the last run.
    """

    phase: Array
    number: Array
    steps: Levels[Array]
    state: Any
    warm: Any
    usual: Array
    best: Pilot
    tried: Levels[Array]
    scores: Array
    good: Array
    spent: Spent

    def turn_to(self, phase: int, **parts: Any) -> "Search":
        """With the first run of a phase next."""
        zero = jnp.zeros_like(self.number)
        return self._replace(phase=zero + phase, number=zero, **parts)


def _search(
    run: Run, read: Read, polyak: FirstStep, start: Any, steps: Levels[Array], most: int, spent: Spent
) -> Search:
    """Runs one after the other, in one loop: each says what the next one is."""

    def after_warm_up(now: Search, end: Any, seen: Array) -> Search:
        """Halves the steps until g falls and moves do not grow."""
        (outer, inner, *moves), spent = read(seen[: WARM + 1], now.spent)
        calm = moves[0][-1] + moves[1][-1] <= GROWTH * (moves[0][1] + moves[1][1])
        good = _falls(inner, ROUNDING * jnp.abs(inner[0])) & jnp.isfinite(outer).all() & calm
        now = now._replace(number=now.number + 1, spent=spent)

        def again(now: Search) -> Search:
            return now._replace(steps=jax.tree.map(lambda step: step / 2, now.steps))

        def to_pilots(now: Search) -> Search:
            x, spent = polyak(end, now.steps.y, outer[-1], now.spent)
            now = now.turn_to(PILOTS, steps=now.steps._replace(x=x), state=end, warm=end, spent=spent)
            best = now.best._replace(steps=now.steps._replace(x=now.best.steps.x), state=end)
            return now._replace(usual=_risen(outer[WARM // 2 :]), best=best)

        return jax.lax.cond(good | (now.number >= most), to_pilots, again, now)

    def after_pilot(now: Search, end: Any, seen: Array) -> Search:
        """Each is from the warm state, until one is not better than the one before, which was good."""
        (outer, *_), spent = read(seen[: LENGTH + 1], now.spent)
        good = _falls(outer, now.usual)
        trial = Pilot(now.steps, jnp.where(good, outer[-1], jnp.inf), end)
        better, done = trial.score < now.best.score, jnp.isfinite(now.best.score)
        paced = Levels(now.steps.x, spent.pace() * now.steps.y, spent.pace() * now.steps.v)
        x, y, v = now.steps
        inner = jnp.where(~good & (now.number == 0), 1 / SHORTER_Y, 1.0)
        now = now._replace(
            number=now.number + 1,
            steps=Levels(jnp.where(inner < 1, x, x / SHORTER_X), inner * y, inner * v),
            best=_chosen(better, trial, now.best),
            tried=jax.tree.map(lambda all, one: all.at[now.number].set(one), now.tried, paced),
            scores=now.scores.at[now.number].set(trial.score),
            spent=spent,
        )
        none = jnp.isinf(now.best.score)
        confirmed = now.turn_to(CONFIRMATION, steps=now.best.steps, state=now.best.state, good=jnp.zeros_like(good))
        confirmed = confirmed._replace(phase=jnp.where(none, END, CONFIRMATION))
        return _chosen((now.number >= most) | (done & ~better), confirmed, now)

    def after_confirmation(now: Search, end: Any, seen: Array) -> Search:
        (outer, *_), spent = read(seen, now.spent)
        return _confirmed(now._replace(spent=spent), end, outer, most)

    def turn(now: Search) -> Search:
        end, seen, spent = run(now.steps, now.state, jnp.asarray(LENGTHS)[now.phase], now.spent)
        after = after_warm_up, after_pilot, after_confirmation
        return jax.lax.switch(now.phase, after, now._replace(spent=spent), end, seen)

    zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    none = jnp.full(most, jnp.nan, steps.x.dtype)
    best = Pilot(steps._replace(x=none[0]), jnp.full_like(none[0], jnp.inf), start)
    tried = Levels(none, none, none)
    first = Search(zero, zero, steps, start, start, jnp.zeros_like(none[0]), best, tried, none, no, spent)
    return jax.lax.while_loop(lambda now: now.phase < END, turn, first)


def _confirmed(now: Search, end: Any, outer: Array, most: int) -> Search:
    """The best pilot went on; where f does not keep falling, all steps are halved, from the warm state on.

    There agents that come closer may raise f, whatever the steps are: a rise as long as a pilot takes is no sign.
    """
    good = _falls(outer, now.usual, jnp.where(now.number > 0, LENGTH, 0))
    now = now._replace(number=now.number + 1, good=good)
    again = now._replace(steps=jax.tree.map(lambda step: step / 2, now.steps), state=now.warm)
    return _chosen(good | (now.number >= most), now.turn_to(END, state=end), again)


def _chosen(first: Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), one, other)


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

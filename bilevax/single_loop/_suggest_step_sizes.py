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
from bilevax.sampling import fold, needed
from bilevax.single_loop._averaging import Average, average
from bilevax.single_loop._levels import Levels, PerLevel
from bilevax.single_loop._mean_curvature import Averages, Spent, mean_curvature
from bilevax.single_loop.correction import Correction, Move, tracking
from bilevax.single_loop.method import check_start, of_kind
from bilevax.typing import Array, Key, PyTree, Scalar

ROUGH, FINE = 0.1, 1e-6  # what averages of vectors and of numbers leave of the agents' differences
WARM, LENGTH, READINGS = 10.0, 5.0, 5  # ∇f of each agent before the pilots and in one of them; readings of f in it
RISES = 0.2  # of what f falls in a pilot, how much it may rise in between
LONGEST = 100.0  # iterations for each ∇f of an agent, at most
SHORTER = Levels(x=4.0, y=1.5, v=1.5)  # what the steps are divided by after a pilot that fails
POWER, SLOPE, RUN = range(3)  # what the key folds in


class StepSizesInfo(NamedTuple):
    """What `suggest_step_sizes` found, and what it spent.

    Attributes:
      curvature: L, the largest eigenvalue of ∇²_yy of the mean g; of the agents' own g_i the largest, where each has a y
        of its own.
      steps: `Levels` of the steps of each pilot [pilots]; NaN for those that were not run.
      scores: mean f at the end of each pilot [pilots]; inf where f was not finite or did not keep falling, NaN where
        none was run.
      breakdown: True where no pilot was good: the step of x is then NaN, which no method takes.
      calls: `Calls` with leaves [n], of everything: products, warm-up and pilots.
      bytes: sent by each agent [n] to all its neighbours together.
      rounds: of communication, one after the other; scalar.
      state: of the method at the end of the chosen pilot: to go on from it instead of from the start wastes nothing.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.StepSizesInfo._fields[:3]
        ('curvature', 'steps', 'scores')
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
    make: Callable[[Levels[Scalar]], Algorithm],
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
        a_y = a_v = b / 2L,       b = min over y and v of correction.largest_step(eigenvalues of W)
        a_x = mean f / (4 ‖mean d_x‖²)      after a warm-up of y and v with a_x = 0

    with W̃ as many rounds as take nine tenths of a difference away. The first pilot runs with these steps from the end of
    the warm-up. It fails if f, averaged at the agents' own y, is not finite or rises by more than a fifth of what it
    falls: then a_x is divided by 4, a_y and a_v by 1.5, and the next one runs. After a good one a_x / 4 is tried, and
    the better of both is taken. Where agents skip, a_y and a_v are multiplied by 4 / (3 + T) for T iterations between
    two refreshes.

    f should have its lower bound near 0, as cross entropies and squares do: a_x is a quarter of Polyak's step, which
    short runs, that gain from any longer step, do not exceed. What is found is good for the beginning; it knows nothing
    of a curvature that grows later. Over a directed graph or a sequence of graphs, and for a correction that does not
    say more, b = 2, as for descent, and the pilots alone tell what is stable.

    Args:
      make: `make(step_sizes) -> Algorithm`, for `Levels` of traced numbers; its state has fields x, y and v, its Info
        calls, bytes and rounds.
      problem: f_i and g_i, as in `make`.
      gossip: over which numbers and products are averaged, that of `make` or a better one; not compressed.
      x: start, leaves [n, ...].
      y: start, leaves [n, ...].
      batch: of all agents, leaves [n, ...].
      key: one random key.
      pilots: at most so many, >= 1.
      correction: of `make`, or `Levels` of them; None for `tracking()`. Where it is `local()` for y, L is that of the
        agent with the largest.

    Returns:
      `(Levels(x, y, v), StepSizesInfo)`, scalars.

    Raises:
      ValueError: if an argument is of another kind, `pilots` < 1, there is no key, gossip is compressed, or the method
        has no v.

    Cost: one ∇_y g and ten Hessian products, one evaluation of the directions and, counted in ∇f of an agent, ten for the warm-up and
    five for each pilot, of which two or three are usual: all in `info.calls` and `info.bytes`, but for six f for each
    pilot. Ten averages of y, one of x, and some of single numbers, in about 2.3 / √(2 (1 − σ)) rounds each where W is
    symmetric and fixed.

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
    key = needed(key, "the start of the power iteration")
    corrections = of_kind(
        "correction", tracking() if correction is None else correction, Correction, "Pass, say, tracking()."
    )
    averages = Averages(average(gossip, ROUGH), average(gossip, FINE))
    curvature, spent = mean_curvature(
        fold(key, POWER), problem, gossip, averages, x, y, batch, own=not _mixes(corrections.y, gossip, y)
    )
    a = _bound(gossip, corrections) / (2 * curvature)
    run = _runner(make, problem, gossip, averages.fine, fold(key, RUN), batch)
    steps = Levels(jnp.zeros_like(a), a, a)
    start = make(steps).init(x, y, batch)
    _check_state(start)
    warm, read, spent = run(steps, start, WARM, spent)
    slope, spent = _slope(fold(key, SLOPE), problem, gossip, averages, warm, batch, spent)
    steps = steps._replace(x=jnp.abs(read[-1]) / (4 * slope))
    return _search(run, warm, steps, pilots, curvature, spent)


Run = Callable[[Levels[Array], Any, Scalar, Spent], tuple[Any, Array, Spent]]


def _runner(
    make: Callable[[Levels[Scalar]], Algorithm],
    problem: BilevelProblem,
    gossip: Gossip,
    fine: Average,
    key: Key,
    batch: Batch,
) -> Run:
    """`run(steps, state, length, spent) -> (state, mean f along the run [READINGS + 1], spent)`; the same draws in each.

    Its length is told in ∇f of an agent, at most one in each iteration.
    """

    def losses(state: Any) -> Array:
        return jax.vmap(problem.outer_loss)(state.x, state.y, batch.outer)

    def run(steps: Levels[Array], state: Any, length: Scalar, spent: Spent) -> tuple[Any, Array, Spent]:
        begun = spent

        def part(carry: tuple[Any, Spent], number: Array) -> tuple[tuple[Any, Spent], Array]:
            share = length * (number + 1) / READINGS
            enough, most = begun.refreshes + share, begun.iterations + LONGEST * share

            def goes_on(carry: tuple[Any, Spent]) -> Array:
                return (carry[1].refreshes < enough) & (carry[1].iterations < most)

            def step(carry: tuple[Any, Spent]) -> tuple[Any, Spent]:
                state, spent = carry
                paced = Levels(steps.x, spent.pace() * steps.y, spent.pace() * steps.v)
                state, info = make(paced).step(key, state, batch)
                return state, spent.with_iteration(info, gossip)

            carry = jax.lax.while_loop(goes_on, step, carry)
            return carry, losses(carry[0])

        (end, spent), later = jax.lax.scan(part, (state, spent), jnp.arange(READINGS))
        read = jnp.concatenate([losses(state)[None], later])
        means, size = fine.apply(key, jnp.moveaxis(read, 0, 1))
        return end, gossip.mean(means), spent.sent(size, fine.rounds)

    return run


def _search(run: Run, warm: Any, steps: Levels[Array], pilots: int, curvature: Array, spent: Spent) -> Any:
    """Pilots, each from the warm state, until one is not better than the one before, which was good."""
    none = jnp.full(pilots, jnp.nan, steps.x.dtype)
    best = Pilot(Levels(none[0], steps.y, steps.v), jnp.full_like(none[0], jnp.inf), warm)
    first = Trials(jnp.zeros((), jnp.int32), steps, best, Levels(none, none, none), none, jnp.zeros((), bool), spent)

    def pilot(now: Trials) -> Trials:
        state, read, spent = run(now.steps, warm, LENGTH, now.spent)
        risen, fallen = jnp.maximum(jnp.diff(read), 0).sum(), read[0] - read[-1]
        good = jnp.isfinite(read).all() & (risen <= RISES * fallen)
        trial = Pilot(now.steps, jnp.where(good, read[-1], jnp.inf).astype(now.best.score.dtype), state)
        better = trial.score < now.best.score
        paced = Levels(now.steps.x, spent.pace() * now.steps.y, spent.pace() * now.steps.v)
        tried = jax.tree.map(lambda all, one: all.at[now.number].set(one), now.tried, paced)
        shorter = Levels(*(step / part for step, part in zip(now.steps, SHORTER, strict=True)))
        return Trials(
            now.number + 1,
            jax.tree.map(lambda same, less: jnp.where(good, same, less), now.steps, shorter)._replace(x=shorter.x),
            jax.tree.map(lambda new, old: jnp.where(better, new, old), trial, now.best),
            tried,
            now.scores.at[now.number].set(trial.score),
            jnp.isfinite(now.best.score) & ~better,
            spent,
        )

    end = jax.lax.while_loop(lambda now: (now.number < pilots) & ~now.done, pilot, first)
    found, spent = end.best.steps, end.spent
    steps = Levels(found.x, spent.pace() * found.y, spent.pace() * found.v)
    told = StepSizesInfo(
        *(curvature, end.tried, end.scores, ~jnp.isfinite(end.best.score)),
        *(spent.calls, spent.bytes, spent.rounds, end.best.state),
    )
    return steps, told


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
    """The least a L below which y and v are stable on this graph; that of the mean where it is not symmetric and fixed."""
    graph = gossip.topology
    known = isinstance(graph, graphs.Topology) and graphs.is_symmetric(graph)
    values = [1.0, graphs.smallest_eigenvalue(graph)] if known else [1.0]
    return jnp.minimum(*(correction.largest_step(values) for correction in corrections[1:]))


def _mixes(correction: Correction, gossip: Gossip, s: PyTree) -> bool:
    """Whether a correction mixes: of one that does not, the state of the gossip is ()."""
    marked = gossip._replace(init=lambda tree: jnp.zeros(()))
    still = Move(lambda s: (), lambda t, state, s: (t, state), linear=True)
    return bool(jax.tree.leaves(jax.eval_shape(lambda s: correction.init(marked, s, still).gossip, s)))


def _check_state(state: Any) -> None:
    fields = getattr(state, "_fields", ())
    if not {"x", "y", "v"} <= {*fields} or not jax.tree.leaves(state.v):
        raise ValueError(
            f"make must return a method whose state has x, y and v; got {type(state).__name__} without all of them. "
            f"Take a method with a level v, such as bx.decentralized.sldbo."
        )

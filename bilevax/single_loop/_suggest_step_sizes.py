"""Step sizes that agents find by themselves: the curvature of the mean g, and short pilots of the method."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import checks
from bilevax.agents import topology as graphs
from bilevax.agents._gossip import Gossip
from bilevax.printing import by_shape
from bilevax.problem import Algorithm, Batch, BilevelProblem, Calls, directions, norm
from bilevax.sampling import check_key, fold, needed
from bilevax.single_loop._averaging import average
from bilevax.single_loop._curvatures import Averages, Spent, curvatures
from bilevax.single_loop._levels import Levels, PerLevel
from bilevax.single_loop._pilots import WARM, MakeAlgorithm, paced, reader, runner, search
from bilevax.single_loop.correction import Correction, Move, tracking
from bilevax.single_loop.method import check_start, of_kind
from bilevax.typing import Array, Key, PyTree, Scalar

ROUGH, FINE = 0.1, 1e-6  # what averages of vectors and of numbers leave of the agents' differences
RANGE = 4.0  # into so many parts b / L is divided: steps near b / L do not stay stable where curvatures grow
MOST_UNLIKE = 3.0  # steps over b / L_i of an agent need not be stable, whatever the mean is
POLYAK = 4.0  # into so many parts Polyak's step is divided: short runs gain from any longer step
MARGIN = 1.5  # by so much the step of x that is returned is below what the runs bore
CURVATURE, SLOPE, RUN = range(3)  # what the key folds in


class StepSizesInfo(NamedTuple):
    """What `suggest_step_sizes` found, and what it spent; printed: pilots that ran, and means over the agents.

    Attributes:
      curvature: L, the largest eigenvalue of ∇²_yy of the mean g in size; where each agent has a y of its own, of any
        g_i. Ten power iterations stay below it, by a fifth on dense spectra of twelve: a_y leaves room for that.
      steps: `Levels` of the steps of each pilot [pilots]; NaN for those that were not run.
      warm_up: ∇f of each agent in the last warm-up; more than were asked for where y and v converge slowly.
      slopes: ‖mean d_x‖² that were evaluated, each the directions on all data, whatever the method draws; scalar.
      scores: mean f at the end of each pilot [pilots]; inf where f was not finite or higher than at the start, NaN
        where none was run.
      breakdown: True where no pilot was good, or f did not keep falling after the last of them: the step of x is then
        NaN, which no method takes. Pass more `pilots`, if steps of x became shorter to the last: each divides it by 4.
        Where all `scores` are NaN, none could begin, since f was not finite or not above `lowest`, or mean d_x was 0.
      calls: `Calls` with leaves [n], of everything, warm-ups and runs that failed too, but for what the method
        evaluates at `init`.
      bytes: sent by each agent [n] to all its neighbours together.
      rounds: of communication, one after the other; scalar.
      state: of the method at the end of the chosen run: who goes on from it, and not from the start, wastes none of it.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: 2 * (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> make, start = lambda steps: bx.decentralized.sldbo(problem, gossip, steps), jnp.zeros(4)
        >>> _, info = bx.single_loop.suggest_step_sizes(make, problem, gossip, start, start, batch, jax.random.key(0))
        >>> info.state.k == info.calls.outer_gradients[0] - 2  # but for two slopes, all of it
        Array(True, dtype=bool)
    """

    curvature: Array
    steps: Levels[Array]
    warm_up: Array
    slopes: Array
    scores: Array
    breakdown: Array
    calls: Calls
    bytes: Array
    rounds: Array
    state: Any

    def __repr__(self) -> str:
        held = all(_is_held(leaf) for leaf in jax.tree.leaves(self[:-1])) and np.ndim(self.scores) == 1
        return by_shape(self._told() if held else self)

    def _told(self) -> "StepSizesInfo":
        """With the numbers of pilots that ran, means over the agents, and the name of the state."""
        ran = ~np.isnan(np.asarray(self.scores))

        def short(number: Any) -> float:
            return float(f"{number:.4g}")

        def each(values: Array) -> Any:
            return tuple(map(short, np.asarray(values)[ran]))

        told: dict[str, Any] = {
            "steps": Levels(*map(each, self.steps)),
            "scores": each(self.scores),
            "calls": Calls(*(short(np.mean(part)) for part in self.calls)),
            "bytes": short(np.mean(self.bytes)),
            "state": type(self.state),
        }
        return self._replace(**told)


def _is_held(leaf: Any) -> bool:
    """Whether it is an array whose numbers are known here."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_fully_addressable


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
    warm_up: int = WARM,
    correction: PerLevel[Correction] | None = None,
    lowest: Scalar = 0.0,
) -> tuple[Levels[Array], StepSizesInfo]:
    """Step sizes of a method from the curvature of the mean g and short runs of the method itself; nobody sends data.

        p_i = ∇²_yy g_i u_i,      t ← W̃ (t + p − p_last),      u_i = t_i / ‖t_i‖             ten times; L = mean ‖t_i‖
        a_y = a_v = b / 4 max(L, ⅓ max L_i),      b = min over y and v of correction.largest_step(eigenvalues of W)
        a_x = a_y L (mean f − lowest) / (4 ‖mean d_x‖²)      after a warm-up of y and v with a_x = 0

    with W̃ as many rounds as take nine tenths of a difference away, and L_i of each agent alone: steps over b / max L_i
    need not be stable where agents differ, whatever L is. Where still the mean g swings at the end of the warm-up, or y
    and v move ever farther, a_y and a_v are halved and it starts anew. Where a_x is less than half of what it was
    halfway, y and v converge slowly: the warm-up is doubled, again and again, to 640 iterations at most, and then a_x
    is divided once more by what the later half of them has divided it by. Where agents skip, all steps are multiplied
    by 4 / (3 + T) for T iterations between two refreshes.

    The first pilot runs with these steps from the end of the warm-up. It fails if f, averaged at the agents' own y, is
    not finite or is, in its second half, above where it began, but for twice what it rises at the end of the warm-up.
    Then a_y and a_v are halved and all starts anew, with an a_x that is not; where later ones fail, a_x is divided by
    4. A good one goes on three times as long, or for a quarter of the warm-up, if that is longer. Where f is higher in
    the second half of that than in the first, a_y and a_v are halved and all starts anew, or, where the warm-up was
    doubled, a_x alone is divided by 4. The a_x after a start anew is that of the new warm-up, but at most the one that
    failed, and at most half of it where that was in the longer run. Two thirds of the a_x that the runs bore are
    returned.

    a_x is a part of Polyak's step, which short runs, that gain from any longer step, do not exceed. It needs the lower
    bound of f, which is near 0 for cross entropies and squares, and for others has to be said: far below f it makes
    a_x too long, above f there is no step, and `breakdown` says so, as where mean d_x is 0 at the start.

    What is found is good for the beginning: what grows slowly does not show in so few iterations, nor a curvature that
    grows later; `moves` of the method's Info tell. Noise that minibatches leave at the end does not show either. Where
    a run diverges after the search all the same, take a quarter of a_x, or pass a `warm_up` of a few times the
    condition of g. Over a directed graph or a sequence of graphs, and for a correction that does not say more, b = 2,
    as for descent, and the runs alone tell what is stable.

    Args:
      make: `make(step_sizes) -> Algorithm`, for `Levels` of traced numbers; its state has fields x, y and v, its Info
        moves, calls, bytes and rounds.
      problem: f_i and g_i, as in `make`.
      gossip: over which numbers and products are averaged, that of `make` or a better one; not compressed.
      x: start, leaves [n, ...].
      y: start, leaves [n, ...].
      batch: of all agents, leaves [n, ...].
      key: one random key.
      pilots: at most so many, >= 1, and before each as many tries of the warm-up. Each that fails divides a_x by 4, but
        for the first: with few of them the search may end before it comes to steps that are small enough.
      warm_up: at least so many ∇f of an agent in each warm-up, >= 10, the number that was tried on many tasks; rounded
        up to 10, 20, 40, 80, ... More, where d_x does not tell that y converges slowly.
      correction: of `make`, or `Levels` of them; None for `tracking()`. Where it is `local()` for y, L is that of the
        agent with the largest. `make` does not tell: left out, a_y may be too long for the agent of the largest L_i.
      lowest: the lower bound of f, or what it may come down to.

    Returns:
      `(Levels(x, y, v), StepSizesInfo)`, scalars.

    Raises:
      ValueError: if an argument is of another kind, `make` returns no `Algorithm` or takes no traced numbers,
        `pilots` < 1 or `warm_up` < 10, key is not one key, gossip is compressed, or the method has no v.

    Cost: one ∇_y g and twenty Hessian products; two evaluations of the directions for each warm-up, and one for each
    time that it is doubled; and, counted in ∇f of an agent, `warm_up` for each warm-up, up to 640 where y converges
    slowly, five for each pilot, and fifteen, or a quarter of the warm-up, for the run after a good one. One warm-up and
    one pilot are usual; each that fails, or starts anew, adds its own. All is in `info.calls` and `info.bytes`, but for
    f and g at about every one of these, and for what the method evaluates at `init`: one evaluation of the directions
    where it skips, as `s3ldbo` does, else none. `info.state` keeps the last of each kind. Ten averages of y and one of
    x for each evaluation of the directions, of about 3 / √(2 (1 − σ)) rounds each where W is symmetric and fixed, and
    some of single numbers. Compiling takes some CPU seconds, of which the method's step is a part, in every call: for
    several seeds, jit a function around it.

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
        (4.0, 0.125, False)
    """
    checks.function("make", make, "step_sizes")
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    checks.instance("gossip", gossip, Gossip, "Pass bx.gossip(bx.topology.ring(8)).")
    checks.instance("batch", batch, Batch, "Pass bx.Batch(outer=..., inner=...), leaves [n, ...].")
    pilots = checks.count("pilots", pilots, minimum=1)
    warm_up = checks.count("warm_up", warm_up, minimum=WARM)
    check_start(gossip, x, y, batch)
    checks.scalar("lowest", lowest)
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
        a = jnp.asarray(bound / (RANGE * jnp.maximum(level, found.largest / MOST_UNLIKE)), float)
        steps = Levels(jnp.zeros_like(a), a, a)
        start = make(steps).init(x, y, batch)

        def first(state: Any, a: Array, outer: Array, spent: Spent) -> tuple[Array, Spent]:
            slope, spent = _slope(fold(key, SLOPE), problem, gossip, averages, state, batch, spent)
            room = jnp.where(outer > lowest, outer - lowest, jnp.nan)  # no step where there is none
            return jnp.asarray(a * level * room / (POLYAK * slope), float), spent

        draws = fold(key, RUN)
        run, read = runner(make, problem, gossip, draws, batch), reader(gossip, averages.fine, draws)
        end = search(run, read, first, start, steps, pilots, spent, warm_up)
        steps = paced(end.steps, end.spent)
        costs = end.spent.calls, end.spent.bytes, end.spent.rounds
        info = StepSizesInfo(level, end.tried, end.warmed, end.spent.slopes, end.scores, ~end.good, *costs, end.state)
        return steps._replace(x=jnp.where(end.good, steps.x / MARGIN, jnp.nan)), info

    return find(key, x, y, batch)


def _slope(
    key: Key, problem: BilevelProblem, gossip: Gossip, averages: Averages, state: Any, batch: Batch, spent: Spent
) -> tuple[Array, Spent]:
    """‖mean d_x‖² on all data."""
    d = jax.vmap(lambda *parts: directions(problem, *parts).x)(state.x, state.y, state.v, batch)
    together, size = averages.rough.apply(key, d)
    ones = jnp.ones_like(gossip.agents())
    spent = spent.sent(size, averages.rough.rounds).with_calls(Calls(ones, ones, ones, ones))
    spent = spent._replace(slopes=spent.slopes + 1)
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

    try:
        state = jax.eval_shape(start, jnp.zeros(()))
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            "make must take step sizes that are traced numbers; it asked for the value of one. Leave out float(...) "
            "and branches on them."
        ) from error
    fields = getattr(state, "_fields", ())
    if not {"x", "y", "v"} <= {*fields} or not jax.tree.leaves(state.v):
        raise ValueError(
            f"make must return a method whose state has x, y and v; got {type(state).__name__} without all of them. "
            f"Take a method with a level v, such as bx.decentralized.sldbo."
        )

"""What every estimator keeps, whatever it remembers: what it draws, what it evaluates, and where that leads.

The directions are smooth functions of a point and means over six examples of each of four agents; a program follows the
estimator through a list of points, and notes each evaluation that really runs, branches that are skipped left out.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import checks
from bilevax.agents._gossip import gossip
from bilevax.problem import Batch
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.estimator import Estimator, Oracle
from bilevax.testing._contract import Contract, contract, hold_all, name_of
from bilevax.testing.placement import LAZY_RING, N, equal
from bilevax.testing.trees import same_form, truth
from bilevax.typing import Array, Key, PyTree

__all__ = [
    "CONTRACTS",
    "EstimatorSubject",
    "agents_draw_apart",
    "check_estimator",
    "evaluations_are_those_that_were_run",
    "first_estimate_is_unbiased",
    "one_sample_at_both_points",
    "placement_changes_nothing",
    "settles_where_the_point_settles",
    "state_keeps_its_form",
    "who_does_not_evaluate_keeps_its_estimate",
]


def __dir__() -> list[str]:
    return __all__


KEY = jax.random.key(0)
LEVELS = ("x", "y", "v")
POINTS, ROWS, KEYS = 200, 6, 2000
GOSSIP = gossip(LAZY_RING)

Note = Callable[[Array, Array], None]  # k, and a number for what each agent reads
Run = tuple[Levels[PyTree], np.ndarray, list[tuple[int, np.ndarray]]]  # estimates, evaluations, what was noted


def _directions(point: Levels[PyTree], batch: Batch) -> Levels[PyTree]:
    """Of stacked agents, leaves [m, ...]: different at every point, and means over the examples."""
    outer, inner = batch.outer.mean(1), batch.inner.mean(1)
    return Levels(
        jnp.sin(point.x) + outer * point.x,
        point.y + inner * jnp.cos(point.y),
        (2 + 0.1 * inner) * point.v - point.y,
    )


def _points() -> Levels[PyTree]:
    """Leaves [n, points, ...]: at first each another, from the second half on all the same."""
    random = np.random.default_rng(0)
    moving = np.arange(POINTS) < POINTS // 2

    def leaf(size: int) -> Array:
        path = random.normal(size=(N, POINTS, size))
        return jnp.asarray(np.where(moving[None, :, None], path, path[:, -1:]))

    return Levels(leaf(2), leaf(3), leaf(3))


def _data(alike: bool = False) -> Batch:
    """Six examples of each agent; `alike`: the same ones for all agents."""
    random = np.random.default_rng(1)
    leaves = [random.normal(size=(N, ROWS, size)) for size in (2, 3)]
    return Batch(*(jnp.asarray(np.broadcast_to(leaf[:1], leaf.shape) if alike else leaf) for leaf in leaves))


def _without_noise() -> Batch:
    """Six times the same example for each agent, another one for each."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:, :1], leaf.shape), _data())


def _oracle(
    agents: Array,
    previous: Levels[PyTree] | None = None,
    note: Callable[[Array], None] | None = None,
    group: tuple[str, ...] = LEVELS,
) -> Oracle:
    """What the estimator may ask for, for agents with these ids; `note(marks [m])` sees what is evaluated on."""

    def evaluate(point: Levels[PyTree], batch: Batch) -> Levels[PyTree]:
        if note is not None:
            note(jnp.sum(batch.outer, axis=(1, 2)) + jnp.sum(batch.inner, axis=(1, 2)))
        d = _directions(point, batch)
        return Levels(*(getattr(d, name) if name in group else None for name in LEVELS))

    return Oracle(evaluate, GOSSIP._replace(agents=lambda: agents), group, previous)


def _follow(
    estimator: Estimator, agents: Array, path: Levels[PyTree], batch: Batch, note: Note | None = None
) -> tuple[Levels[PyTree], Array]:
    """(estimates, evaluations [points, n]) along points with leaves [n, points, ...]; `note(k, marks)`."""
    path = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), path)
    first = jax.tree.map(lambda leaf: leaf[0], path)

    def one(
        carry: tuple[Levels[PyTree], Any], inputs: tuple[Array, Levels[PyTree]]
    ) -> tuple[tuple[Levels[PyTree], Any], tuple[Levels[PyTree], Array]]:
        (previous, state), (k, point) = carry, inputs
        noted = None if note is None else lambda marks: jax.debug.callback(note, k, marks)
        asked = _oracle(agents, previous if estimator.remembers else None, noted)
        u, state, evaluations = estimator.update(jax.random.fold_in(KEY, k), state, asked, point, batch, k)
        return (point, state), (u, evaluations)

    state = estimator.init(_oracle(agents), first, batch)
    return jax.lax.scan(one, (first, state), (jnp.arange(POINTS), path))[1]


@dataclasses.dataclass(frozen=True, eq=False)
class EstimatorSubject:
    """An estimator, and what its contracts read.

    Attributes:
      estimator: an `Estimator` of agents with six examples each.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> subject = testing.EstimatorSubject(bx.single_loop.estimator.full())
        >>> subject.ordinary[1].shape  # evaluations of four agents at 200 points
        (200, 4)
    """

    estimator: Estimator

    def __post_init__(self) -> None:
        """Raises ValueError unless it is an Estimator."""
        fix = "Pass the value that a constructor returns, such as bx.single_loop.estimator.full()."
        checks.instance("estimator", self.estimator, Estimator, fix)

    @functools.cached_property
    def run(self) -> Callable[[Batch], Run]:
        """`run(batch) -> (estimates, evaluations, [(k, marks), ...])` along `points()`, jitted."""
        noted: list[tuple[int, np.ndarray]] = []

        def note(k: Array, marks: Array) -> None:
            noted.append((int(k), np.asarray(marks)))

        follow_all = jax.jit(functools.partial(_follow, self.estimator, note=note))

        def run(batch: Batch) -> Run:
            noted.clear()
            u, evaluations = jax.tree.map(np.asarray, follow_all(jnp.arange(N, dtype=jnp.int32), _points(), batch))
            jax.effects_barrier()
            return u, evaluations, list(noted)

        return run

    @functools.cached_property
    def ordinary(self) -> Run:
        """A run on agents that all have other examples."""
        return self.run(_data())


@contract(
    "Return from update (u, state, evaluations): u with the dtypes of the directions and None at levels that do not "
    "move, the state in the form in which init made it, and a number of evaluations [n]."
)
def state_keeps_its_form(subject: EstimatorSubject) -> None:
    """By tracing alone, for all levels and for y alone, in half and in double precision."""
    point, batch = jax.tree.map(lambda leaf: leaf[:, 0], _points()), _data()
    point = point._replace(y=point.y.astype(jnp.bfloat16))
    batch = batch._replace(inner=batch.inner.astype(jnp.bfloat16))
    agents = jnp.arange(N, dtype=jnp.int32)
    for group in (LEVELS, ("y",)):
        asked = _oracle(agents, point if subject.estimator.remembers else None, group=group)
        state = jax.eval_shape(lambda point, asked=asked: subject.estimator.init(asked, point, batch), point)
        u, after, evaluations = jax.eval_shape(
            lambda state, point, asked=asked: subject.estimator.update(KEY, state, asked, point, batch, jnp.asarray(1)),
            state,
            point,
        )
        same_form("the state after an update", after, "the state of init", state, weak=True)
        expected = jax.eval_shape(lambda point, asked=asked: asked.evaluate(point, batch), point)
        same_form("u", u, "the direction", expected)
        truth(evaluations.shape == (N,), f"evaluations have shape {evaluations.shape}")


@contract(
    "At first there is nothing to remember: the mean of u_0 over samples is the direction itself. Scale samples as "
    "means, and give the memory weight 0 at k = 0, by jnp.where(k == 0, 1.0, rate)."
)
def first_estimate_is_unbiased(subject: EstimatorSubject) -> None:
    """Over two thousand keys, within five standard deviations of the mean."""
    point, batch = jax.tree.map(lambda leaf: leaf[:, 0], _points()), _data()
    asked = _oracle(jnp.arange(N, dtype=jnp.int32), point if subject.estimator.remembers else None)

    def first(key: Key) -> Levels[PyTree]:
        state = subject.estimator.init(asked, point, batch)
        return subject.estimator.update(key, state, asked, point, batch, jnp.asarray(0))[0]

    draws = jax.tree.map(np.asarray, jax.jit(jax.vmap(first))(jax.random.split(KEY, KEYS)))
    for name, u, d in zip(LEVELS, draws, _directions(point, batch), strict=True):
        error, width = np.abs(u.mean(0) - d), 5 * u.std(0) / np.sqrt(KEYS) + 1e-9
        truth((error < width).all(), f"the mean of d_{name} is up to {error.max():.3g} off the direction")


@contract(
    "An estimate must forget where it has been: look for a coin that never chooses some agent, a memory that never "
    "fades, or a sign in the recursion."
)
def settles_where_the_point_settles(subject: EstimatorSubject) -> None:
    """On equal examples, so that samples have no noise: at least to a twentieth of the way, in a hundred iterations."""
    u, _, _ = subject.run(_without_noise())
    for name, estimates, path, d in zip(LEVELS, u, _points(), _directions(_at(-1), _without_noise()), strict=True):
        scale = np.abs(np.asarray(path)).max()
        error = np.nan_to_num(np.abs(estimates[-1] - d), nan=np.inf).reshape(N, -1).max(1)
        late = np.flatnonzero(error >= 0.05 * scale)
        truth(late.size == 0, f"d_{name} of agents {late} is {error[late]} off at the end")


@contract(
    "Return for each agent how many times its directions were evaluated. Agents whose evaluation is thrown away may "
    "count none, but what is evaluated for all is then one and the same number."
)
def evaluations_are_those_that_were_run(subject: EstimatorSubject) -> None:
    """At each of two hundred points; branches that are skipped are not run."""
    _, evaluations, noted = subject.ordinary
    run = np.zeros(POINTS)
    for k, marks in noted:
        run[k] += len(marks)
    most = max(1, evaluations.max())
    thrown_away = (run == N * most) & np.isin(evaluations, (0, most)).all(1)
    wrong = (run != evaluations.sum(1)) & ~thrown_away
    k = int(np.argmax(wrong))
    truth(not wrong.any(), f"at iteration {k} the agents evaluate {run[k]:g} times, and count {evaluations[k]}")


@contract("An agent that evaluates nothing learns nothing: while its point stays, its estimate stays what it was.")
def who_does_not_evaluate_keeps_its_estimate(subject: EstimatorSubject) -> None:
    """Where the point is the last one and an agent counts no evaluation; between two points it may predict."""
    u, evaluations, _ = subject.ordinary
    stays = np.all([(np.diff(path, axis=1) == 0).all(2) for path in _points()], axis=0).T
    for name, estimates in zip(LEVELS, u, strict=True):
        changed = np.abs(np.diff(estimates, axis=0)).reshape(POINTS - 1, N, -1).max(2) > 0
        wrong = changed & stays & (evaluations[1:] == 0)
        truth(not wrong.any(), f"d_{name} changes at {int(wrong.sum())} iterations of agents that count no evaluation")


@contract(
    "A difference of two directions must be taken on one sample: draw it once, and evaluate it at both points.",
    applies=lambda subject: subject.estimator.remembers,
)
def one_sample_at_both_points(subject: EstimatorSubject) -> None:
    """In every update that evaluates more than once."""
    for k, marks in _by_iteration(subject.ordinary[2]).items():
        same = all(np.allclose(one, marks[0]) for one in marks)
        truth(same, f"at iteration {k} the {len(marks)} evaluations are on different samples")


@contract(
    "Fold the global ids, oracle.gossip.agents(), into the key of each agent: bilevax.single_loop.estimator.draw does."
)
def agents_draw_apart(subject: EstimatorSubject) -> None:
    """Agents with the same examples: where samples change from iteration to iteration, they differ between agents."""
    _, _, noted = subject.run(_data(alike=True))
    whole = [marks for _, marks in noted if len(marks) == N]
    random = len({float(np.round(marks[0], 9)) for marks in whole}) > 2
    apart = any(np.ptp(marks) > 1e-9 for marks in whole)
    truth(apart or not random, "all agents draw the same sample in every iteration")


@contract(
    "Draw for each agent with its own key, into which its global id is folded, under jax.vmap over the agents held "
    "here: not for all of them at once."
)
def placement_changes_nothing(subject: EstimatorSubject) -> None:
    """Two agents by themselves estimate what they estimate among four."""
    run = jax.jit(functools.partial(_follow, subject.estimator))
    u, evaluations, _ = subject.ordinary
    for half in (slice(0, 2), slice(2, 4)):
        path, batch = jax.tree.map(lambda leaf, half=half: leaf[half], (_points(), _data()))
        got = run(jnp.arange(N, dtype=jnp.int32)[half], path, batch)
        equal(got, jax.tree.map(lambda leaf, half=half: leaf[:, half], (u, evaluations)))


def _at(k: int) -> Levels[PyTree]:
    return jax.tree.map(lambda leaf: leaf[:, k], _points())


def _by_iteration(noted: list[tuple[int, np.ndarray]]) -> dict[int, list[np.ndarray]]:
    found: dict[int, list[np.ndarray]] = {}
    for k, marks in noted:
        found.setdefault(k, []).append(marks)
    return found


CONTRACTS: tuple[Contract, ...] = (
    state_keeps_its_form,
    evaluations_are_those_that_were_run,
    who_does_not_evaluate_keeps_its_estimate,
    one_sample_at_both_points,
    agents_draw_apart,
    placement_changes_nothing,
    first_estimate_is_unbiased,
    settles_where_the_point_settles,
)


def check_estimator(estimator: Estimator, contracts: Sequence[Contract] = CONTRACTS) -> None:
    """Checks what every estimator keeps: its form, its draws, its count of evaluations, and that it settles.

    Args:
      estimator: an `Estimator` for agents with six examples each, such as `estimator.stochastic(minibatch(2))`. One
        that works on blocks of agents gets blocks of two.
      contracts: those to be checked, of `bilevax.testing.estimator.CONTRACTS`.

    Raises:
      ContractError: naming the contract that it breaks, what was seen, and what to do.
      ValueError: if estimator is none; or contracts are none, or those of something else.

    Cost: three programs.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> testing.check_estimator(bx.single_loop.estimator.full(), contracts=[testing.estimator.state_keeps_its_form])
    """
    hold_all(contracts, name_of(estimator), EstimatorSubject(estimator))

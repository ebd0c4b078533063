"""How a method runs on a network, and what is recorded of it."""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from benchmarks.decentralized.exact import Exact
from benchmarks.decentralized.methods import Row, evaluations, shares
from benchmarks.decentralized.network import Network
from benchmarks.decentralized.placement import Placed, fetch
from benchmarks.harness import timing
from benchmarks.harness.clock import Spent, timed
from benchmarks.harness.loop import Outcome, Progress, Trace, goes_on
from benchmarks.harness.resuming import NOWHERE, Kept
from bilevax.typing import Array, Key, PyTree, Scalar

Exactly = Callable[[Any, Any], Exact]
Look = Callable[[Any, Any], dict[str, float | None]]
Evaluate = Callable[[Any], dict[str, Any]]
EXACT = ("exact_loss", "exact_gradient", "exact_residual", "exact_product_residual")
SPENT = ("derivatives", "megabytes", "rounds")


class Pick(NamedTuple):
    """What is chosen for a method: its step sizes, and settings by name; numbers that may be traced."""

    steps: bx.Levels
    settings: Mapping[str, Any]


class Carry(NamedTuple):
    """What a stretch of iterations hands to the next.

    Attributes:
      state: of the method.
      x, y: where the method is judged, `Network.point`.
      consensus: root mean square distance of the agents' x to their mean.
      spent: so far, by an agent on average.
    """

    state: Any
    x: PyTree
    y: PyTree
    consensus: Array
    spent: dict[str, Array]


class Program(NamedTuple):
    """A compiled row, for every pick.

    Attributes:
      begin: `begin(pick, x, y, batch) -> carry`.
      advance: `advance(pick, carry, key, batch, count) -> (carry, trace)`, so many iterations.
      put: `put(batch)` places it.
      compiling: what it took to trace and compile `advance`.
      temp_bytes: peak of its temporary memory, from the compiler's analysis; None where a backend offers none.
    """

    begin: Callable[[Pick, PyTree, PyTree, bx.Batch], Carry]
    advance: Callable[[Pick, Carry, Key, bx.Batch, int], tuple[Carry, Trace]]
    put: Callable[[Any], Any]
    compiling: Spent
    temp_bytes: int | None


def spending(info: Any, share: bx.problem.Calls) -> dict[str, Array]:
    """What one iteration costs an agent, on average."""
    calls = bx.problem.Calls(*map(jnp.mean, info.calls))
    return {
        "derivatives": jnp.asarray(evaluations(calls, share), float),
        "megabytes": jnp.mean(info.bytes) / 1e6,
        "rounds": jnp.mean(jnp.asarray(info.rounds, float)),
    }


def share_at(row: Row, share: bx.problem.Calls, state: Any) -> bx.problem.Calls:
    """The share of the next iteration: 1 where it is the turn of all examples."""
    if row.every is None:
        return share
    turn = jnp.ravel(state.k)[0] % row.every == 0
    return bx.problem.Calls(*(jnp.where(turn, 1.0, part) for part in share))


def compiled(row: Row, placed: Callable[[Pick], Placed], network: Network, pick: Pick, jit: bool = True) -> Program:
    """Compiles any number of iterations, and the losses at the mean iterate after them.

    Args:
      row: of the table.
      placed: builds the method; where it can be built of traced numbers, one program serves every pick.
      network: one of those whose batches have these shapes.
      pick: one of those that will be tried.
      jit: whether the start is compiled too.
    """
    share, problem = shares(row, network), network.problem

    def begin(pick: Pick, x: PyTree, y: PyTree, batch: bx.Batch) -> Carry:
        spent = {"derivatives": jnp.full((), float(row.at_start)), "megabytes": jnp.zeros(()), "rounds": jnp.zeros(())}
        method, put, _ = placed(pick)
        return Carry(method.init(put(x), put(y), put(batch)), *network.point(x, y), jnp.zeros(()), spent)

    def advance(pick: Pick, carry: Carry, key: Key, batch: bx.Batch, count: int) -> tuple[Carry, Trace]:
        method, _, join = placed(pick)

        def step(_: Scalar, both: tuple) -> tuple:
            state, *sums = both
            now = share_at(row, share, state)
            state, info = method.step(key, state, batch)
            calls = {name: jnp.asarray(jnp.mean(number), float) for name, number in info.calls._asdict().items()}
            more = spending(info, now), calls | {"breakdowns": jnp.asarray(jnp.any(info.breakdown), int)}
            return state, *jax.tree.map(operator.add, tuple(sums), more)

        none = bx.problem.Calls(*(jnp.zeros(()),) * 4)
        counts = {**none._asdict(), "breakdowns": jnp.zeros((), int)}
        state, spent, counts = jax.lax.fori_loop(0, count, step, (carry.state, carry.spent, counts))
        (every, ys), whole = join((state.x, state.y)), join(batch)
        x, y = network.point(every, ys)
        slope = jax.grad(network.loss, argnums=2)(problem.inner_loss, x, y, whole.inner)
        trace = Trace(outer_loss(network, x, y, whole), optax.tree.norm(slope), counts)
        return Carry(state, x, y, consensus(every, x), spent), trace

    begin = jax.jit(begin) if jit else begin
    put = placed(pick).put
    batch = put(network.batch)
    carry = begin(pick, *network.start, network.batch)
    made, compiling, memory = timing.compiled(advance, (pick, carry, jax.random.key(0), batch, 1))
    return Program(begin, made, put, compiling, memory)


def outer_loss(network: Network, x: PyTree, y: PyTree, batch: bx.Batch) -> Array:
    """The mean f_i at a point, whatever y is there."""
    return network.loss(network.problem.outer_loss, x, y, batch.outer)


def consensus(every: PyTree, x: PyTree) -> Array:
    """Root mean square distance of all x [n, ...] to one."""
    away = jax.tree.map(lambda leaf, one: leaf - one[None], every, x)
    return optax.tree.norm(away) / len(jax.tree.leaves(every)[0]) ** 0.5


def evaluate(network: Network, exactly: Exactly, carry: Carry) -> dict[str, float | None]:
    """F and ‖∇F‖² at the mean x, the scores of the task, and what an agent has spent."""
    x, y, distance, spent = fetch((carry.x, carry.y, carry.consensus, carry.spent))
    accurate = judged(exactly, x, y)
    spent = {name: number.item() for name, number in spent.items()}
    return {**accurate, **network.scores(x, y), "consensus": distance.item(), **spent}


def of_both(exactly: Callable[..., Exact]) -> Callable[..., dict[str, float | None]]:
    """F and ‖∇F‖² at a point."""
    return lambda x, y, batch: dict(itertools.islice(judged(functools.partial(exactly, batch=batch), x, y).items(), 2))


def of_loss(loss: Callable[..., Array]) -> Callable[..., dict[str, float | None]]:
    """F alone, which is cheaper; NaN where the point is not finite."""
    return lambda x, y, batch: {"exact_loss": float(loss(x, y, batch=batch)) if finite(x, y) else math.nan}


def glance(carry: Carry) -> dict[str, Any]:
    """What a try notes at a checkpoint, on one device: where it is judged, and what an agent has spent."""
    x, y, spent = jax.device_get((carry.x, carry.y, carry.spent))
    return {"point": (x, y), **{name: number.item() for name, number in spent.items()}}


def backward(look: Look, points: Sequence[tuple[Any, Any]], enough: float) -> dict[str, list[float | None]]:
    """Looks at checkpoints from the last to the first, two at least, until F is above a level.

    What was before changes nothing about when F came to that level or a lower one to stay to the end. It is NaN.
    """
    seen: list[dict[str, Any]] = []
    for x, y in reversed(points):
        if len(seen) > 1 and not seen[-1]["exact_loss"] <= enough:
            break
        seen.append(look(x, y))
    missing = [math.nan] * (len(points) - len(seen))
    return {name: [*missing, *(one[name] for one in reversed(seen))] for name in seen[0]}


def finite(*trees: Any) -> bool:
    """Whether all numbers are."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))


def first_point(network: Network) -> tuple[Any, Any]:
    """Where a method is judged before the first iteration."""
    return jax.device_get(network.point(*network.start))


def before(network: Network, exactly: Exactly, at_start: int) -> dict[str, float | None]:
    """The same before the first iteration, with the evaluations that `init` needs."""
    x, y = first_point(network)
    loss = outer_loss(network, x, y, network.batch).item()
    spent = {"derivatives": float(at_start), "megabytes": 0.0, "rounds": 0.0, **Spent().named()}
    first = {"outer_step": 0, "outer_loss": loss, "consensus": 0.0}
    return {**first, **judged(exactly, x, y), **network.scores(x, y), **spent}


def judged(exactly: Exactly, x: Any, y: Any) -> dict[str, float | None]:
    """F(x), ‖∇F(x)‖² and how well the inner problem was solved; all NaN where the point is not finite."""
    if not finite(x, y):
        return dict.fromkeys(EXACT, math.nan)
    at = exactly(x, y)
    numbers = (at.loss, optax.tree.norm(at.gradient) ** 2, at.residual, at.product_residual)
    return dict(zip(EXACT, map(float, numbers), strict=True))


class Followed(NamedTuple):
    """A run.

    Attributes:
      x: the last one.
      done: what was noted.
    """

    x: PyTree
    done: Progress

    @property
    def curve(self) -> dict[str, list[Any]]:
        """Lists of one length, an entry for each checkpoint that was come to."""
        return dict(self.done.curve)

    @property
    def counts(self) -> dict[str, Any]:
        """Added up over all iterations."""
        return dict(self.done.counts)

    def outcome(self, program: Program) -> Outcome:
        """For the file of the run."""
        metrics = self.done.metrics | {**program.compiling.named("compile_"), "temp_bytes": program.temp_bytes}
        return Outcome(self.x, metrics, self.curve)


def follow(
    program: Program,
    pick: Pick,
    network: Network,
    batch: bx.Batch,
    key: Key,
    stops: Iterable[int],
    evaluate: Evaluate,
    budget: float,
    states: Kept = NOWHERE,
) -> Followed:
    """Runs from checkpoint to checkpoint, until the last or the budget is spent, or the outer loss is not finite.

    Args:
      program: of the row.
      pick: step sizes and settings.
      network: for the first point.
      batch: its batch, placed.
      key: of all iterations, each of which has a number of its own.
      stops: the iterations of the checkpoints, rising.
      evaluate: numbers of each; its time does not count.
      budget: seconds.
      states: where they are kept; it goes on from the last one.
    """
    carry, done = states.restored(program.begin(pick, *network.start, network.batch), Progress(), Spent)
    keep, ends = states.keeper(), (0, *stops)
    while done.number + 1 < len(ends) and goes_on(done, budget):
        earlier, stop = ends[done.number : done.number + 2]
        (carry, trace), more = timed(functools.partial(program.advance, pick, carry, key, batch, stop - earlier))
        spent, counts = done.spent.plus(more), {name: count.item() for name, count in trace.counts.items()}
        loss, norm = trace.outer_loss.item(), trace.gradient_norm.item()
        point = {"outer_step": stop, **spent.named(), "outer_loss": loss, "gradient_norm": norm}
        done = done.plus(spent, {**point, **evaluate(carry)}, counts)
        keep(done.number, carry, done)
    return Followed(carry.x, done)


def kept(first: Mapping[str, Any], curve: Mapping[str, Sequence[Any]], stops: Sequence[int]) -> dict[str, list[Any]]:
    """The curve of a try from its start on, with NaN for the checkpoints that it did not come to, as it diverged."""
    missing = len(stops) - len(curve["outer_step"])
    diverged = not math.isfinite(curve["outer_loss"][-1])
    names = ("outer_step", *(name for name in EXACT[:2] if name in curve and name in first), *SPENT)
    return {name: [first[name], *curve[name], *[math.nan] * missing * diverged] for name in names}

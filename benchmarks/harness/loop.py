"""The outer loop of every task: compiled once for each method, driven chunk by chunk against a budget of seconds."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevax as bx
from benchmarks.harness import timing
from benchmarks.harness.clock import Spent, timed
from benchmarks.harness.resuming import NOWHERE, Kept
from bilevax.typing import Array, Key, PyTree


class Carry(NamedTuple):
    """What an outer step reads and writes: x, the state of its optimizer, and that of the hypergradient."""

    x: PyTree
    optimizer: optax.OptState
    estimator: Any


class Trace(NamedTuple):
    """What a chunk reports: the numbers of its last outer step, and counts added up over all of them."""

    outer_loss: Array
    gradient_norm: Array
    counts: dict[str, Array]


class Program(NamedTuple):
    """A compiled chunk of outer steps.

    Attributes:
      start: `start(x, y) -> carry`.
      chunk: `chunk(carry, keys, batch) -> (carry, trace)`, one outer step for each key.
      compiling: what it took to trace and compile it.
      temp_bytes: peak of its temporary memory, from the compiler's analysis; None where a backend offers none.
    """

    start: Callable[[PyTree, PyTree], Carry]
    chunk: Callable[[Carry, Key, bx.Batch], tuple[Carry, Trace]]
    compiling: Spent
    temp_bytes: int | None


class Outcome(NamedTuple):
    """Where a drive ended. A number is NaN where it diverged, and None where it has no meaning.

    Attributes:
      x: the last outer variable.
      metrics: final numbers: the end of the curve, counts added up over all steps, and costs.
      curve: lists of one length, an entry for each chunk.
    """

    x: PyTree
    metrics: dict[str, Any]
    curve: dict[str, list[Any]]


class Progress(NamedTuple):
    """What is noted of a run so far.

    Attributes:
      number: of chunks that are done.
      spent: on them, also before a run was killed and went on.
      curve: lists of one length, an entry for each chunk.
      counts: added up over all of them.
    """

    number: int = 0
    spent: Spent = Spent()
    curve: Mapping[str, list[Any]] = {}
    counts: Mapping[str, Any] = {}

    def plus(self, spent: Spent, point: Mapping[str, Any], counts: Mapping[str, Any]) -> "Progress":
        """With one more chunk, after which so much is spent."""
        curve = {name: [*self.curve.get(name, ()), value] for name, value in point.items()}
        added = {name: self.counts.get(name, 0) + count for name, count in counts.items()}
        return Progress(self.number + 1, spent, curve, added)

    @property
    def metrics(self) -> dict[str, Any]:
        """The end of the curve, and the counts."""
        metrics = {name: values[-1] for name, values in self.curve.items()} | {**self.counts}
        metrics["outer_steps"] = metrics.pop("outer_step")
        return metrics


def active(info: Any) -> Any:
    """The info of the estimator that ran: of two phases its losses, norms and counts, without the details."""
    if not isinstance(info, bx.hypergradients.TwoPhaseInfo):
        return info
    parts = map(active, (info.first, info.second))
    first, second = (part._replace(inner=part.inner._replace(detail=())) for part in parts)
    return jax.tree.map(lambda *parts: jnp.where(info.phase == 0, *parts), first, second)


def known(number: Any) -> Array:
    """A number of an info; NaN, which tables leave out, where nobody measures it."""
    return jnp.asarray(jnp.nan if number is None else number)


def outer_steps(
    hypergrad: bx.problem.Hypergradient,
    optimizer: optax.GradientTransformation,
    batch: bx.Batch,
) -> tuple[Callable[..., Carry], Callable[..., tuple[Carry, Trace]]]:
    """`start` and `chunk` of a `Program`, before it is compiled."""

    def start(x: PyTree, y: PyTree) -> Carry:
        return Carry(x, optimizer.init(x), hypergrad.init(x, y, batch))  # whose shapes alone count

    def chunk(carry: Carry, keys: Key, batch: bx.Batch) -> tuple[Carry, Trace]:
        def step(carry: Carry, key: Key) -> tuple[Carry, bx.hypergradients.HypergradientInfo]:
            grad, estimator, info = hypergrad.estimate(key, carry.estimator, carry.x, batch)
            updates, state = optimizer.update(grad, carry.optimizer, carry.x)
            return Carry(optax.apply_updates(carry.x, updates), state, estimator), active(info)

        carry, info = jax.lax.scan(step, carry, keys)
        counts = {name: jnp.sum(known(calls)) for name, calls in info.inner.calls._asdict().items()}
        counts["breakdowns"] = jnp.sum(info.inner.breakdown)
        return carry, Trace(info.outer_loss[-1], jnp.ravel(known(info.inner.gradient_norm))[-1], counts)

    return start, chunk


def compiled(
    hypergrad: bx.problem.Hypergradient,
    optimizer: optax.GradientTransformation,
    x: PyTree,
    y: PyTree,
    batch: bx.Batch,
    size: int,
) -> Program:
    """Compiles `size` outer steps for arrays shaped like these; the batch stays an argument."""
    start, chunk = outer_steps(hypergrad, optimizer, batch)
    keys = jax.random.split(jax.random.key(0), size)
    return Program(start, *timing.compiled(chunk, (start(x, y), keys, batch)))


def drive(
    program: Program,
    carry: Carry,
    keys: Key,
    batch: bx.Batch,
    evaluate: Callable[[Carry], dict[str, float | None]],
    budget: float,
    advance: Callable[[int], None],
    kept: Kept = NOWHERE,
) -> Outcome:
    """Runs chunk after chunk, until the keys or the budget are spent or the outer loss is not finite.

    Args:
      program: a compiled chunk.
      carry: from `program.start`.
      keys: [chunks, size], one for each outer step.
      batch: passed to every step.
      evaluate: more numbers for the end of each chunk; its time does not count.
      budget: seconds.
      advance: called with the number of steps just done, or done before the run was killed.
      kept: where states are; it goes on from the last one.

    Returns:
      Where it ended.
    """
    carry, done = kept.restored(carry, Progress(), Spent)
    keep = kept.keeper()
    chunks = [*keys]
    advance(done.number * keys.shape[1])
    while done.number < len(chunks) and goes_on(done, budget):
        chunk_keys = chunks[done.number]
        (carry, trace), more = timed(functools.partial(program.chunk, carry, chunk_keys, batch))
        spent, counts = done.spent.plus(more), {name: count.item() for name, count in trace.counts.items()}
        step, loss, norm = (done.number + 1) * len(chunk_keys), trace.outer_loss.item(), trace.gradient_norm.item()
        point = {"outer_step": step, **spent.named(), "outer_loss": loss, "gradient_norm": norm}
        done = done.plus(spent, {**point, **evaluate(carry)}, counts)
        keep(done.number, carry, done)
        advance(len(chunk_keys))
    metrics = done.metrics | {**program.compiling.named("compile_"), "temp_bytes": program.temp_bytes}
    return Outcome(carry.x, metrics, dict(done.curve))


def goes_on(done: Progress, budget: float, loss: str = "outer_loss") -> bool:
    """Whether there are seconds left, and the loss, of this name in the curve, is finite."""
    return not done.number or (done.spent.seconds < budget and math.isfinite(done.curve[loss][-1]))

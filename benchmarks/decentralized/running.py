"""How a method runs on a network, what is recorded, and how its step sizes are chosen."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

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
from benchmarks.harness.clock import Spent
from benchmarks.harness.grid import END, at_ends, choice
from benchmarks.harness.loop import Program, Trace
from bilevax.typing import Array, Key, PyTree, Scalar

Exactly = Callable[[Any, Any, bx.Batch], Exact]
EXACT = ("exact_loss", "exact_gradient", "exact_residual", "exact_product_residual")


class Carry(NamedTuple):
    """What a chunk hands to the next.

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


def compiled(row: Row, placed: Placed, network: Network, size: int) -> Program:
    """Compiles so many iterations, and the losses at the mean iterate after them."""
    share, problem = shares(row, network), network.problem

    def begin(x: PyTree, y: PyTree, batch: bx.Batch) -> Carry:
        spent = {"derivatives": jnp.full((), float(row.at_start)), "megabytes": jnp.zeros(()), "rounds": jnp.zeros(())}
        state = placed.method.init(placed.put(x), placed.put(y), placed.put(batch))
        return Carry(state, *network.point(x, y), jnp.zeros(()), spent)

    def chunk(carry: Carry, keys: Key, batch: bx.Batch) -> tuple[Carry, Trace]:
        def step(state: Any, key: Key) -> tuple[Any, tuple]:
            now = share_at(row, share, state)
            state, info = placed.method.step(key, state, batch)
            calls = {name: jnp.mean(number) for name, number in info.calls._asdict().items()}
            return state, (spending(info, now), calls | {"breakdowns": jnp.any(info.breakdown)})

        state, (spent, counts) = jax.lax.scan(step, carry.state, keys)
        spent = jax.tree.map(lambda before, now: before + now.sum(), carry.spent, spent)
        (every, ys), whole = placed.join((state.x, state.y)), placed.join(batch)
        x, y = network.point(every, ys)
        slope = jax.grad(network.loss, argnums=2)(problem.inner_loss, x, y, whole.inner)
        trace = Trace(outer_loss(network, x, y, whole), optax.tree.norm(slope), jax.tree.map(jnp.sum, counts))
        return Carry(state, x, y, consensus(every, x), spent), trace

    keys, batch = jax.random.split(jax.random.key(0), size), placed.put(network.batch)
    made, compiling, memory = timing.compiled(chunk, (begin(*network.start, network.batch), keys, batch))
    return Program(cast(Any, begin), made, compiling, memory)


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
    accurate = judged(exactly, x, y, network.batch)
    spent = {name: number.item() for name, number in spent.items()}
    return {**accurate, **network.scores(x, y), "consensus": distance.item(), **spent}


def before(network: Network, exactly: Exactly, at_start: int) -> dict[str, float | None]:
    """The same before the first iteration, with the evaluations that `init` needs."""
    x, y = jax.device_get(network.point(*network.start))
    loss = outer_loss(network, x, y, network.batch).item()
    spent = {"derivatives": float(at_start), "megabytes": 0.0, "rounds": 0.0, **Spent().named()}
    first = {"outer_step": 0, "outer_loss": loss, "consensus": 0.0}
    return {**first, **judged(exactly, x, y, network.batch), **network.scores(x, y), **spent}


def judged(exactly: Exactly, x: Any, y: Any, batch: bx.Batch) -> dict[str, float | None]:
    """F(x), ‖∇F(x)‖² and how well the inner problem was solved; all NaN where the point is not finite."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((x, y))):
        return dict.fromkeys(EXACT, math.nan)
    at = exactly(x, y, batch)
    numbers = (at.loss, optax.tree.norm(at.gradient) ** 2, at.residual, at.product_residual)
    return dict(zip(EXACT, map(float, numbers), strict=True))


def tuned(
    make: Callable[[bx.Levels], bx.problem.Algorithm],
    networks: Mapping[int, Network],
    exactly: Exactly,
    grid: bx.Levels,
    iterations: int,
) -> dict[str, Any]:
    """The step sizes of the grid whose `make(steps)` ends with the lowest F(x); one program runs all of them.

    Of several seeds (the keys of `networks`) the worst one counts. Steps whose own outer loss is above that of the
    start, and F there, halfway are left out, since their ends are good or bad by luck, and so are those whose agents
    end farther from their mean than that has moved.
    """
    first = next(iter(networks.values()))

    def ends(steps: bx.Levels, key: Any, x: PyTree, y: PyTree, batch: bx.Batch) -> tuple:
        method = make(steps)

        def step(_: Scalar, state: Any) -> Any:
            return method.step(key, state, batch)[0]

        halfway = jax.lax.fori_loop(0, iterations // 2, step, method.init(x, y, batch))
        state = jax.lax.fori_loop(iterations // 2, iterations, step, halfway)
        begin, middle, last = first.point(x, y), first.point(halfway.x, halfway.y), first.point(state.x, state.y)
        moved = optax.tree.norm(optax.tree.sub(last[0], begin[0]))
        return last, outer_loss(first, *middle, batch), consensus(state.x, last[0]) <= moved

    program = jax.jit(jax.vmap(ends, (0, None, None, None, None)))
    scores = []
    for seed, network in networks.items():
        points, middle, together = jax.device_get(program(grid, jax.random.key(seed), *network.start, network.batch))
        x, y = jax.device_get(network.point(*network.start))
        accurate = np.array(judged(exactly, x, y, network.batch)["exact_loss"], dtype=float)
        level = np.fmax(accurate, outer_loss(network, x, y, network.batch))
        scores.append((_losses(exactly, network, points, len(grid.x)), together & (middle <= level)))
    best = chosen(*(np.stack(parts) for parts in zip(*scores, strict=True)))
    values = {name: values.tolist() for name, values in grid._asdict().items()}
    steps = {name: each[best] for name, each in values.items()}
    return {
        **choice(values, steps),
        END: at_ends(values, {name: steps[name] for name in ("x", "y")}),  # v has the step of y
        "grid_losses": {str(seed): losses.tolist() for seed, (losses, _) in zip(networks, scores, strict=True)},
        "grid_steady": {str(seed): steady.tolist() for seed, (_, steady) in zip(networks, scores, strict=True)},
    }


def _losses(exactly: Exactly, network: Network, points: tuple[Any, Any], number: int) -> np.ndarray:
    """F at so many points, the first axis of these leaves."""
    each = [jax.tree.map(operator.itemgetter(i), points) for i in range(number)]
    return np.array([judged(exactly, x, y, network.batch)["exact_loss"] for x, y in each], dtype=float)


def chosen(losses: np.ndarray, steady: np.ndarray) -> int:
    """The lowest of the last losses [seeds, pairs], the worst seed of each, where all are steady; else of all."""
    worst = np.where(np.isfinite(losses), losses, np.inf).max(axis=0)
    kept = np.where(steady.all(axis=0), worst, np.inf)
    return int(np.argmin(kept if np.isfinite(kept).any() else worst))

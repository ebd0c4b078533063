"""The methods of decentralized hyper-cleaning, their step sizes, and how they run."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score

import bilevax as bx
from benchmarks import timing
from benchmarks.decentralized.data import Divided, by_weight, mean_loss
from benchmarks.decentralized.placement import Placed, fetch
from benchmarks.loop import Program, Trace

REFRESH = (0.5, 0.2, 0.1)
MOMENTUM = 0.4  # α of DSVRBGD, and its η: a = α η² = 0.1
RATE = 0.5
Start = tuple[chex.Array, chex.Array]


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      name: in lower case, also the name of its files.
      make: `make(problem, gossip, step_sizes) -> Algorithm`.
      graph: what it makes of the topology.
      batch_size: images that an evaluation reads of each kind; None for all.
      at_start: evaluations before the first iteration.
    """

    name: str
    make: Callable[..., bx.Algorithm]
    graph: Callable[[Any], Any] = lambda topology: topology
    batch_size: int | None = None
    at_start: int = 0


def rows(coins: Callable, batch_size: int) -> tuple[Row, ...]:
    """All methods, with these coins of S3LDBO and this minibatch of DSVRBGD."""
    methods = bx.decentralized
    dsvrbgd = functools.partial(
        methods.dsvrbgd_simultaneous, sample=by_weight(batch_size), momentum=MOMENTUM, rate=RATE
    )
    sparkle_ed = functools.partial(methods.sparkle, corrections=bx.correction.exact_diffusion())
    return (
        Row("sldbo", methods.sldbo),
        *(Row(f"s3ldbo-{p:g}", functools.partial(methods.s3ldbo, coins=coins(p)), at_start=1) for p in REFRESH),
        Row("dsvrbgd", dsvrbgd, batch_size=batch_size),
        Row("sparkle-ed", sparkle_ed, graph=bx.topology.lazy),
        Row("d-soba", methods.dsoba),
    )


def start(data: Divided) -> Start:
    """All weights are 1/2 (x = 0), and y = 0, at every agent."""
    n, pixels = len(data.batch.inner[1]), data.whole.test[0].shape[1]
    return bx.replicate((jnp.zeros(len(data.whole.truth)), jnp.zeros((pixels, 10))), n)


class Carry(NamedTuple):
    """What a chunk hands to the next.

    Attributes:
      state: of the method.
      x, y: their means over the agents.
      spent: so far, by an agent on average.
    """

    state: bx.decentralized.State
    x: chex.Array
    y: chex.Array
    spent: dict[str, chex.Array]


def shares(row: Row, data: Divided) -> bx.Calls:
    """What an evaluation reads of an agent's images, on average, for each kind of derivative; 1 is all of them."""
    if row.batch_size is None:
        return bx.Calls(1.0, 1.0, 1.0, 1.0)
    n = len(data.batch.inner[1])
    outer, inner = (row.batch_size * n / len(labels) for labels in (data.whole.batch.outer[1], data.whole.truth))
    return bx.Calls(outer_gradients=outer, inner_gradients=inner, hessian_products=inner, cross_products=inner)


def spending(info: Any, share: bx.Calls) -> dict[str, chex.Array]:
    """What one iteration costs an agent, on average."""
    units = (part * jnp.mean(calls) for part, calls in zip(share, info.calls, strict=True))
    return {
        "derivatives": sum(units, start=jnp.zeros(())) / len(share),
        "megabytes": jnp.mean(info.bytes) / 1e6,
        "rounds": jnp.mean(jnp.asarray(info.rounds, float)),
    }


def compiled(row: Row, placed: Placed, problem: bx.BilevelProblem, data: Divided, size: int) -> Program:
    """Compiles so many iterations, and the losses at the mean iterate after them."""
    share = shares(row, data)

    def begin(x: chex.Array, y: chex.Array) -> Carry:
        spent = {"derivatives": jnp.full((), float(row.at_start)), "megabytes": jnp.zeros(()), "rounds": jnp.zeros(())}
        return Carry(placed.method.init(*placed.put((x, y)), placed.put(data.batch)), x[0], y[0], spent)

    def chunk(carry: Carry, keys: chex.PRNGKey, batch: bx.Batch) -> tuple[Carry, Trace]:
        def step(state: Any, key: chex.PRNGKey) -> tuple[Any, tuple]:
            state, info = placed.method.step(key, state, batch)
            calls = {name: jnp.mean(number) for name, number in info.calls._asdict().items()}
            return state, (spending(info, share), calls | {"breakdowns": jnp.any(info.breakdown)})

        state, (spent, counts) = jax.lax.scan(step, carry.state, keys)
        x, y = (jnp.mean(placed.join(s), axis=0) for s in (state.x, state.y))
        spent = jax.tree.map(lambda before, now: before + now.sum(), carry.spent, spent)
        whole = placed.join(batch)
        gradient = jax.grad(mean_loss, argnums=2)(problem.inner_loss, x, y, whole.inner)
        loss = mean_loss(problem.outer_loss, x, y, whole.outer)
        return Carry(state, x, y, spent), Trace(loss, jnp.linalg.norm(gradient), jax.tree.map(jnp.sum, counts))

    keys, batch = jax.random.split(jax.random.key(0), size), placed.put(data.batch)
    made, seconds, memory = timing.compiled(chunk, (begin(*start(data)), keys, batch))
    return Program(cast(Any, begin), made, seconds, memory)


def evaluate(data: Divided, carry: Carry) -> dict[str, float | None]:
    """Test accuracy and AUC of the weights at the mean iterate, and what an agent has spent."""
    (x, y, spent), (images, labels) = fetch((carry.x, carry.y, carry.spent)), data.whole.test
    finite = bool(np.isfinite(x).all() and np.isfinite(y).all())
    hits = np.argmax(np.asarray(images) @ y, axis=1) == np.asarray(labels)
    scores = {
        "test_accuracy": float(hits.mean()) if finite else math.nan,
        "auc": float(roc_auc_score(data.whole.clean, x)) if finite else math.nan,
    }
    return scores | {name: number.item() for name, number in spent.items()}


def tuned(
    make: Callable[[bx.Levels], bx.Algorithm],
    problem: bx.BilevelProblem,
    data: Divided,
    grid: bx.Levels,
    iterations: int,
) -> dict[str, Any]:
    """The step sizes of the grid whose `make(steps)` ends with the lowest outer loss; one program runs all of them."""

    def loss(steps: bx.Levels, x: chex.Array, y: chex.Array, batch: bx.Batch) -> chex.Array:
        method = make(steps)

        def step(state: Any, _: None) -> tuple[Any, None]:
            return method.step(jax.random.key(data.whole.seed), state, batch)[0], None

        state, _ = jax.lax.scan(step, method.init(x, y, batch), None, iterations)
        return mean_loss(problem.outer_loss, jnp.mean(state.x, 0), jnp.mean(state.y, 0), batch.outer)

    losses = jax.jit(jax.vmap(loss, (0, None, None, None)))(grid, *start(data), data.batch)
    best = int(jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf)))
    return {
        "step_sizes": {name: float(values[best]) for name, values in grid._asdict().items()},
        "grid": {name: values.tolist() for name, values in grid._asdict().items()},
        "grid_losses": np.asarray(losses, float).tolist(),
    }

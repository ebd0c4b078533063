"""MA-DSBO: inner loops for y and for the inverse-Hessian-vector product, then one averaged step of x."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.printing import as_called, by_shape
from bilevax.problem import Algorithm, Batch, BilevelProblem, Calls, arrays, owned
from bilevax.sampling import Sample, fold, full
from bilevax.single_loop._levels import Levels, PerLevel, Rate
from bilevax.single_loop._preconditioned import Place
from bilevax.single_loop.correction._none import none
from bilevax.single_loop.correction._tracking import tracking_non_atc
from bilevax.single_loop.engine import Level
from bilevax.single_loop.estimator.estimator_type import draw, from_one, rates_of
from bilevax.single_loop.method import Info, check_start, check_step, moved, read_gossips
from bilevax.single_loop.step_sizes import StepSizes, read_steps
from bilevax.typing import Array, Key, PyTree


class Keys(NamedTuple):
    """What the key of an iteration folds in for the loop of one level."""

    loop: int
    precondition: int


DRAW, KEYS = 0, Levels(x=Keys(1, 4), y=Keys(2, 5), v=Keys(3, 6))
STEP_MIX, STEP_DRAW = 0, 1  # what the key of a step of a loop folds in

Direction = Callable[[Any, PyTree], PyTree]


class MADSBOState(NamedTuple):
    """The state of `ma_dsbo`, leaves [n, ...].

    Attributes:
      k: iterations so far; scalar.
      x: outer variables.
      y: inner variables.
      v: inverse-Hessian-vector products.
      average: h, the moving average of the outer directions.
      corrections: `Levels` of the memories of the corrections.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip = bx.gossip(bx.topology.ring(4))
        >>> method = bx.decentralized.ma_dsbo(problem, gossip, (0.1, 0.2, 0.2), steps=2, v_steps=3)
        >>> method.init(jnp.zeros(4), jnp.zeros(4)).average.tolist()
        [0.0, 0.0, 0.0, 0.0]
    """

    k: Array
    x: PyTree
    y: PyTree
    v: PyTree
    average: PyTree
    corrections: Levels[Any]

    def __repr__(self) -> str:
        return by_shape(self)


@as_called
def ma_dsbo(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    steps: int,
    v_steps: int,
    sample: Sample = full,
    momentum: Rate = 1.0,
    track: bool = False,
    restart: bool = False,
) -> Algorithm:
    """Moving-average decentralized stochastic bilevel optimization: a double loop.

        T times:   y_i ← Σ_j w_ij (y_j − a_y ∇_y g_j(x_j, y_j))
        N times:   t_i ← Σ_j w_ij t_j + r_i(v_i) − r_i(old v_i),      v_i ← Σ_j w_ij v_j − a_v t_i
                   with r_i(v) = ∇²_yy g_i v − ∇_y f_i at (x_i, y_i)
        once:      h_i ← (1 − θ) h_i + θ (∇_x f_i − ∇²_xy g_i v_i),      x_i ← Σ_j w_ij (x_j − a_x h_j)

    The tracker t is carried from one iteration to the next, so that N need not be large. Do not use it where rounds of
    communication are dear: single-loop methods send as much in one round as this one in T + N + 1. Without `track`, x
    and y are biased by O(step) where the agents differ. v is stable up to a_v = (1 + λ_min(W))² / 2 over the largest
    curvature, 0.22 on a ring of an even number of agents: `bx.topology.lazy` for v allows more.

    Args:
      problem: f_i and g_i.
      gossip: a `Gossip`, or `Levels` of them.
      step_sizes: `Levels(x, y, v)` of numbers, schedules or optax transformations.
      steps: T >= 1.
      v_steps: N >= 1.
      sample: `sample(key, t, data) -> batch` for the data of one agent: T draws for y, one for v and x together.
      momentum: θ in (0, 1], weight of the new outer direction in its moving average: a number or a schedule.
      track: gradient tracking of x and y too (MA-DSBO-GT), which takes their bias away.
      restart: start t anew in each iteration, as published: the limit then keeps a bias that vanishes with N alone.

    Returns:
      `Algorithm(init, step)` with `MADSBOState`.

    Raises:
      ValueError: if T or N < 1, or a concrete `momentum` is not in (0, 1]; as `bx.single_loop.single_loop`.

    Cost: for each agent and iteration one ∇f, T + 1 ∇_y g, N Hessian products and one cross product;
    d_x + (T + 2 N) d_y numbers to each neighbour, 2 d_x + 2 (T + N) d_y with `track`, in T + N + 1 rounds.

    Reference: Chen, Huang, Ma and Balasubramanian, "Decentralized stochastic bilevel optimization with improved
    per-iteration complexity", arXiv 2210.12839. Reconstructed: T inner steps, N tracked steps on the quadratic and a
    moving average are as known, not verified. Deviations: carried trackers by default; one sample for the N steps; y
    and x adapt, then combine; h starts as the first direction.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> method = bx.decentralized.ma_dsbo(problem, gossip, (0.1, 0.2, 0.2), steps=2, v_steps=3)
        >>> state, info = jax.jit(method.step)(None, method.init(jnp.zeros(4), jnp.zeros(4)), batch)
        >>> float(info.bytes[0]) / state.x.dtype.itemsize, int(info.rounds)
        (18.0, 6)
    """
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    gossips, sizes = read_gossips(gossip), read_steps(step_sizes)
    counts = Levels(1, checks.count("steps", steps, 1), checks.count("v_steps", v_steps, 1))
    checks.function("sample", sample, "key", "t", "data")
    rates = rates_of("momentum", momentum)
    outer_loss = checks.scalar_loss("outer_loss", problem.outer_loss)
    inner_loss = checks.scalar_loss("inner_loss", problem.inner_loss)
    plain = tracking_non_atc() if track else none()
    corrections = plain, plain, tracking_non_atc()
    levels = Levels(*(Level(*one) for one in zip(Levels._fields, gossips, corrections, sizes, strict=True)))

    def init(x: PyTree, y: PyTree, batch: Batch | None = None) -> MADSBOState:
        check_start(gossips.x, x, y, batch)
        point = Levels(arrays(x), arrays(y), optax.tree.zeros_like(arrays(y)))
        place = Place(problem, point, batch)
        memories = Levels(*(level.init(s, place) for level, s in zip(levels, point, strict=True)))
        return owned(MADSBOState(jnp.zeros((), jnp.int32), *point, optax.tree.zeros_like(point.x), memories))

    def step(key: Key | None, state: MADSBOState, batch: Batch) -> tuple[MADSBOState, Info]:
        check_step(gossips.x, key, state, MADSBOState, batch)
        agents = gossips.x.agents()
        key, start = fold(key, state.k), Levels(state.x, state.y, state.v)

        def loop(
            level: Level, keys: Keys, number: int, point: Levels[PyTree], s: PyTree, old: Any, direction: Direction
        ) -> tuple[PyTree, Any, Array]:
            """So many moves of one level from s, each along `direction(key, s)`, and the bytes of all of them."""
            place = Place(problem, point, batch, fold(key, keys.precondition), agents)

            def once(carry: tuple[PyTree, Any], t: Array) -> tuple[tuple[PyTree, Any], Array]:
                s, old = carry
                now = fold(fold(key, keys.loop), t)
                d = direction(fold(now, STEP_DRAW), s)
                s, old, sent = level.update(fold(now, STEP_MIX), old, s, d, place, state.k)
                return (s, old), sent.bytes

            (s, old), sent = jax.lax.scan(once, (s, old), jnp.arange(number))
            return s, old, sent.sum(0)

        def inner_direction(now: Any, y: PyTree) -> PyTree:
            data = draw(now, sample, state.k, batch, agents).inner
            return jax.vmap(jax.grad(inner_loss, argnums=1))(start.x, y, data)

        y, of_y, by_y = loop(levels.y, KEYS.y, counts.y, start, start.y, state.corrections.y, inner_direction)
        point = start._replace(y=y)
        data = draw(fold(key, DRAW), sample, state.k, batch, agents)
        outer_x, outer_y = jax.vmap(jax.grad(outer_loss, argnums=(0, 1)))(start.x, y, data.outer)
        _, pull_back = jax.vjp(lambda x, y: jax.vmap(jax.grad(inner_loss, argnums=1))(x, y, data.inner), start.x, y)
        begin = state.corrections.v
        begin = begin._replace(memory=levels.v.init(start.v, Place(problem, point, batch)).memory) if restart else begin

        def product_direction(now: Any, v: PyTree) -> PyTree:
            return optax.tree.sub(pull_back(v)[1], outer_y)

        v, of_v, by_v = loop(levels.v, KEYS.v, counts.v, point, start.v, begin, product_direction)
        d = optax.tree.sub(outer_x, pull_back(v)[0])
        a = from_one(rates, state.k).x
        h = jax.tree.map(lambda h, d: (h + a * (d - h)).astype(h.dtype), state.average, d)
        x, of_x, by_x = loop(levels.x, KEYS.x, counts.x, point, start.x, state.corrections.x, lambda now, x: h)
        end = Levels(x, y, v)
        ones = jnp.ones_like(agents)
        calls = Calls(ones, (counts.y + 1) * ones, counts.v * ones, ones)
        info = Info(*moved(start, end), calls, by_x + by_y + by_v, sum(counts))
        return MADSBOState(state.k + 1, *end, h, Levels(of_x, of_y, of_v)), info

    return Algorithm(init, step)

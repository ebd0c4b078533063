"""C2DFB: first derivatives alone by a penalty, and compressed inner loops."""

from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.agents.compression import Compressor, choco
from bilevax.printing import as_called, by_shape
from bilevax.problem import Algorithm, Batch, BilevelProblem, Calls, arrays, owned
from bilevax.sampling import Sample, fold, full
from bilevax.single_loop._levels import Levels, PerLevel
from bilevax.single_loop._preconditioned import Place
from bilevax.single_loop.correction._tracking import tracking_non_atc
from bilevax.single_loop.engine import Level
from bilevax.single_loop.estimator.estimator_type import draw
from bilevax.single_loop.method import Info, check_start, check_step, moved, read_gossips
from bilevax.single_loop.step_sizes import StepSizes, read_steps
from bilevax.typing import Array, Key, PyTree, Scalar

DRAW, INNER, MIX_X, PRECONDITION = range(4)  # what the keys of an iteration fold in
Carry: TypeAlias = tuple[tuple[PyTree, Any], tuple[PyTree, Any]]  # y and y_λ with their memories
MIX_Y, MIX_PENALIZED = 1, 2  # and those of an inner step, which draws as well


class C2DFBState(NamedTuple):
    """The state of `c2dfb`, leaves [n, ...].

    Attributes:
      k: iterations so far; scalar.
      x: outer variables.
      y: minimizers of g.
      penalized: y_λ, minimizers of g + f / λ.
      corrections: `Levels` of the memories of tracking, of x, y and y_λ.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip = bx.gossip(bx.topology.ring(4))
        >>> options = {"multiplier": 10.0, "compressor": bx.agents.compression.sign(), "gossip_step": 0.4}
        >>> method = bx.decentralized.c2dfb(problem, gossip, (0.1, 0.2, 0.2), steps=3, **options)
        >>> method.init(jnp.zeros(4), jnp.ones(4)).penalized.tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    k: Array
    x: PyTree
    y: PyTree
    penalized: PyTree
    corrections: Levels[PyTree]

    def __repr__(self) -> str:
        return by_shape(self)


@as_called
def c2dfb(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    steps: int,
    multiplier: Scalar,
    compressor: Compressor,
    gossip_step: Scalar,
    sample: Sample = full,
) -> Algorithm:
    """Compressed decentralized first-order bilevel optimization.

    K times, for s = y with d = ∇_y g(x, y) and for s = y_λ with d = ∇_y g(x, y_λ) + ∇_y f(x, y_λ) / λ:

        ŝ_i ← ŝ_i + Q(s_i − ŝ_i),      t̂_i ← t̂_i + Q(t_i − t̂_i)
        s_i ← s_i + γ Σ_j w_ij (ŝ_j − ŝ_i) − a_s t_i,      t_i ← t_i + γ Σ_j w_ij (t̂_j − t̂_i) + d_i(new) − d_i(old)

    and once, uncompressed and tracked, x along

        d^x = ∇_x f(x, y_λ) + λ (∇_x g(x, y_λ) − ∇_x g(x, y))

    It converges to x_λ, which is off x* by O(1/λ). Do not use it where second-order products are affordable and K
    rounds are not: single-loop methods are exact and need one round. λ must exceed about 2 L_f / μ_g.

    Args:
      problem: f_i and g_i.
      gossip: a `Gossip`, or `Levels` of them, without compression; `v` is that of y_λ.
      step_sizes: `Levels(x, y, v)` of numbers, schedules or optax transformations; `v` is that of y_λ, whose problem is
        divided by λ, so that the step of y fits.
      steps: K >= 1.
      multiplier: λ > 0.
      compressor: Q, such as `bx.agents.compression.top_k(0.2)`.
      gossip_step: γ > 0, the smaller the stronger the compression; see `bx.agents.compression.choco`.
      sample: `sample(key, t, data) -> batch` for the data of one agent, drawn anew in each inner step.

    Returns:
      `Algorithm(init, step)` with `C2DFBState`; `info.moves.v` is that of y_λ.

    Raises:
      ValueError: if K < 1, `multiplier` or `gossip_step` is not positive; as `bx.single_loop.single_loop` and
        `bx.agents.compression.choco`.

    Cost: for each agent and iteration K + 1 ∇f and 2 K + 2 ∇g, no second derivative; 2 d_x numbers and 4 K compressed
    messages of d_y to each neighbour, in K + 1 rounds.

    Reference: Wen, Liu, Abdelmoniem, Zhou and Xu, "A communication and computation efficient fully first-order method
    for decentralized bilevel optimization", arXiv 2410.14115. Reconstructed: the penalty and the compressed residuals
    of the inner loops are the paper's; the recursion is as known, not verified. Deviation: the
    gossip of x has no step of its own.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> options = {"multiplier": 100.0, "compressor": bx.agents.compression.top_k(1.0), "gossip_step": 0.4}
        >>> method = bx.decentralized.c2dfb(problem, gossip, (0.1, 0.2, 0.2), steps=3, **options)
        >>> state, info = jax.jit(method.step)(None, method.init(jnp.zeros(4), jnp.zeros(4)), batch)
        >>> int(info.calls.inner_gradients[0]), int(info.calls.hessian_products[0]), int(info.rounds)
        (8, 0, 4)
    """
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    plain, sizes = read_gossips(gossip), read_steps(step_sizes)
    steps = checks.count("steps", steps, minimum=1)
    checks.scalar("multiplier", multiplier)
    checks.positive("multiplier", multiplier)
    checks.scalar("gossip_step", gossip_step)
    checks.positive("gossip_step", gossip_step)
    checks.function("sample", sample, "key", "t", "data")
    compressed = partial(choco, compressor=compressor, gossip_step=gossip_step)
    gossips = plain._replace(y=compressed(plain.y), v=compressed(plain.v))
    outer_loss = checks.scalar_loss("outer_loss", problem.outer_loss)
    inner_loss = checks.scalar_loss("inner_loss", problem.inner_loss)
    levels = Levels(
        *(Level(*one) for one in zip(("x", "y", "y_λ"), gossips, [tracking_non_atc()] * 3, sizes, strict=True))
    )

    def penalized_loss(x: Any, y: Any, batch: Batch) -> Array:
        return inner_loss(x, y, batch.inner) + outer_loss(x, y, batch.outer) / multiplier

    def outer_direction(x: Any, y: Any, penalized: Any, batch: Batch) -> Any:
        direct = jax.grad(outer_loss)(x, penalized, batch.outer)
        above, below = (jax.grad(inner_loss)(x, at, batch.inner) for at in (penalized, y))
        return jax.tree.map(lambda d, a, b: (d + multiplier * (a - b)).astype(d.dtype), direct, above, below)

    def init(x: PyTree, y: PyTree, batch: Batch | None = None) -> C2DFBState:
        check_start(plain.x, x, y, batch)
        point = Levels(arrays(x), arrays(y), arrays(y))
        place = Place(problem, point, batch)
        memories = Levels(*(level.init(s, place) for level, s in zip(levels, point, strict=True)))
        return owned(C2DFBState(jnp.zeros((), jnp.int32), *point, memories))

    def step(key: Key | None, state: C2DFBState, batch: Batch) -> tuple[C2DFBState, Info]:
        check_step(plain.x, key, state, C2DFBState, batch)
        agents = plain.x.agents()
        key, start = fold(key, state.k), Levels(state.x, state.y, state.penalized)
        place = Place(problem, start, batch, fold(key, PRECONDITION), agents)

        def inner(carry: Carry, t: Array) -> tuple[Carry, Array]:
            (y, of_y), (z, of_z) = carry
            now = fold(fold(key, INNER), t)
            data = draw(fold(now, DRAW), sample, state.k, batch, agents)
            d = jax.vmap(jax.grad(inner_loss, argnums=1))(start.x, y, data.inner)
            y, of_y, sent = levels.y.update(fold(now, MIX_Y), of_y, y, d, place, state.k)
            d = jax.vmap(jax.grad(penalized_loss, argnums=1))(start.x, z, data)
            z, of_z, more = levels.v.update(fold(now, MIX_PENALIZED), of_z, z, d, place, state.k)
            return ((y, of_y), (z, of_z)), sent.bytes + more.bytes

        begin = (start.y, state.corrections.y), (start.v, state.corrections.v)
        ((y, of_y), (z, of_z)), sent = jax.lax.scan(inner, begin, jnp.arange(steps))
        data = draw(fold(key, DRAW), sample, state.k, batch, agents)
        d = jax.vmap(outer_direction)(start.x, y, z, data)
        x, of_x, more = levels.x.update(fold(key, MIX_X), state.corrections.x, start.x, d, place, state.k)
        end, ones = Levels(x, y, z), jnp.ones_like(agents)
        zeros = 0 * ones
        calls = Calls((steps + 1) * ones, (2 * steps + 2) * ones, zeros, zeros)
        info = Info(*moved(start, end), calls, sent.sum(0) + more.bytes, steps + 1)
        return C2DFBState(state.k + 1, *end, Levels(of_x, of_y, of_z)), info

    return Algorithm(init, step)

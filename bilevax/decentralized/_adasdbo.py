"""AdaSDBO: step sizes from the accumulated lengths of the directions, which the agents average too."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.agents._gossip import Gossip, per_agent
from bilevax.printing import as_called, by_shape
from bilevax.problem import Algorithm, Batch, BilevelProblem, Calls, arrays, norm, owned, wide_dtype
from bilevax.sampling import Sample, fold, full
from bilevax.single_loop._levels import Levels, PerLevel, levels
from bilevax.single_loop.estimator.estimator_type import draw
from bilevax.single_loop.local_directions import second_order
from bilevax.single_loop.method import Info, check_start, check_step, moved, read_gossips
from bilevax.single_loop.step_sizes import StepSizes
from bilevax.typing import Array, Key, PyTree, Scalar

DRAW, MIX = 0, Levels(x=1, y=2, v=3)  # what the keys of an iteration fold in


class AdaSDBOState(NamedTuple):
    """The state of `adasdbo`, leaves [n, ...].

    Attributes:
      k: iterations so far; scalar.
      x: outer variables.
      y: inner variables.
      v: inverse-Hessian-vector products.
      accumulated: `Levels` of m [n], the averaged squared lengths of the directions so far.
      gossip: `Levels` of the states of the gossip, each of the message (s, m).

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip = bx.gossip(bx.topology.ring(4))
        >>> method = bx.decentralized.adasdbo(problem, gossip, 1.0, accumulated=4.0)
        >>> method.init(jnp.zeros(4), jnp.zeros(4)).accumulated.y.tolist()
        [4.0, 4.0, 4.0, 4.0]
    """

    k: Array
    x: PyTree
    y: PyTree
    v: PyTree
    accumulated: Levels[Array]
    gossip: Levels[Any]

    def __repr__(self) -> str:
        return by_shape(self)


@as_called
def adasdbo(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    sample: Sample = full,
    accumulated: Scalar = 1.0,
) -> Algorithm:
    """Adaptive single-loop decentralized bilevel optimization: steps that need no constant of the problem.

        m^s_i ← m^s_i + ‖d^s_i‖²          for s = x, y, v, from m_0
        q^y = √m^y,      q^v = √max(m^y, m^v),      q^x = √m^x · q^v
        s_i ← Σ_j w_ij (s_j − a_s d^s_j / q^s_j),      m^s_i ← Σ_j w_ij m^s_j

    m^s travels with s: it is averaged with the gossip of its own level. As long as the agents' own directions do not
    vanish their m grow, and the steps shrink as 1/√k (of x as 1/k): it approaches x* without a correction, but slowly.
    Do not use it where the agents differ much and steps can be tuned: gradient tracking converges linearly there.

    Args:
      problem: f_i and g_i.
      gossip: a `Gossip`, or `Levels` of them.
      step_sizes: `Levels(x, y, v)` of numbers >= 0.
      sample: `sample(key, t, data) -> batch` for the data of one agent; all data by default.
      accumulated: m_0 > 0.

    Returns:
      `Algorithm(init, step)` with `AdaSDBOState`.

    Raises:
      ValueError: if a step size is no number, or `accumulated` is not positive; as `bx.single_loop.single_loop`.

    Cost: for each agent and iteration one ∇f, one ∇_y g, one Hessian and one cross product; d_x + 2 d_y + 3 numbers to
    each neighbour in one round.

    Reference: Zhai, Yan and Zhang, "Problem-parameter-free decentralized bilevel optimization", arXiv 2510.24288.
    Reconstructed: that all variables move at once with hierarchical steps from accumulated norms, which are averaged,
    is the paper's; the form of q is that of tuning-free methods on one machine, not verified.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> method = bx.decentralized.adasdbo(problem, gossip, 1.0)
        >>> state, info = jax.jit(method.step)(None, method.init(jnp.zeros(4), jnp.zeros(4)), batch)
        >>> float(info.bytes[0]) / state.x.dtype.itemsize, int(info.rounds)
        (12.0, 1)
    """
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    gossips, sizes, rule = read_gossips(gossip), levels("step_sizes", step_sizes), second_order()
    for name, size in sizes._asdict().items():
        checks.scalar(f"step_sizes.{name}", size)
        checks.nonnegative(f"step_sizes.{name}", size)
    checks.function("sample", sample, "key", "t", "data")
    checks.scalar("accumulated", accumulated)
    checks.positive("accumulated", accumulated)

    def init(x: PyTree, y: PyTree, batch: Batch | None = None) -> AdaSDBOState:
        check_start(gossips.x, x, y, batch)
        point = Levels(arrays(x), arrays(y), optax.tree.zeros_like(arrays(y)))
        m = jnp.full(gossips.x.agents().shape, accumulated, wide_dtype(*jax.tree.leaves((x, y))))
        mixing = Levels(*(one.init((s, m)) for one, s in zip(gossips, point, strict=True)))
        return owned(AdaSDBOState(jnp.zeros((), jnp.int32), *point, Levels(m, m, m), mixing))

    def step(key: Key | None, state: AdaSDBOState, batch: Batch) -> tuple[AdaSDBOState, Info]:
        check_step(gossips.x, key, state, AdaSDBOState, batch)
        agents = gossips.x.agents()
        key, start = fold(key, state.k), Levels(state.x, state.y, state.v)
        data = draw(fold(key, DRAW), sample, state.k, batch, agents)
        d = jax.vmap(lambda *parts: rule.evaluate(problem, *parts))(*start, data)
        m = Levels(*(m + jax.vmap(norm)(part) ** 2 for m, part in zip(state.accumulated, d, strict=True)))
        q = Levels(jnp.sqrt(m.x * jnp.maximum(m.y, m.v)), jnp.sqrt(m.y), jnp.sqrt(jnp.maximum(m.y, m.v)))
        results, sent = [], jnp.zeros(m.x.shape)
        for number, one, size, scale, old, s, along, length in zip(
            MIX, gossips, sizes, q, state.gossip, start, d, m, strict=True
        ):
            step = per_agent(jnp.multiply, size / scale, along)
            message = optax.tree.sub(one.weigh(old, s), step), one.weigh(old, length)
            sent += jnp.asarray(one.bytes(old, message), float)
            message, old = one.mix(fold(key, number), old, message)
            results.append((*one.debias(old, message), old))
        end, mixed, mixing = (Levels(*parts) for parts in zip(*results, strict=True))
        ones = jnp.ones_like(agents)
        calls = Calls(ones, ones, ones, ones)
        return AdaSDBOState(state.k + 1, *end, mixed, mixing), Info(*moved(start, end), calls, sent, 1)

    return Algorithm(init, step)

"""S3LDBO: SLDBO whose agents skip their derivatives in most iterations."""

from bilevax.agents._gossip import Gossip
from bilevax.decentralized._sldbo import tracked
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.single_loop._levels import PerLevel
from bilevax.single_loop.coins import Coins
from bilevax.single_loop.correction.correction_type import Correction
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.estimator import lazy_snapshot
from bilevax.single_loop.prediction import Prediction
from bilevax.single_loop.step_sizes import StepSizes
from bilevax.typing import Scalar


@as_called
def s3ldbo(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    coins: Coins,
    radius: Scalar | None = None,
    correction: PerLevel[Correction] | None = None,
    predict: Prediction | None = None,
) -> Algorithm:
    """SLDBO with snapshot gradient tracking: communication in every iteration, derivatives when a coin says so.

        s_i ← Σ_j w_ij (s_j − a_s t^s_j)            v_i ← its projection on the ball of this radius
        D'_i = d_i(new point) if the coin chooses agent i, else D_i, or what `predict` makes of it at the new point
        t^s_i ← Σ_j w_ij t^s_j + D'_i − D_i,        D ← D'

    It converges to the same (x*, y*, v*) as `sldbo`, for any coins that choose every agent again and again, in about as
    many iterations; with probability p = 1 it IS `sldbo`. Always mean t = mean D. A prediction, right or wrong, leaves
    the limit where it is, since it changes nothing where an agent rests; with an exact one the path is that of `sldbo`.

    Args:
      problem: f_i and g_i.
      gossip: a `Gossip`, or `Levels` of them.
      step_sizes: `Levels(x, y, v)` of numbers, schedules or optax transformations; rare coins ask for smaller ones.
      coins: who refreshes, each agent with a probability p: `bx.coins.subset(probability)` and
        `bx.coins.cyclic(probability)` really skip on one device; `bx.coins.independent(probability)`,
        `bx.coins.common(probability)`, or a function `(key, k, gossip) -> choice`.
      radius: of the ball of v; None for no projection.
      correction: the form of gradient tracking, or `Levels` of corrections; None for the semi-ATC one,
        `bx.single_loop.correction.tracking()`. With `exact_diffusion()` an iteration sends half as much, over a fixed
        and symmetric graph: half of the bytes for the same evaluations on learnt penalties, and on hyper-cleaning where
        directions are predicted; frozen ones wanted smaller steps there. With `local()` for y and v, every agent has a
        lower level of its own.
      predict: a `Prediction` of how directions change between refreshes, see `bx.single_loop.prediction`; None for
        directions that stay as they are.

    Returns:
      `Algorithm(init, step)`; `init` needs the batch, where everybody evaluates once.

    Raises:
      ValueError: as `bx.single_loop.single_loop`; from `init` without a batch.

    Cost: for each agent and iteration p times one ∇f, one ∇_y g, one Hessian and one cross product; 2 (d_x + 2 d_y)
    numbers to each neighbour in one round. Info does not count the first evaluation of everybody, at `init`, nor what a
    prediction costs, which its own docstring says.

    Reference: Yin, Dong, Ma, Wang and Yang, arXiv 2605.31311; the tracking along snapshots follows
    Song, Shi, Pu and Yan, "Optimal gradient tracking for decentralized optimization", arXiv 2110.05282.
    Reconstructed: that agents skip gradient, Jacobian and Hessian evaluations at random, with exact local derivatives,
    is the paper's; that the moves use the snapshot directions alone is the reading taken here (`s3ldbo_unbiased` is the
    other one).

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> method = bx.decentralized.s3ldbo(problem, gossip, (0.1, 0.2, 0.2), coins=bx.coins.subset(0.25))
        >>> state = method.init(jnp.zeros(4), jnp.zeros(4), batch)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), state, batch)
        >>> int(info.calls.hessian_products.sum())
        1
    """
    corrections = tracked("correction", correction)
    return single_loop(problem, gossip, step_sizes, lazy_snapshot(coins, predict=predict), corrections, radius=radius)

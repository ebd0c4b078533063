"""The other reading of snapshot tracking: an unbiased move at each iteration."""

import jax.numpy as jnp
import optax

from bilevax.agents._gossip import Gossip, per_agent
from bilevax.printing import as_called
from bilevax.problem import Algorithm, Batch, BilevelProblem
from bilevax.single_loop._levels import Levels, PerLevel
from bilevax.single_loop.coins import independent
from bilevax.single_loop.correction._tracking import Tracker, tracking
from bilevax.single_loop.correction.correction_type import Correction, CorrectionState, Move, Sent
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.estimator import Estimator, Oracle, lazy_snapshot
from bilevax.single_loop.step_sizes import StepSizes
from bilevax.typing import Array, Key, PyTree, Scalar


@as_called
def s3ldbo_unbiased(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    probability: Scalar,
    radius: Scalar | None = None,
) -> Algorithm:
    """Snapshot tracking whose moves are unbiased over the coins c_i ~ Bernoulli(p_i).

        G_i = Σ_j w_ij t_j + (c_i / p_i) (d_i − D_i)        s_i ← Σ_j w_ij (s_j − a_s G_j),  v_i projected
        t_i ← Σ_j w_ij t_j + c_i (d_i − D_i),               D_i ← d_i where c_i = 1

    with d_i the directions at the present point; the mean of G over the coins and the agents is mean d. It converges to
    the same (x*, y*, v*) as `sldbo`, but needs smaller steps than `s3ldbo` at the same p.

    Args:
      problem: f_i and g_i.
      gossip: a `Gossip`, or `Levels` of them.
      step_sizes: `Levels(x, y, v)` of numbers, schedules or optax transformations.
      probability: p in (0, 1], that an agent refreshes, or one for each agent [n].
      radius: of the ball of v; None for no projection.

    Returns:
      `Algorithm(init, step)`; `init` needs the batch, where everybody evaluates once.

    Raises:
      ValueError: if a concrete `probability` is not in (0, 1]; as `bx.single_loop.single_loop`; from `init` without a
        batch.

    Cost: as `s3ldbo` with independent coins.

    Reference: Yin, Dong, Ma, Wang and Yang, arXiv 2605.31311, in the reading that follows Song, Shi, Pu and Yan, arXiv
    2110.05282. Reconstructed, see `s3ldbo`.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> method = bx.decentralized.s3ldbo_unbiased(problem, gossip, (0.1, 0.2, 0.2), probability=0.5)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), method.init(jnp.zeros(4), jnp.zeros(4), batch), batch)
    """
    return single_loop(problem, gossip, step_sizes, _boosted(probability), _boosted_tracking(), radius=radius)


def _boosted(p: Scalar) -> Estimator:
    """For each level the pair (D', D + (D' − D) / p): what is tracked, and what is moved along."""
    snapshot = lazy_snapshot(independent(p))

    def update(
        key: Key | None, state: Levels[PyTree], oracle: Oracle, point: Levels[PyTree], batch: Batch, k: Scalar
    ) -> tuple[Levels[PyTree], Levels[PyTree], Array]:
        new, kept, evaluations = snapshot.update(key, state, oracle, point, batch, k)
        inverse = 1 / jnp.broadcast_to(jnp.asarray(p, float), oracle.gossip.n)[oracle.gossip.agents()]
        boost = per_agent(lambda scale, change: scale * change, inverse, optax.tree.sub(new, state))
        return Levels(*zip(new, optax.tree.add(state, boost), strict=True)), kept, evaluations

    return Estimator(snapshot.init, update)


def _boosted_tracking() -> Correction:
    """Semi-ATC tracking of the first direction of a pair, which moves along the second."""

    def update(
        key: Key | None, state: CorrectionState, gossip: Gossip, s: PyTree, d: PyTree, move: Move, k: Scalar
    ) -> tuple[PyTree, CorrectionState, Sent]:
        tracked, boosted = d
        mixed, last = state.memory
        t = optax.tree.add(mixed, optax.tree.sub(tracked, last))
        along = optax.tree.add(mixed, optax.tree.sub(boosted, last))
        step, moved = move.apply(along, state.move, s)
        message = (optax.apply_updates(s, step), t)
        (new, m), mixing = gossip.mix(key, state.gossip, message)
        sent = Sent(gossip.bytes(state.gossip, message), 1)
        return new, CorrectionState(mixing, moved, Tracker(m, tracked)), sent

    return Correction(tracking().init, update)

"""The primal-dual corrections, exact diffusion and EXTRA: one vector, no bias, one fixed symmetric W."""

from typing import Any

import jax.numpy as jnp
import optax

from bilevax.agents import topology as graphs
from bilevax.agents._gossip import Gossip
from bilevax.printing import as_called
from bilevax.single_loop.correction.correction_type import Correction, CorrectionInit, CorrectionState, Move, Sent
from bilevax.typing import Key, PyTree, Scalar


@as_called
def exact_diffusion() -> Correction:
    """Exact diffusion (D²): one vector, no bias.

        r = s − a d − P,      s⁺ = r − L r,      P⁺ = P + L r            L = I − W, P = 0 at first

    which is s⁺⁺ = W (2 s⁺ − s − a (d⁺ − d)) with s_1 = W (s_0 − a d_0). L r is summed edge by edge and P keeps the mean
    0: the recursion in s itself drifts in single precision.

    It sends one vector where tracking sends two, and has the same limit: take it where one symmetric graph is fixed and
    bytes count. Tracking is for graphs that change or are directed, and for steps that are no plain numbers.

    Returns:
      `Correction` with the memory P.

    Raises:
      ValueError: from `init`, if W is not symmetric, not fixed, or λ_min(W) <= −1/3, where it is not stable: take
        `bx.topology.lazy`; or if the step size is an optax transformation or preconditioned.

    Cost: one vector in one round.

    Reference: Yuan, Ying, Zhao and Sayed, "Exact diffusion for distributed optimization and learning", arXiv
    1702.05122; Tang et al., "D²", arXiv 1803.07068.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.correction.exact_diffusion()
        exact_diffusion()
    """

    def update(
        key: Key | None, state: CorrectionState, gossip: Gossip, s: PyTree, d: PyTree, move: Move, k: Scalar
    ) -> tuple[PyTree, CorrectionState, Sent]:
        step, moved = move.apply(d, state.move, s)
        r = optax.tree.sub(optax.apply_updates(s, step), state.memory)
        slope, mixing = gossip.laplacian(key, state.gossip, r)
        memory = optax.tree.add(state.memory, slope)
        return optax.tree.sub(r, slope), CorrectionState(mixing, moved, memory), Sent(gossip.bytes(state.gossip, r), 1)

    def largest_step(eigenvalues: Any) -> Scalar:
        values = jnp.asarray(eigenvalues)
        return jnp.min(jnp.where(values > 0, 1 + 3 * values, 2 + 2 * jnp.abs(values)) / (2 * jnp.abs(values)))

    return Correction(_primal_dual("exact_diffusion"), update, largest_step=largest_step)


@as_called
def extra() -> Correction:
    """EXTRA: one vector, no bias.

        s⁺ = s − 2 L s − P − a d,      P⁺ = P + L s            L = I − W, P = 0 at first

    which is s⁺⁺ = W (2 s⁺ − s) − a (d⁺ − d) with s_1 = W s_0 − a d_0 from a common start. L s is summed edge by edge
    and P keeps the mean 0: the recursion in s itself drifts in single precision.

    Returns:
      `Correction` with the memory P.

    Raises:
      ValueError: from `init`, if W is not symmetric, not fixed, or λ_min(W) <= −1/3, where no step is stable: take
        `bx.topology.lazy`; or if the step size is an optax transformation or preconditioned.

    Cost: one vector in one round.

    Reference: Shi, Ling, Wu and Yin, "EXTRA: an exact first-order algorithm for decentralized consensus optimization",
    arXiv 1404.6264.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.correction.extra()
        extra()
    """

    def update(
        key: Key | None, state: CorrectionState, gossip: Gossip, s: PyTree, d: PyTree, move: Move, k: Scalar
    ) -> tuple[PyTree, CorrectionState, Sent]:
        step, moved = move.apply(d, state.move, s)
        slope, mixing = gossip.laplacian(key, state.gossip, s)
        dual = optax.tree.add(state.memory, slope)
        new = optax.apply_updates(optax.tree.sub(s, optax.tree.add(dual, slope)), step)
        return new, CorrectionState(mixing, moved, dual), Sent(gossip.bytes(state.gossip, s), 1)

    def largest_step(eigenvalues: Any) -> Scalar:
        return jnp.min(1 + 3 * jnp.asarray(eigenvalues)) / 2

    return Correction(_primal_dual("extra"), update, largest_step=largest_step)


def _primal_dual(name: str) -> CorrectionInit:
    def init(gossip: Gossip, s: PyTree, move: Move) -> CorrectionState:
        _check_symmetric(name, gossip)
        if not move.linear:
            raise ValueError(
                f"step_sizes of a level with {name} must be numbers or schedules; got an optax transformation or "
                f"bx.single_loop.preconditioned(...), with which its limit would be wrong. Take "
                f"bx.single_loop.correction.tracking() for that level."
            )
        return CorrectionState(gossip.init(s), move.init(s), optax.tree.zeros_like(s))

    return init


def _check_symmetric(name: str, gossip: Gossip) -> None:
    graph = gossip.topology
    if not isinstance(graph, graphs.Topology) or abs(graph.matrix - graph.matrix.T).max() > 1e-6:
        what = "one that is not symmetric" if isinstance(graph, graphs.Topology) else "a sequence of matrices"
        raise ValueError(
            f"{name} needs one fixed symmetric W; got {what}. Take bx.single_loop.correction.tracking(), which takes "
            f"any doubly stochastic matrices."
        )
    smallest = graphs.smallest_eigenvalue(graph)
    if smallest <= -1 / 3 + 1e-9:
        raise ValueError(
            f"{name} needs a W whose smallest eigenvalue is above -1/3; got {smallest:.6g}, where it diverges or does "
            f"not converge. Take bx.gossip(bx.topology.lazy(topology)), that is (I + W)/2."
        )

"""Secants: what the directions did along the last moves, they do along the next one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.printing import as_called
from bilevax.problem import Batch, BilevelProblem, norm, wide_dtype
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.prediction.prediction_type import Prediction
from bilevax.typing import Array, PyTree, Scalar


class SecantsState(NamedTuple):
    """The last pairs of one agent, newest first, zeros where there is none yet, and what solves for their shares.

    Attributes:
      steps: ΔZ, moves from refresh to refresh, leaves [m, ...] like x, y and v, each of length 1.
      changes: ΔD, what the directions changed along them, leaves [m, ...], divided by the same lengths.
      weights: M, one number for each of the three levels [3]; 0 for one that has not moved.
      inverse: (ΔZᵀ M ΔZ + λ I)⁻¹, [m, m].

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> point, change = bx.Levels(1.0, 1.0, 1.0), bx.Levels(0.0, 1.0, 2.0)
        >>> model, zeros = bx.single_loop.prediction.secants(2, damping=1e-6), bx.Levels(0.0, 0.0, 0.0)
        >>> memory = model.init(None, *jax.tree.map(jnp.asarray, (zeros, zeros)), None)
        >>> memory = model.update(memory, None, zeros, point, change, None)
        >>> [round(float(d), 3) for d in model.change(memory, None, point, bx.Levels(3.0, 3.0, 3.0), None)]
        [0.0, 2.0, 4.0]
    """

    steps: Levels[PyTree]
    changes: Levels[PyTree]
    weights: Array
    inverse: Array


@as_called
def secants(pairs: int = 4, *, damping: Scalar = 1e-2, scale: Scalar = 1.0) -> Prediction:
    """What the directions changed along an agent's last moves, they change along the next one: regularised secants.

        d̂(z) = d(z_r) + θ ΔD (ΔZᵀ M ΔZ + λ I)⁻¹ ΔZᵀ M s,      s = z − z_r

    ΔZ and ΔD are the moves between the last m + 1 refreshes of the agent and what its directions changed along them (of
    the last link of a `chain`: what of it the first leaves). M weighs the levels, so that each has as large a part in
    ΔZᵀ M ΔZ as the others, and the pairs are scaled so that its diagonal is 1: λ is relative, and a short move counts
    as much as a long one. Across the moves that it knows it predicts no change. A refresh at the point of the last one
    teaches nothing. Where agents move in many directions a few pairs can be worse than none, and make a method
    diverge: `trusted` believes them as far as they were right.

    Args:
      pairs: m >= 1.
      damping: λ > 0.
      scale: θ in (0, 1], less for less trust.

    Returns:
      `Prediction` whose memory is `SecantsState`.

    Raises:
      ValueError: if `pairs` < 1, a concrete `damping` is not positive or a concrete `scale` not in (0, 1].

    Cost: 2 m inner products and vectors of the length d_x + 2 d_y for each agent and iteration, m² for each refresh,
    and the memory of 2 m (d_x + 2 d_y) numbers for each agent. They pay where an evaluation costs more than that: where
    an agent has many rows.

    Reference: own; multisecant updates are those of Fang and Saad, "Two classes of multisecant methods for nonlinear
    acceleration", Numerical Linear Algebra with Applications 16(3), 2009, which has Broyden's and Anderson's methods as
    its ends. There they precondition the step of one machine; here they say what an agent would evaluate.

    Example:
        >>> import bilevax as bx
        >>> model = bx.single_loop.prediction.secants(6, scale=0.8)
        >>> bx.single_loop.estimator.lazy_snapshot(bx.coins.subset(0.25), predict=model).text
        'lazy_snapshot(subset(0.25), predict=secants(6, scale=0.8))'
    """
    pairs = checks.count("pairs", pairs, minimum=1)
    checks.scalar("damping", damping)
    checks.positive("damping", damping)
    checks.scalar("scale", scale)
    checks.fraction("scale", scale)

    def init(problem: BilevelProblem, point: Levels[PyTree], d: Levels[PyTree], batch: Batch) -> SecantsState:
        steps, changes = jax.tree.map(lambda leaf: jnp.zeros((pairs, *leaf.shape), leaf.dtype), (point, d))
        dtype = wide_dtype(*jax.tree.leaves(point))
        return SecantsState(steps, changes, jnp.zeros(len(point), dtype), jnp.zeros((pairs, pairs), dtype))

    def update(
        memory: SecantsState,
        problem: BilevelProblem,
        start: Levels[PyTree],
        end: Levels[PyTree],
        change: Levels[PyTree],
        batch: Batch,
    ) -> SecantsState:
        step = optax.tree.sub(end, start)
        length = norm(step)

        def pushed(old: Array, new: Array) -> Array:
            row = (new / jnp.where(length > 0, length, 1)).astype(old.dtype)
            return jnp.where(length > 0, jnp.concatenate([row[None], old[:-1]]), old)

        steps, changes = jax.tree.map(pushed, (memory.steps, memory.changes), (step, change))
        return SecantsState(steps, changes, *_solver(steps, damping))

    def predicted(
        memory: SecantsState, problem: BilevelProblem, start: Levels[PyTree], end: Levels[PyTree], batch: Batch
    ) -> Levels[PyTree]:
        along = memory.weights @ _products(memory.steps, optax.tree.sub(end, start))
        shares = scale * (memory.inverse @ along)
        return Levels(*jax.tree.map(lambda rows: jnp.tensordot(shares, rows, 1), (*memory.changes,)))

    return Prediction(init, update, predicted)


def _products(steps: Levels[PyTree], step: Levels[PyTree]) -> Array:
    """Inner products of one step with m steps, level by level, [3, m]; 0 for a level that a method does not have."""
    dtype, number = wide_dtype(*jax.tree.leaves(step)), len(jax.tree.leaves(steps)[0])

    def of_leaf(rows: Array, leaf: Array) -> Array:
        return jnp.sum((rows.astype(dtype) * jnp.asarray(leaf, dtype)[None]).reshape(number, -1), axis=1)

    return jnp.stack(
        [
            sum(map(of_leaf, jax.tree.leaves(rows), jax.tree.leaves(one)), start=jnp.zeros(number, dtype))
            for rows, one in zip(steps, step, strict=True)
        ]
    )


def _solver(steps: Levels[PyTree], damping: Scalar) -> tuple[Array, Array]:
    """(M [3], (ΔZᵀ M ΔZ + λ I)⁻¹ [m, m]), with the diagonal of ΔZᵀ M ΔZ scaled to 1; 0 for pairs that are none."""
    levels = jax.vmap(_products, in_axes=(None, 0), out_axes=2)(steps, steps)  # [3, m, m]
    sums = jnp.trace(levels, axis1=1, axis2=2)
    weights = jnp.where(sums > 0, 1 / jnp.where(sums > 0, sums, 1), 0)
    gram = jnp.tensordot(weights, levels, 1)
    lengths = jnp.sqrt(jnp.diagonal(gram))
    inverse_lengths = jnp.where(lengths > 0, 1 / jnp.where(lengths > 0, lengths, 1), 0)
    both = jnp.outer(inverse_lengths, inverse_lengths)
    values, vectors = jnp.linalg.eigh(gram * both)
    return weights, (vectors / (jnp.maximum(values, 0) + damping)[None]) @ vectors.T * both

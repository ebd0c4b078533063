"""The damped inverse of all blocks together, from their factors."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.carried import parameters
from bilevax.curvature import capture
from bilevax.curvature.bases import turned
from bilevax.curvature.capture.choices import Blocks
from bilevax.curvature.capture.view import WHOLE
from bilevax.curvature.forms import Diagonal, Factors, Kronecker, Rows, Sketch
from bilevax.curvature.inverse import Damping, Eigen, Inverse, by_shape, joint, spectral, tail
from bilevax.curvature.model_loss import held, structured
from bilevax.curvature.sharing import expand
from bilevax.curvature.traced_loss import TracedLoss, trace_loss
from bilevax.meshes import like, whole
from bilevax.problem import Loss, widen
from bilevax.typing import Array, PyTree


class Parts(NamedTuple):
    """What an inverse keeps.

    Attributes:
      blocks: name -> the decomposition of its factors, or its diagonal.
      scale: mean eigenvalue of all of them.
    """

    blocks: dict[str, Any]
    scale: Array


def weight_decay(here: TracedLoss, inner_loss: Loss, x: PyTree, y: PyTree) -> dict[str, Array]:
    """The weight decay of every block: the mean over its elements."""
    rates = jax.tree.leaves(structured(inner_loss, "Kronecker factors").penalty(x, y)[0])
    decay: dict[str, Array] = {}
    for block in here.captured.blocks:
        leaves = list(dict.fromkeys(leaf for leaf in (block.leaf, block.bias) if leaf is not None))
        if block.part != WHOLE:
            each = {k: jnp.broadcast_to(jnp.asarray(rates[k], here.q.dtype), here.leaves[k].shape) for k in leaves}
            decay[block.name] = jnp.mean(block.take(each[block.leaf]) if block.matrix is None else block.pack(each))
            continue
        sizes = [here.leaves[leaf].size for leaf in leaves]
        means = [jnp.mean(jnp.asarray(rates[k], here.q.dtype)) for k in leaves]
        total: Any = sum(mean * size for mean, size in zip(means, sizes, strict=True))
        decay[block.name] = total / sum(sizes)
    return decay


def _delta(block: capture.Block, decay: Array, damping: Damping, eigenvalues: Array | None) -> Array:
    """Adds the two, [*stack, 1, ...] where a function of the eigenvalues gives every layer its own."""
    if not callable(damping):
        return decay + jnp.asarray(damping, decay.dtype)
    if eigenvalues is None:
        return decay
    each, depth = damping, len(block.stack)
    for _ in range(depth):
        each = jax.vmap(each)
    extra = jnp.asarray(each(eigenvalues), decay.dtype)
    if extra.shape != block.stack:
        raise ValueError(
            f"damping must return one number for the eigenvalues of a layer; got shape {extra.shape[depth:]}. "
            f"Reduce them, damping=lambda eigenvalues: 0.1 * eigenvalues.mean()."
        )
    return decay + extra.reshape(extra.shape + (1,) * (eigenvalues.ndim - depth))


def _one_by_one(function: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """The function of single layers, applied to stacks of them."""
    # Several batches of matrices at once make LAPACK's calls wait for each other on the CPU of JAX 0.10, for ever
    for _ in range(depth):
        function = functools.partial(_mapped, function)
    return function


def _mapped(function: Callable[..., Any], *stacks: Any) -> Any:
    return jax.lax.map(lambda layers: function(*layers), stacks)


def _decomposed(factors: Kronecker, delta: Array, inverse: Inverse) -> Any:
    a: Any = factors.A
    b: Any = factors.B
    if all(factors.diagonals):
        return Eigen(None, None, a[..., :, None] * b[..., None, :])
    if inverse.eigenvalues is None and any(isinstance(factor, Rows | Sketch) for factor in (a, b)):
        raise ValueError(
            "inverse must know eigenvalues where blocks gives a leaf a rank; got kronecker.factored. Pass "
            "inverse=bx.curvature.kronecker.by_shape."
        )
    return inverse.decompose(a, b, delta)


def _solver(block: capture.Block, part: Any, inverse: Inverse) -> Inverse:
    diagonal = isinstance(part, Eigen) and part.qa is None and part.qb is None
    return spectral if diagonal or block.twin else inverse


def decompose(here: TracedLoss, found: Factors, decay: dict[str, Array], damping: Damping, inverse: Inverse) -> Parts:
    """Decomposes the factors of every block."""
    named = {block.name: block for block in here.captured.blocks}
    blocks: dict[str, Any] = {}
    means = []
    for name, factors in found.items():
        if isinstance(factors, Diagonal):
            diagonal = factors.diagonal
            blocks[name] = Eigen(None, None, diagonal) if named[name].diagonal else diagonal
            means.append(jnp.mean(factors.diagonal))
        else:
            block = named[name]
            if block.second:
                continue
            twin: Any = found.get(block.twin)
            delta = _delta(block, decay[name], damping, None)
            if twin is None:
                each = functools.partial(_decomposed, delta=delta, inverse=inverse)
                blocks[name] = _one_by_one(each, len(block.stack))(factors)
            else:
                blocks[name] = _one_by_one(joint, len(block.stack))(factors, twin)
            means.append(jnp.mean(factors.mean_eigenvalue + (0 if twin is None else twin.mean_eigenvalue)))
    return Parts(blocks, jnp.mean(jnp.stack(means)) if means else jnp.zeros((), here.q.dtype))


def turn(here: TracedLoss, found: Factors, parts: Parts) -> Parts:
    """The bases of every block one step of orthogonal iteration nearer to those of these factors.

    The eigenvalues are not those of the new bases: they must be measured anew.
    """

    def one(factors: Kronecker, part: Eigen) -> Eigen:
        (da, qa), (db, qb) = turned(factors.A, part.qa), turned(factors.B, part.qb)
        return part._replace(qa=qa, qb=qb, tail=tail(factors.A, factors.B, da, db))

    blocks = dict(parts.blocks)
    for block in here.captured.blocks:
        factors = found.get(block.name)
        if isinstance(factors, Kronecker) and not block.twin:  # twins have a basis for both, till they are decomposed
            blocks[block.name] = _one_by_one(one, len(block.stack))(factors, blocks[block.name])
    return parts._replace(blocks=blocks)


def solve(
    here: TracedLoss, parts: Parts, decay: dict[str, Array], damping: Damping, inverse: Inverse, b: PyTree
) -> tuple[PyTree, Array | None]:
    """The inverse applied to b, and the smallest eigenvalue that it divided by, None where it knows none."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(b)]
    if shapes != (wanted := [leaf.shape for leaf in here.leaves]):
        raise ValueError(f"b must be a pytree like y, with leaves {wanted}; got {shapes}. Pass ∇_y f at the same y.")
    wide = dict(enumerate(jax.tree.leaves(whole(widen(b)))))
    solved: dict[int, Array] = {}

    def add(found: dict[int, Array]) -> None:
        for leaf, value in found.items():  # parts of one leaf, each 0 where the others are
            solved[leaf] = solved[leaf] + value if leaf in solved else value

    smallest = []
    for block in here.captured.blocks:
        part = parts.blocks.get(block.name)
        eigenvalues = part
        if block.second:
            continue
        chosen = _solver(block, part, inverse)
        if block.matrix is not None:
            eigenvalues = None if chosen.eigenvalues is None else chosen.eigenvalues(part)
        delta = _delta(block, decay[block.name], damping, eigenvalues)
        size = math.prod(block.stack) * block.rows * block.outputs
        if isinstance(part, Eigen) and part.tail is None and part.eigenvalues.size < size:
            smallest.append(jnp.min(delta))  # that of what the eigenvectors do not span
        elif eigenvalues is not None or block.matrix is not None:
            smallest.append(jnp.min(delta if eigenvalues is None else eigenvalues + delta))
        if block.matrix is not None:
            alone = isinstance(part, Eigen) or jnp.ndim(delta) > 0  # which no loop over layers need serve
            each = _one_by_one(lambda part, v: chosen.solve(part, delta, v), 0 if alone else len(block.stack))  # noqa: B023
            add(block.unpack(each(part, block.pack(wide)), wide))
            continue
        taken = block.take(wide[block.leaf])
        if eigenvalues is not None:
            add({block.leaf: block.put(taken / (eigenvalues + delta), wide[block.leaf])})
        elif block.treatment is not None and block.treatment.solve is not None:
            add({block.leaf: block.put(block.treatment.solve(taken, delta, parts.scale), wide[block.leaf])})
    v = jax.tree.unflatten(jax.tree.structure(b), [solved[k] for k in range(len(wide))])
    return like(optax.tree.cast_like(v, b), b), jnp.min(jnp.stack(smallest)) if smallest else None


def inverted(
    found: Factors,
    inner_loss: Loss,
    x: PyTree,
    y: PyTree,
    batch: PyTree,
    *,
    damping: Damping = 1e-3,
    inverse: Inverse = by_shape,
    blocks: Blocks | None = None,
    unsupported: capture.Unsupported = capture.error,
) -> Callable[[PyTree], PyTree]:
    """Inverts factors that `kronecker.factors` measured, wherever they come from: other batches, or other agents.

        v = blockdiag(A ⊗ B + (l2 + damping) I)⁻¹ b

    Args:
      found: the factors of this model.
      inner_loss: g, a `ModelLoss`.
      x: outer variable; for the weight decay.
      y: inner variable.
      batch: what g takes as its batch; for its shapes.
      damping: a number >= 0, or a function of the eigenvalues of a layer.
      inverse: as in `ihvp.kfac`.
      blocks: as they were given to `kronecker.factors`.
      unsupported: as it was given to `kronecker.factors`.

    Returns:
      `b -> v`, pytrees like y; linear, symmetric and positive definite.

    Raises:
      TypeError: if `inner_loss` is a bare function.
      ValueError: if the factors are not those of this model.

    Cost: one decomposition of each factor, and two products of matrices for each application and layer.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> loss = bx.curvature.ModelLoss(lambda y, a: a @ y, bx.curvature.squared_error, lambda x, batch: batch)
        >>> problem = (loss, 0.0, jnp.ones((1, 1)), (jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))))
        >>> found = bx.curvature.kronecker.factors(None, *problem, fisher=bx.curvature.fisher.exact)
        >>> bx.curvature.inverted(found, *problem, damping=1.0)(jnp.array([[12.0]])).round(4).tolist()
        [[2.0]]
    """
    if not callable(damping):
        checks.nonnegative("damping", damping)
    inner_loss, y = held(inner_loss, y), parameters(y)
    here = trace_loss(inner_loss, x, y, batch, expand, None, unsupported, blocks)
    wanted = {block.name for block in here.captured.blocks if block.treatment is None or block.treatment.probes}
    if wanted != set(found):
        raise ValueError(
            f"found must hold the factors of the blocks of this model, {sorted(wanted)}; got {sorted(found)}. Pass "
            f"what kronecker.factors returned for the same model and y."
        )
    decay = weight_decay(here, inner_loss, x, y)
    parts = decompose(here, found, decay, damping, inverse)
    return lambda b: solve(here, parts, decay, damping, inverse, b)[0]

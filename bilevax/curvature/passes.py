"""Passes over a traced model that measure its blocks: their factors, and the curvature in given bases."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax

from bilevax.curvature import capture
from bilevax.curvature.capture.rows import RowReaders
from bilevax.curvature.capture.uses import Covered, Use, Visitor
from bilevax.curvature.fisher import Fisher
from bilevax.curvature.forms import Diagonal, Factor, Factors, Form, Forms, Kept, Kronecker, Rows
from bilevax.curvature.inverse import Eigen
from bilevax.curvature.sharing import Sharing
from bilevax.curvature.traced_loss import TracedLoss
from bilevax.meshes import by_compiler, like
from bilevax.problem import widen
from bilevax.sampling import split
from bilevax.typing import Array, Key, Scalar

T = TypeVar("T")
S = TypeVar("S")

# One pass: the factors leave the backward pass as cotangents of dummy inputs of the model. A layer w [6, 4] with bias
# on a [5, 3, 6] has the dummy Kronecker(a [7, 7], mass [], b [4, 4]), zeros that `_observed` takes and ignores. Its
# backward rule passes u [5, 3, 4] on as it is, and says that `statistic(residual, u)` flows to the dummy. So it is JAX
# that adds up the uses of a leaf, and stacks the iterations of a scan: for six layers the dummy is a [6, 7, 7], ...


class Residual(NamedTuple):
    """What a use keeps for its backward pass; the basis where squares are measured, () elsewhere."""

    inputs: Array
    mask: Array | None
    q: Array
    basis: Any

    def activations(self, rows: RowReaders, use: Use) -> tuple[Array, Array]:
        """Rows ā [N, T, rows] (ids [N, T] into a table), and the mask of their positions [N, T]."""
        a, dtype = rows.inputs(self.inputs), self.q.dtype
        mask = jnp.ones(a.shape[:2], dtype)
        if self.mask is not None and self.mask.shape == mask.shape:
            mask = self.mask.astype(dtype)
        if use.by_row:
            return a[..., 0], mask
        ones = [] if use.bias is None else [jnp.ones_like(a[..., :1], dtype)]
        return jnp.concatenate([a.astype(dtype), *ones], axis=-1), mask


Reported = Kronecker | Array  # what leaves a block, and its dummy


class Statistic(Protocol):
    """What one use of a block adds to it, of its rows and the cotangents u of its outputs."""

    def __call__(self, rows: RowReaders, use: Use, sharing: Sharing, residual: Residual, u: Array, /) -> Reported: ...


def _layered(
    statistic: Statistic, rows: RowReaders, use: Use, sharing: Sharing
) -> Callable[[Residual, Array], Reported]:
    """The statistic of a use, of each of its layers apart."""
    # Three experts on one a [5, 4]: rows a [5, 1, 4] for all, u [3, 5, 1, 6], a basis with leading 3
    if not use.layers:
        return functools.partial(statistic, rows, use, sharing)
    each: Any = functools.partial(statistic, RowReaders(lambda a: a, lambda u: u), use, sharing)
    axes: Any = Residual
    own = None if rows.weights is None else 0
    for same in reversed(rows.same):
        each = jax.vmap(each, (axes(None if same else 0, own, own, 0), 0))

    def layers(residual: Residual, u: Array) -> Reported:
        return each(residual._replace(inputs=rows.inputs(residual.inputs)), rows.outputs(u))

    return layers


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observed(
    statistic: Callable[[Residual, Array], Reported], outputs: Array, residual: Residual, dummy: Reported
) -> Array:
    return outputs


def _observed_forward(
    statistic: Callable[[Residual, Array], Reported], outputs: Array, residual: Residual, dummy: Reported
) -> tuple[Array, Residual]:
    return outputs, residual


def _observed_backward(
    statistic: Callable[[Residual, Array], Reported], residual: Residual, u: Array
) -> tuple[Array, None, Reported]:
    return u, None, by_compiler(statistic)(residual, u)


_observed.defvjp(_observed_forward, _observed_backward)


def _sums(
    forms: Mapping[Covered, Forms], rows: RowReaders, use: Use, sharing: Sharing, residual: Residual, u: Array
) -> Reported:
    if use.covers not in forms:
        return _squares(rows, use, sharing, residual, u)
    (a, mask), q = residual.activations(rows, use), residual.q
    u, (first, second) = rows.outputs(u).astype(q.dtype), forms[use.covers]
    if use.by_row:
        mass = q[:, None] * mask
        square = jnp.zeros(use.inputs, q.dtype).at[a.reshape(-1)].add(mass.reshape(-1))
        return Kronecker(square, jnp.sum(mass), second.sum(u.reshape(-1, u.shape[-1]), None))
    a, u = sharing.inputs(a, mask), sharing.outputs(u)
    mass = q[:, None] * mask if sharing.per_position else q[:, None]
    seen = first.sum(a.reshape(-1, a.shape[-1]), jnp.broadcast_to(mass, a.shape[:2]).reshape(-1))
    return Kronecker(seen, jnp.sum(mass), second.sum(u.reshape(-1, u.shape[-1]), None))


def _squares(rows: RowReaders, use: Use, sharing: Sharing, residual: Residual, u: Array) -> Array:
    """Σ_n (Q_Aᵀ Σ_t ā_nt u_ntᵀ Q_B)², element by element."""
    # a [5, 3, 7] Q_A [7, 7] and u [5, 3, 4] Q_B [4, 4]: for each example [7, 3] · [3, 4], squared. With one position
    # (a_i u_j)² = a_i² u_j²: one product [7, 5] · [5, 4] for all examples, and no loop
    (a, _), q, basis = residual.activations(rows, use), residual.q, residual.basis
    u = rows.outputs(u).astype(q.dtype)
    u = u if basis.qb is None else u @ basis.qb
    if use.by_row:
        return _table_squares(a, u, use.inputs)
    a = a if basis.qa is None else a @ basis.qa
    if a.shape[1] == 1:
        return jnp.einsum("ni,nj->ij", a[:, 0] ** 2, u[:, 0] ** 2)
    zero = jnp.zeros((a.shape[-1], u.shape[-1]), q.dtype)
    return jax.lax.scan(lambda total, au: (total + (au[0].T @ au[1]) ** 2, None), zero, (a, u))[0]


def _table_squares(ids: Array, u: Array, size: int) -> Array:
    """Σ_n (Σ_t e_id(n,t) u_ntᵀ)²: positions of one example with the same id add up before they are squared."""
    # An example with the ids (7, 2, 7), T = 3: `same` [T, T] is 1 on its diagonal and at (0, 2), (2, 0). Each id counts
    # at its first place, first = (1, 1, 0): sums (u_0 + u_2, u_1, 0), whose squares go to the rows 7, 2, 7 of the table
    same = (ids[:, :, None] == ids[:, None, :]).astype(u.dtype)
    first = jnp.argmax(same, axis=2) == jnp.arange(ids.shape[1])[None]
    sums = jnp.einsum("nst,ntj->nsj", same, u) * first[:, :, None].astype(u.dtype)
    return jnp.zeros((size, u.shape[-1]), u.dtype).at[ids.reshape(-1)].add(sums.reshape(-1, u.shape[-1]) ** 2)


# -> Reported of blocks by what they cover, gradients of the probed leaves
PullBack = Callable[[Array], tuple[dict[Covered, Any], dict[int, Array]]]


def _passes(
    here: TracedLoss, statistic: Statistic, bases: Mapping[Covered, Eigen], dummies: Mapping[Covered, Reported]
) -> tuple[Array, PullBack]:
    """The outputs, and the pull-back from a cotangent of them to what every block makes of it."""
    blocks = {block.covers: block for block in here.captured.blocks}

    def block_of(use: Use) -> capture.Block:  # of a leaf with one diagonal for all of it, uses of its parts count there
        ways = (use.covers, Covered(use.leaf, use.part), Covered(use.leaf))
        return next(blocks[covers] for covers in ways if covers in blocks)

    def kronecker(slot: Any, use: Use, rows: RowReaders, outputs: Array, inputs: Array) -> Array:
        if slot is None or use.explicit != (block := block_of(use)).explicit or block.matrix is None:
            return outputs
        dummy, basis = slot
        q, mask = (here.q, here.mask) if rows.weights is None else rows.weights(here.q, here.mask)
        residual = Residual(inputs, mask, q, basis)
        bias = None if block.bias is None else Covered(block.bias, block.bias_part)
        whole = use._replace(bias=bias)  # which the model adds elsewhere, where the use itself names none
        measure = _layered(statistic, rows, whole, here.sharing(block.name))
        return _observed(measure, outputs, residual, dummy)

    def elementwise(slot: Any, use: Use, leaf: Array) -> Array | None:
        if slot is None or use.explicit != (block := block_of(use)).explicit or block.matrix is not None:
            return None
        return leaf[None] + slot[0].astype(leaf.dtype)

    visitor = Visitor({}, kronecker, elementwise, lambda use: None)

    def outputs(dummies: Mapping[Covered, Reported], probed: Mapping[int, Array]) -> Array:
        slots = {covers: (dummy, bases.get(covers, ())) for covers, dummy in dummies.items()}
        leaves = [probed.get(leaf, value) for leaf, value in enumerate(here.leaves)]
        return here.captured.run(visitor._replace(slots=slots), leaves)

    tried = [block.leaf for block in blocks.values() if block.treatment and block.treatment.probes]
    probed = {leaf: here.leaves[leaf] for leaf in tried}
    return jax.vjp(outputs, dummies, probed)


def _dummies(here: TracedLoss, kronecker: Callable[[capture.Block], Any]) -> dict[Covered, Reported]:
    """Zeros for all that the blocks report: `kronecker(block)` for a matrix, a leaf for each example for a diagonal."""
    # γ [4] of five examples: [5, 4], added to it example by example; six layers of γ [6, 4] in a scan: [6, 5, 4]
    dummies: dict[Covered, Reported] = {}
    for block in here.captured.blocks:
        if block.matrix is not None:
            dummies[block.covers] = kronecker(block)
        elif block.treatment is None:
            shape = (*block.stack, here.captured.examples, *block.shape)
            dummies[block.covers] = jnp.zeros(shape, here.q.dtype)
    return dummies


def _total(columns: int, term: Callable[[Scalar], tuple[T, S]], first: tuple[T, S] | None = None) -> tuple[T, S]:
    """The first parts of `term(k)` added up over the columns, one after the other, and the second ones stacked."""
    total, kept = term(0) if first is None else first
    stack = jax.tree.map(lambda leaf: leaf[None], kept)
    if columns == 1:
        return total, stack

    def add(total: T, k: Array) -> tuple[T, S]:
        more, kept = term(k)
        return optax.tree.add(total, more), kept

    total, rest = jax.lax.scan(add, total, jnp.arange(1, columns))
    return total, jax.tree.map(lambda one, others: jnp.concatenate([one, others]), stack, rest)


def _number_of_columns(key: Key | None, here: TracedLoss, fisher: Fisher) -> int:
    """How many backward passes a Fisher estimate takes; nothing is computed."""
    found: list[int] = []

    def count(outputs: Array, targets: Any) -> tuple[()]:
        found.append(fisher(key, here.loss, outputs, targets)[0])
        return ()

    jax.eval_shape(count, here.captured.outputs, here.targets)
    return found[0]


def measure(key: Key | None, here: TracedLoss, fisher: Fisher, kept: Kept) -> tuple[Factors, int]:
    """The factors of every block by name, and the number of backward passes."""
    label_key, sign_key = split(key, 2)
    blocks = {block.covers: block for block in here.captured.blocks}
    passes = _number_of_columns(label_key, here, fisher)
    forms = {
        covers: kept.of(block, *_counts(here, block, passes)) for covers, block in blocks.items() if block.factored
    }

    def zeros(block: capture.Block) -> Reported:
        if block.diagonal:
            return jnp.zeros((*block.stack, block.rows, block.outputs), here.q.dtype)
        return _empty(here, block, forms[block.covers])

    bases = {key: Eigen(None, None, jnp.zeros(block.stack)) for key, block in blocks.items() if block.diagonal}
    outputs, pull = _passes(here, functools.partial(_sums, forms), bases, _dummies(here, zeros))
    columns, column = fisher(label_key, here.loss, outputs, here.targets)
    root = jnp.sqrt(here.scale(outputs))[..., None]

    def term(k: Scalar) -> tuple[dict[Covered, Any], tuple[Any, dict[Covered, Rows]]]:
        cotangent = like((column(k) * root).astype(outputs.dtype), outputs)
        found, _ = pull(cotangent)
        seen = {covers: _curved(blocks[covers], value) for covers, value in found.items()}
        rows = {covers: value for covers, value in seen.items() if isinstance(value, Rows)}
        sums = {covers: value for covers, value in seen.items() if covers not in rows}
        return found, ((sums, _probe(sign_key, k, blocks, pull, cotangent)), rows)

    # A and its mass do not depend on u: those of the first column are kept, and those of the others never computed
    found, first = term(0)
    (sums, probed), stacked = _total(columns, lambda k: term(k)[1], first)
    seen = sums | {covers: _merged(rows, blocks[covers]) for covers, rows in stacked.items()}
    result: Factors = {}
    for covers, block in blocks.items():
        if block.factored:
            result[block.name] = found[covers]._replace(b=seen[covers])
        elif covers in seen:
            result[block.name] = Diagonal(seen[covers])
        elif block.leaf in probed:
            result[block.name] = Diagonal(probed[block.leaf])
    probes = max((block.treatment.probes for block in blocks.values() if block.treatment), default=0)
    return result, columns * (1 + probes)


def _counts(here: TracedLoss, block: capture.Block, columns: int) -> tuple[int, int]:
    """How many rows the factors A and B of a block are made of."""
    sharing, dtype = here.sharing(block.name), here.q.dtype
    n, t = block.slots or here.captured.examples, block.positions
    if block.by_row:
        return n * t, n * t * columns
    outputs = jax.eval_shape(sharing.outputs, jax.ShapeDtypeStruct((n, t, block.outputs), dtype))
    return n * (t if sharing.per_position else 1), n * outputs.shape[1] * columns


def _empty(here: TracedLoss, block: capture.Block, forms: Forms) -> Kronecker:
    """Zeros of what one pass reports of a block."""

    def kept(form: Form, rows: int, size: int) -> Any:
        shapes = form.empty(rows, size, here.q.dtype)
        return jax.tree.map(lambda leaf: jnp.zeros((*block.stack, *leaf.shape), leaf.dtype), shapes)

    first, second = _counts(here, block, 1)
    a, b = kept(forms[0], first, block.rows), kept(forms[1], second, block.outputs)
    return Kronecker(a, jnp.zeros(block.stack, here.q.dtype), b)


def _merged(rows: Rows, block: capture.Block) -> Rows:
    """The rows [columns, *stack, R, d] of all columns together, [*stack, columns R, d]."""
    found = jnp.moveaxis(rows.rows, 0, -3)
    return Rows(found.reshape(*block.stack, -1, found.shape[-1]))


def _curved(block: capture.Block, found: Reported) -> Factor:
    """What one column adds to the curvature of a block: B, or the squares of per-example gradients."""
    if isinstance(found, Kronecker):
        return found.b
    return found if block.diagonal else jnp.sum(found**2, axis=len(block.stack))


def _probe(
    key: Key | None, k: Scalar, blocks: Mapping[Covered, capture.Block], pull: PullBack, cotangent: Array
) -> dict[int, Array]:
    """1/R Σ_r (Σ_n ±1 √(w_n/N) J_nᵀ u_n)² for the leaves that no rule covers."""
    number = max((block.treatment.probes for block in blocks.values() if block.treatment), default=0)
    if not number:
        return {}
    if key is None:
        raise ValueError(
            "key must be a jax.random.key where capture.diagonal draws signs; got None. Pass key=jax.random.key(0)."
        )

    def one(r: Scalar) -> dict[int, Array]:
        here = jax.random.fold_in(jax.random.fold_in(key, k), r)
        signs = jax.random.rademacher(here, cotangent.shape[:1], cotangent.dtype)
        _, found = pull(cotangent * signs.reshape((-1,) + (1,) * (cotangent.ndim - 1)))
        return jax.tree.map(lambda g: widen(g) ** 2 / number, found)

    return _total(number, lambda r: (one(r), ()))[0]


def curvatures(
    key: Key | None, here: TracedLoss, fisher: Fisher, bases: dict[str, Eigen]
) -> tuple[dict[str, Eigen], int]:
    """EKFAC: the diagonal of the curvature in the eigenbases of the factors, and the number of backward passes."""
    label_key, _ = split(key, 2)
    blocks = {block.covers: block for block in here.captured.blocks if block.factored}

    def basis_of(block: capture.Block) -> Eigen:
        return _turned(bases[block.twin]) if block.second else bases[block.name]

    chosen = {covers: basis_of(block) for covers, block in blocks.items()}
    dummies = {covers: jnp.zeros_like(basis.eigenvalues) for covers, basis in chosen.items()}
    outputs, pull = _passes(here, _squares, chosen, dummies)
    columns, column = fisher(label_key, here.loss, outputs, here.targets)
    root = jnp.sqrt(here.scale(outputs))[..., None]
    found, _ = _total(columns, lambda k: (pull(like((column(k) * root).astype(outputs.dtype), outputs))[0], ()))
    measured = {block.name: chosen[covers]._replace(eigenvalues=found[covers]) for covers, block in blocks.items()}
    for block in blocks.values():
        if block.second:
            straight, turned = measured[block.twin], _turned(measured.pop(block.name))
            measured[block.twin] = straight._replace(eigenvalues=straight.eigenvalues + turned.eigenvalues)
    return measured, columns


def _turned(basis: Eigen) -> Eigen:
    """The same of the transpose."""
    return Eigen(basis.qb, basis.qa, jnp.swapaxes(basis.eigenvalues, -1, -2))

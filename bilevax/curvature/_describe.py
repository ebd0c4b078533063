"""What a curvature makes of each leaf of a model, as a table."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.carried import parameters
from bilevax.curvature import capture
from bilevax.curvature.capture.blocks import named
from bilevax.curvature.capture.choices import Blocks
from bilevax.curvature.capture.view import WHOLE
from bilevax.curvature.forms import Kept
from bilevax.curvature.inverse import Inverse, by_shape
from bilevax.curvature.model_loss import held, structured
from bilevax.problem import Loss, wide_dtype
from bilevax.typing import PyTree


class ReportRow(NamedTuple):
    """One block of a report.

    Attributes:
      leaves: names of the leaves that share the block.
      rule: what kind of block.
      sizes: of the leaf, and of the factors.
      bytes: of the factors of one backward pass without averages; their eigenvectors are as large.
      what: the primitives that use it; for a leaf that no rule covers, why.
    """

    leaves: tuple[str, ...]
    rule: str
    sizes: str
    bytes: int
    what: str


class Report(NamedTuple):
    """The blocks of a model; `print` and a notebook show it as a table.

    Attributes:
      rows: one for each block, in the order of the leaves of y.
      examples: N.
      notes: what a reader should know besides.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.Report((), 0, ()).bytes
        0
    """

    rows: tuple[ReportRow, ...]
    examples: int
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all factors together."""
        return sum(row.bytes for row in self.rows)

    def __repr__(self) -> str:
        """The table: leaf, rule, sizes, bytes, primitives."""
        cells = [("leaf", "rule", "sizes", "bytes", "used by")]
        cells += [(" + ".join(r.leaves), r.rule, r.sizes, f"{r.bytes:,}", r.what) for r in self.rows]
        cells.append(("total", "", f"N = {self.examples}", f"{self.bytes:,}", ""))
        widths = [max(len(row[k]) for row in cells) for k in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join(line.rstrip() for line in [*lines, *self.notes])


def _listed(leaves: Mapping[str, str]) -> dict[str, capture.Treatment]:
    return {name: capture.Treatment("unsupported") for name in leaves}


def _row(
    block: capture.Block, names: list[str], shapes: list[tuple[int, ...]], width: int, examples: int, kept: Kept
) -> ReportRow:
    leaves: tuple[str, ...] = (block.name,)
    if block.bias is not None:
        part = block.bias_part
        leaves += (names[block.bias] + (part.text(shapes[block.bias][len(block.stack) :]) if part != WHOLE else ""),)
    shape = (*block.stack, *block.shape) if block.part != WHOLE else shapes[block.leaf]
    if block.factored:
        rows = examples * block.positions
        first, second = kept.of(block, rows, rows)
        sizes = f"{list(shape)}: A {first.shown(rows, block.rows)}, B {second.shown(rows, block.outputs)}"
        numbers = first.numbers(rows, block.rows) + second.numbers(rows, block.outputs)
        sizes += f", T = {block.positions}" if block.positions > 1 else ""
        sizes += f", {block.uses} uses" if block.uses > 1 else ""
    else:
        sizes = f"{list(shape)}"
        estimated = block.treatment is None or block.treatment.probes
        numbers = math.prod(shape) // math.prod(block.stack) if estimated else 0
        if block.diagonal:
            numbers = block.rows * block.outputs
    count = math.prod(block.stack)
    sizes = f"{count} layers of " * bool(block.stack) + sizes
    return ReportRow(leaves, block.rule, sizes, numbers * count * width, block.what)


def describe(
    inner_loss: Loss,
    x: PyTree,
    y: PyTree,
    batch: PyTree,
    *,
    inverse: Inverse = by_shape,
    largest: int = 8192,
    blocks: Blocks | None = None,
    unsupported: capture.Unsupported | None = None,
) -> Report:
    """Lists which block of curvature each leaf of y gets, without computing anything: print it.

    Args:
      inner_loss: g, a `ModelLoss`.
      x: outer variable.
      y: inner variable.
      batch: what g takes as its batch.
      inverse: as of `kfac`; says in which form factors are kept.
      largest: as of `kfac`: a factor of more rows or columns is kept as its diagonal.
      blocks: as of `kfac`.
      unsupported: what to do with leaves that no rule covers; by default they are listed as "unsupported".

    Returns:
      A `Report`, whose `str` is the table leaf, rule, sizes, bytes of the factors, primitives.

    Raises:
      TypeError: if `inner_loss` is a bare function.

    Cost: tracing the model.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> loss = bx.curvature.ModelLoss(lambda y, a: a @ y["w"], bx.curvature.squared_error, lambda x, batch: batch)
        >>> batch = (jnp.ones((5, 3)), jnp.ones((5, 2)))
        >>> report = bx.curvature.describe(loss, 0.0, {"w": jnp.ones((3, 2)), "unused": jnp.ones(1)}, batch)
        >>> [(row.leaves, row.rule, row.sizes) for row in report.rows]
        [(('unused',), 'unsupported', '[1]'), (('w',), 'dense', '[3, 2]: A [3, 3], B [2, 2]')]
    """
    loss, y = structured(held(inner_loss, y), "describe"), parameters(y)
    inputs, _ = loss.inputs_and_targets(x, batch)
    treat = _listed if unsupported is None else unsupported
    captured = capture.trace(loss.model, y, inputs, blocks=blocks, unsupported=treat, examples=loss.examples)
    names = [name for name, _ in named(y)]
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(y)]
    checks.instance("inverse", inverse, Inverse, "Pass that of kfac, or leave it out.")
    kept = Kept(inverse.form, checks.count("largest", largest, minimum=1), fresh=True)
    dtype = wide_dtype(*jax.tree.leaves(y))
    rows = tuple(_row(block, names, shapes, dtype.itemsize, captured.examples, kept) for block in captured.blocks)
    rates, _ = loss.penalty(x, y)
    by_leaf = jax.tree.leaves(rates)
    mixed = [
        " + ".join(row.leaves)
        for row, block in zip(rows, captured.blocks, strict=True)
        if len({float(rate) for k in (block.leaf, block.bias) if k is not None for rate in jnp.ravel(by_leaf[k])}) > 1
    ]
    notes = [f"l2 varies inside {', '.join(mixed)}: its mean is added to the eigenvalues."] if mixed else []
    notes += [captured.doubt] if captured.doubt else []
    return Report(rows, captured.examples, tuple(notes))

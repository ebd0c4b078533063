"""Leaves of y that the inner loss does not read."""

from typing import Any

import jax
from jax.extend import core

from bilevax.curvature.capture.batch_axis import opened
from bilevax.meshes import on_any_axes, zeros_like
from bilevax.problem import Loss
from bilevax.typing import PyTree


def on_leaves_read(b: PyTree, inner_loss: Loss, x: PyTree, y: PyTree, batch: PyTree) -> PyTree:
    """The b of H v = b, without its leaves that g does not read.

    There H is zero, and so is the cross derivative: whatever v is, it has no part in the hypergradient; but the system
    as a whole would have no solution. What g reads is told from its program, not from numbers.
    """
    evaluate = on_any_axes(inner_loss)
    program, _ = opened(jax.make_jaxpr(lambda y: evaluate(x, y, batch))(y))
    leaves, structure = jax.tree.flatten(b)
    read = _read(program, [True] * len(program.outvars))
    return jax.tree.unflatten(structure, [a if used else zeros_like(a) for a, used in zip(leaves, read, strict=True)])


def _read(program: Any, wanted: list[bool]) -> list[bool]:
    """For each argument of a program, whether one of the wanted results reads it."""
    needed = {atom for atom, want in zip(program.outvars, wanted, strict=True) if want and isinstance(atom, core.Var)}
    for equation in reversed(program.eqns):
        wanted = [result in needed for result in equation.outvars]
        if any(wanted):
            inner = equation.params.get("jaxpr") if equation.primitive.name in ("jit", "pjit") else None
            reads = [True] * len(equation.invars) if inner is None else _read(opened(inner)[0], wanted)
            atoms = (atom for atom, used in zip(equation.invars, reads, strict=True) if used)
            needed |= {atom for atom in atoms if isinstance(atom, core.Var)}
    return [argument in needed for argument in program.invars]

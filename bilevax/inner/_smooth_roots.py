"""Optimizers whose tangents stay finite where a second moment is exactly zero."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from bilevax.curvature.capture.batch_axis import opened
from bilevax.curvature.capture.uses import bind
from bilevax.inner._optimizer_steps import Optimizer
from bilevax.typing import Array, PyTree


@jax.custom_jvp
def _sqrt(x: Array) -> Array:
    return jax.lax.sqrt(x)


@_sqrt.defjvp
def _tangent(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (x_dot,) = primals, tangents
    root, still = jax.lax.sqrt(x), (x == 0) & (x_dot == 0)
    return root, jnp.where(still, 0, 0.5 * x_dot / jnp.where(still, 1, root))


def smooth_roots(optimizer: Optimizer) -> Optimizer:
    """The same optimizer, whose square roots have the tangent 0 where both the argument and its tangent are 0.

    Adam's second moment s is 0 for a parameter that had no gradient yet, and so is ds. JAX makes ds / 2√s = 0/0 of it,
    a NaN, while the update m / (√s + ε) has the derivative dm / ε whatever d√s is, since m = 0. Values do not change.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        if not callable(optimizer):
            return optimizer

        @functools.wraps(optimizer)  # so that `descent` still sees an optimizer that was not called
        def made(x: PyTree) -> optax.GradientTransformation:
            return smooth_roots(optimizer(x))

        return made
    update = optax.with_extra_args_support(optimizer).update

    def smooth_update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        arguments = updates, state, params
        program, shapes = jax.make_jaxpr(lambda *trees: update(*trees, **extra), return_shape=True)(*arguments)
        values = _evaluate(*opened(program), jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), values)

    return optax.GradientTransformationExtraArgs(optimizer.init, smooth_update)


def _evaluate(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Runs a program of JAX with `_sqrt` in the place of its square roots, also under `jit` and `cond`."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        if equation.primitive.name == "sqrt":
            results = [_sqrt(*inputs)]
        elif equation.primitive.name in ("jit", "pjit"):  # its name in older versions
            results = _evaluate(*opened(equation.params["jaxpr"]), inputs)
        elif equation.primitive.name == "cond":
            branches = [functools.partial(_branch, branch) for branch in equation.params["branches"]]
            results = jax.lax.switch(inputs[0], branches, *inputs[1:])
        else:
            results = bind(equation, inputs)
        values |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _branch(program: Any, *inputs: Any) -> list[Any]:
    return _evaluate(*opened(program), inputs)

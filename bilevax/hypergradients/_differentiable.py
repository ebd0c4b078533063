"""An inner solver as one pure function, differentiated by its own rule."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.carried import Carried, parameters
from bilevax.hypergradients._closures import Closed, close
from bilevax.inner._checked import check_solver, pulled_back, solved, started
from bilevax.inner._optimizer_steps import check_point, full_cotangent, zero_cotangent
from bilevax.problem import InnerSolver, Iterate
from bilevax.sampling import counted_from
from bilevax.typing import Key, PyTree

Call = Callable[..., Any]  # what it closed over comes first
Held = list[Any]
Rule = Callable[..., PyTree]  # (x, y0, batch, key, held) -> y_T with a derivative of its own


class DifferentiableSolve(Protocol):
    """The inner solution as a function of x and y0, differentiated by the rule of its solver."""

    def __call__(self, x: PyTree, y0: PyTree, batch: PyTree, key: Key | None = None) -> PyTree: ...


class _Solved(NamedTuple):
    """What the pull-back of a solve needs."""

    pull_start: Callable[[Iterate], tuple[PyTree, PyTree]]
    x: PyTree
    z: Iterate
    residual: Any
    state: Any


def differentiable(solver: InnerSolver) -> DifferentiableSolve:
    """The inner solver as one pure function that JAX differentiates by the solver's own rule.

        solve(x, y0, batch, key=None) -> y_T

    The derivative with respect to x is that of the solver, and that with respect to y0 too (zero for an implicit
    solver, refused for one that pushes tangents from x alone). Nothing else is differentiated: what the loss or the
    optimizer closes over must not depend on the variable of `jax.grad`; move it into x. There is no info:
    `hypergradient` of the same solver tells how far to trust it. vmap it over tasks and use it anywhere inside a loss;
    jit the whole, or it is traced at each call.

    A solver with a `tangent` (`implicit`, `fixed_point`, `root`) can be differentiated in both modes, as often as
    wanted: `jax.grad`, `jax.jvp`, `jax.hessian`, and inside the loss of another solver. Each derivative of a derivative
    is one more linear solve. It takes y_T for the solution and the IHVP for the inverse of ∇²_yy g: where either is
    rough, so are second derivatives. The other solvers are differentiated in reverse mode, by their `backward`.

    Args:
      solver: an inner solver.

    Returns:
      `solve`. v and the optimizer start afresh at each call; give data, keys and whatever else is not differentiated in
      `batch`.

    Raises:
      ValueError: if a derivative with respect to `batch`, or to something that the solver closes over, is asked (it is
        refused, not returned as zero), or with respect to y0 of a solver without one; if x or y0 is empty or not
        floating-point.
      TypeError: from JAX for forward mode (jvp) through a solver without `tangent`.

    Cost: that of the solver; without a derivative, of its forward pass. With a `tangent`: one linear solve for each
    tangent or cotangent, two for each column of a Hessian of F, and one once for its gradient.

    Reference: Blondel et al., "Efficient and modular implicit differentiation", arXiv 2105.15183, section 2.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp, optax
        >>> solve = bx.differentiable(bx.inner.reverse(lambda x, y, batch: batch * (y - x) ** 2, optax.sgd(0.25), 1))
        >>> meta_loss = lambda x, task: solve(x, x, task) ** 2
        >>> jax.jit(jax.vmap(jax.grad(meta_loss), (None, 0)))(1.0, jnp.array([1.0, 2.0])).tolist()
        [2.0, 2.0]
    """
    check_solver("solver", solver, "Pass, say, bx.inner.reverse(inner_loss, optax.sgd(0.1), steps=10).")

    def run(x: PyTree, y0: PyTree, batch: PyTree, key: Key | None) -> tuple[PyTree, _Solved]:
        state = solver.init(x, y0, batch)
        z, pull_start = jax.vjp(solver.start, x, y0)
        with counted_from(None):  # also inside a loss of another hypergradient
            z_T, residual, state = solved(solver.forward(key, state, x, started(z), batch), z, state)
        return z_T.y, _Solved(pull_start, x, z, residual, state)

    def pull(kept: _Solved, y_bar: PyTree) -> tuple[PyTree, PyTree]:
        pull_start, x, z, residual, state = kept
        with counted_from(None):
            (x_bar, z0_bar), _, _ = pulled_back(solver.backward(residual, state, Iterate(y_bar)), x, z, state)
        start_x_bar, y0_bar = pull_start(full_cotangent(z0_bar, z))
        return optax.tree.add(x_bar, start_x_bar), y0_bar

    def solve(x: PyTree, y0: PyTree, batch: PyTree, key: Key | None = None) -> PyTree:
        """y_T, a pytree like y0, started at y0 (or at `initial(x)`) on the inner data `batch`."""
        check_point(x, y0)
        parts = {"x": x, "y0": y0, "batch": batch, "key": key}
        arguments = x, y0, batch, key = [checks.as_arrays(name, part) for name, part in parts.items()]
        primal = close(lambda *arguments: run(*arguments)[0], *arguments)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((primal.held, arguments))):
            return primal.call([], *arguments)
        if solver.tangent is not None:
            with counted_from(None):
                push = close(solver.tangent, key, x, primal.shapes, batch, x)
            fix = "Return the tangent of what of y is optimized."
            checks.same_form("y_dot of solver.tangent", push.shapes, parameters(primal.shapes), fix)
            return _both_modes(primal.call, push.call)(*arguments, (primal.held, push.held))
        if primal.held:
            forward = close(run, *arguments)
            backward = close(pull, forward.shapes[1], parameters(primal.shapes))
        else:  # nothing to see, and no need to trace all of it before a derivative is asked
            forward, backward = Closed(_without_held(run), [], None), Closed(_without_held(pull), [], None)
        by_rule = _reverse_mode(primal.call, forward.call, backward.call, solver.pushes_tangents)
        return by_rule(*arguments, (primal.held, forward.held, backward.held))

    return solve


def _both_modes(primal: Call, push: Call) -> Rule:
    """The primal, whose tangent is `push`: JAX transposes it, and differentiates it again at the same y_T."""

    @jax.custom_jvp
    def by_rule(x: PyTree, y0: PyTree, batch: PyTree, key: Key | None, held: tuple[Held, Held]) -> PyTree:
        return primal(held[0], x, y0, batch, key)

    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
        x, _, batch, key, held = primals
        x_dot, _, batch_dot, _, held_dot = tangents
        moving = functools.partial(jax.tree.map, _is_moved, is_leaf=_is_symbolic_zero)
        _refuse(moving(batch_dot), moving(held_dot))
        y = by_rule(*primals)
        moved = any(jax.tree.leaves(moving(x_dot)))
        y_dot = push(held[1], key, x, y, batch, _instantiate(x_dot)) if moved else zero_cotangent(parameters(y))
        return y, Carried(y_dot, zero_cotangent(y.carried)) if isinstance(y, Carried) else y_dot

    by_rule.defjvp(rule, symbolic_zeros=True)
    return by_rule


def _reverse_mode(primal: Call, forward: Call, backward: Call, pushes_tangents: bool) -> Rule:
    """The primal, whose cotangent is pulled back by `backward` from what `forward` keeps."""

    @jax.custom_vjp
    def by_rule(x: PyTree, y0: PyTree, batch: PyTree, key: Key | None, held: tuple[Held, Held, Held]) -> PyTree:
        return primal(held[0], x, y0, batch, key)

    def keep(x: PyTree, y0: PyTree, batch: PyTree, key: Any, held: Any) -> tuple[PyTree, Any]:
        perturbed = functools.partial(jax.tree.map, lambda leaf: leaf.perturbed, is_leaf=_is_primal)
        _refuse(perturbed(batch), perturbed(held))
        if pushes_tangents and any(jax.tree.leaves(perturbed(parameters(y0)))):
            raise ValueError(
                "y0 must not be differentiated where the solver pushes tangents from x alone, such as "
                "inner.forward_gradient; got a derivative with respect to y0. Pass initial=lambda x: ... to the "
                "solver, or wrap y0 in jax.lax.stop_gradient."
            )
        *arguments, held = jax.tree.map(lambda leaf: leaf.value, (x, y0, batch, key, held), is_leaf=_is_primal)
        y, kept = forward(held[1], *arguments)
        return y, (kept, held[2])

    def pull(kept: Any, y_bar: PyTree) -> tuple[PyTree, PyTree, None, None, None]:
        x_bar, y0_bar = backward(kept[1], kept[0], _instantiate(parameters(y_bar)))
        return x_bar, y0_bar, None, None, None

    by_rule.defvjp(keep, pull, symbolic_zeros=True)
    return by_rule


def _refuse(batch: PyTree, held: PyTree) -> None:
    """Raises ValueError if a leaf of the batch, or something that is closed over, is differentiated."""
    for path, moved in jax.tree_util.tree_leaves_with_path(batch):
        if moved:
            raise ValueError(
                f"batch of a differentiable solve must not be differentiated; got a derivative with respect to "
                f"batch{jax.tree_util.keystr(path)}. Move that array into x, or wrap it in jax.lax.stop_gradient."
            )
    if any(jax.tree.leaves(held)):
        raise ValueError(
            "solver must not close over a value that is differentiated; got one in its loss, optimizer, initial or "
            "solve. Move it into x: loss(x, y, batch), optimizer=lambda x: optax.sgd(x)."
        )


def _without_held(function: Call) -> Call:
    return lambda held, *args: function(*args)


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _is_symbolic_zero(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.SymbolicZero)


def _is_moved(tangent: Any) -> bool:
    return not _is_symbolic_zero(tangent) and getattr(tangent, "dtype", float) != jax.dtypes.float0


def _instantiate(tree: PyTree) -> PyTree:
    """Writes zeros out."""

    def array(leaf: Any) -> Any:
        return jnp.zeros(leaf.shape, leaf.dtype) if _is_symbolic_zero(leaf) else leaf

    return jax.tree.map(array, tree, is_leaf=_is_symbolic_zero)

"""The same hypergradients as users of four libraries write them, each as a `bx.problem.Hypergradient`.

    implicit: y_T = `steps` optimizer steps from the last y, then `iterations` of conjugate gradients for v, all run
    reverse:  y_T = `steps` optimizer steps, differentiated step by step

An estimate returns (grad, state, info); the state of an implicit one is (y, v), where v is None if it starts cold.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import lineax as lx
import optax
import optimistix as optx

import bilevax as bx
from bilevax.typing import Array

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # jaxopt says at import that it is no longer maintained
    import jaxopt

RESCALED = 1e4  # lifts the curvature of the problems here over the threshold of lineax.CG in float32
Problem: TypeAlias = bx.BilevelProblem
Optimizer: TypeAlias = optax.GradientTransformation


def _unrolled(outer_loss: Callable, run: Callable) -> bx.problem.Hypergradient:
    """jax.grad through `run(x, y, inner batch) -> y`."""

    def value(x: Any, y: Any, batch: bx.Batch) -> Array:
        return outer_loss(x, run(x, y, batch.inner), batch.outer)

    def estimate(key: Any, state: Any, x: Any, batch: bx.Batch) -> tuple:
        return jax.grad(value)(x, state, batch), state, ()

    return bx.problem.Hypergradient(lambda x, y, batch=None, *, opt_state=None: y, estimate)


def _implicit(problem: Problem, run: Callable, indirect: Callable, warm: bool) -> bx.problem.Hypergradient:
    """Puts together `run(x, y, inner batch) -> y` and `indirect(x, y, inner batch, b, v) -> (x_bar, v)`."""

    def init(x: Any, y: Any, batch: Any = None, *, opt_state: Any = None) -> tuple:
        return y, optax.tree.zeros_like(y) if warm else None

    def estimate(key: Any, state: tuple, x: Any, batch: bx.Batch) -> tuple:
        y = run(x, state[0], batch.inner)
        direct, b = jax.grad(problem.outer_loss, argnums=(0, 1))(x, y, batch.outer)
        x_bar, v = indirect(x, y, batch.inner, b, state[1])
        return optax.tree.add(direct, x_bar), (y, v if warm else None), ()

    return bx.problem.Hypergradient(init, estimate)


def _plain_run(loss: Callable, optimizer: Optimizer, steps: int, remat: bool = False) -> Callable:
    def run(x: Any, y: Any, batch: Any) -> Any:
        def step(z: tuple, _: None) -> tuple:
            y, state = z
            updates, state = optimizer.update(jax.grad(loss, argnums=1)(x, y, batch), state, y)
            return (optax.apply_updates(y, updates), state), None

        body = jax.checkpoint(step, prevent_cse=False) if remat else step
        return jax.lax.scan(body, (y, optimizer.init(y)), length=steps)[0][0]

    return run


def plain_reverse(problem: Problem, optimizer: Optimizer, steps: int, remat: bool = False) -> bx.problem.Hypergradient:
    """jax.grad of a lax.scan."""
    return _unrolled(problem.outer_loss, _plain_run(problem.inner_loss, optimizer, steps, remat))


def plain_implicit(
    problem: Problem, optimizer: Optimizer, steps: int, iterations: int, warm: bool
) -> bx.problem.Hypergradient:
    """A textbook CG loop around jax.linearize of the gradient; v starts without a product where it is cold."""

    def indirect(x: Any, y: Any, batch: Any, b: Any, v: Any) -> tuple:
        gradient = lambda x, y: jax.grad(problem.inner_loss, argnums=1)(x, y, batch)  # noqa: E731
        _, product = jax.linearize(lambda y: gradient(x, y), y)

        def iterate(_: Array, carry: tuple) -> tuple:
            v, r, p, rr = carry
            hp = product(p)
            alpha = rr / optax.tree.vdot(p, hp)
            v, r = optax.tree.add_scale(v, alpha, p), optax.tree.add_scale(r, -alpha, hp)
            new = optax.tree.vdot(r, r)
            return v, r, optax.tree.add_scale(r, new / rr, p), new

        r = b if v is None else optax.tree.sub(b, product(v))
        start = optax.tree.zeros_like(b) if v is None else v
        v = jax.lax.fori_loop(0, iterations, iterate, (start, r, r, optax.tree.vdot(r, r)))[0]
        _, pull_back = jax.vjp(lambda x: gradient(x, y), x)
        return optax.tree.scale(-1, pull_back(v)[0]), v

    return _implicit(problem, _plain_run(problem.inner_loss, optimizer, steps), indirect, warm)


def bilevax_reverse(
    problem: Problem, optimizer: Optimizer, steps: int, checkpoint: bx.inner.Checkpoint = bx.inner.every_step
) -> bx.problem.Hypergradient:
    """inner.reverse."""
    return bx.hypergradient(
        problem.outer_loss, bx.inner.reverse(problem.inner_loss, optimizer, steps, checkpoint=checkpoint)
    )


def bilevax_implicit(
    problem: Problem, optimizer: Optimizer, steps: int, iterations: int, warm: bool
) -> bx.problem.Hypergradient:
    """inner.implicit with ihvp.cg."""
    ihvp = bx.ihvp.cg(maxiter=iterations, tol=0.0)
    solver = bx.inner.implicit(problem.inner_loss, optimizer, steps, ihvp=ihvp, warm_start=warm)
    return bx.hypergradient(problem.outer_loss, solver)


def _jaxopt_run(loss: Callable, optimizer: Optimizer, steps: int, unroll: bool) -> Callable:
    solver = jaxopt.OptaxSolver(
        lambda y, x, batch: loss(x, y, batch), optimizer, maxiter=steps, tol=0.0, implicit_diff=False, unroll=unroll
    )
    return lambda x, y, batch: solver.run(y, x, batch).params if steps else y


def jaxopt_reverse(problem: Problem, optimizer: Optimizer, steps: int) -> bx.problem.Hypergradient:
    """An OptaxSolver that is unrolled."""
    return _unrolled(problem.outer_loss, _jaxopt_run(problem.inner_loss, optimizer, steps, unroll=True))


def jaxopt_implicit(
    problem: Problem, optimizer: Optimizer, steps: int, iterations: int, warm: bool
) -> bx.problem.Hypergradient:
    """root_vjp with solve_cg, whose solution is kept; custom_root would hide it, and v could not stay warm."""

    def indirect(x: Any, y: Any, batch: Any, b: Any, v: Any) -> tuple:
        kept = []

        def solve(product: Callable, b: Any) -> Any:
            kept.append(jaxopt.linear_solve.solve_cg(product, b, init=v, maxiter=iterations, tol=0.0))
            return kept[0]

        gradient = lambda y, x: jax.grad(problem.inner_loss, argnums=1)(x, y, batch)  # noqa: E731
        (x_bar,) = jaxopt.implicit_diff.root_vjp(gradient, y, (x,), b, solve)
        return x_bar, kept[0]

    return _implicit(problem, _jaxopt_run(problem.inner_loss, optimizer, steps, unroll=False), indirect, warm)


def _optimistix_run(loss: Callable, optimizer: Optimizer, steps: int, adjoint: optx.AbstractAdjoint) -> Callable:
    solver: Any = optx.OptaxMinimiser(optimizer, rtol=0.0, atol=0.0)

    def run(x: Any, y: Any, batch: Any) -> Any:
        if not steps:
            return y
        return optx.minimise(
            lambda y, args: loss(args[0], y, args[1]),
            solver,
            y,
            (x, batch),
            max_steps=steps,
            adjoint=adjoint,
            throw=False,
        ).value

    return run


def optimistix_reverse(
    problem: Problem, optimizer: Optimizer, steps: int, checkpoints: int | None = None
) -> bx.problem.Hypergradient:
    """An OptaxMinimiser with RecursiveCheckpointAdjoint, by default with about √(2 steps) checkpoints."""
    adjoint = optx.RecursiveCheckpointAdjoint(checkpoints)
    return _unrolled(problem.outer_loss, _optimistix_run(problem.inner_loss, optimizer, steps, adjoint))


def lineax_implicit(
    problem: Problem, optimizer: Optimizer, steps: int, iterations: int, warm: bool, scale: float = 1.0
) -> bx.problem.Hypergradient:
    """Optimistix for y and lineax.CG for v, on scale · H v = scale · b."""
    solver = lx.CG(rtol=0.0, atol=0.0, max_steps=iterations, stabilise_every=None)

    def indirect(x: Any, y: Any, batch: Any, b: Any, v: Any) -> tuple:
        gradient = lambda x, y: jax.grad(problem.inner_loss, argnums=1)(x, y, batch)  # noqa: E731
        tag = lx.positive_semidefinite_tag
        hessian = lx.JacobianLinearOperator(lambda y, _: optax.tree.scale(scale, gradient(x, y)), y, tags=tag)
        options = {} if v is None else {"y0": v}
        v = lx.linear_solve(hessian, optax.tree.scale(scale, b), solver, options=options, throw=False).value
        _, pull_back = jax.vjp(lambda x: gradient(x, y), x)
        return optax.tree.scale(-1, pull_back(v)[0]), v

    adjoint = optx.ImplicitAdjoint()
    return _implicit(problem, _optimistix_run(problem.inner_loss, optimizer, steps, adjoint), indirect, warm)


IMPLICIT: dict[str, Callable[..., bx.problem.Hypergradient]] = {
    "plain JAX": plain_implicit,
    "bilevax": bilevax_implicit,
    "jaxopt": jaxopt_implicit,
    "lineax": lineax_implicit,
    "lineax, rescaled": functools.partial(lineax_implicit, scale=RESCALED),
}
REVERSE: dict[str, Callable[..., bx.problem.Hypergradient]] = {
    "plain JAX": plain_reverse,
    "bilevax": bilevax_reverse,
    "bilevax, two_level": functools.partial(bilevax_reverse, checkpoint=bx.inner.two_level),
    "bilevax, store_all": functools.partial(bilevax_reverse, checkpoint=bx.inner.store_all),
    "bilevax, store_products(3)": functools.partial(bilevax_reverse, checkpoint=bx.inner.store_products(every=3)),
    "bilevax, store_products(1)": functools.partial(bilevax_reverse, checkpoint=bx.inner.store_products()),
    "jaxopt": jaxopt_reverse,
    "optimistix": optimistix_reverse,
    "optimistix, all steps": lambda problem, optimizer, steps: optimistix_reverse(problem, optimizer, steps, steps),
}


def exact_implicit(problem: Problem, x: Any, y: Any, batch: bx.Batch) -> Array:
    """The implicit hypergradient at this y with its linear system solved; for float64 arguments."""
    gradient = lambda x, y: jax.grad(problem.inner_loss, argnums=1)(x, y, batch.inner)  # noqa: E731
    direct, b = jax.grad(problem.outer_loss, argnums=(0, 1))(x, y, batch.outer)
    _, product = jax.linearize(lambda y: gradient(x, y), y)
    v, _ = jax.scipy.sparse.linalg.cg(product, b, tol=1e-9, maxiter=3000)
    _, pull_back = jax.vjp(lambda x: gradient(x, y), x)
    return direct - pull_back(v)[0]


def newton(problem: Problem, x: Any, y: Any, batch: Any, steps: int) -> Any:
    """Newton steps on the inner problem, which must be convex; for float64 arguments."""

    def step(y: Any, _: None) -> tuple:
        gradient, product = jax.linearize(lambda y: jax.grad(problem.inner_loss, argnums=1)(x, y, batch), y)
        move, _ = jax.scipy.sparse.linalg.cg(product, gradient, tol=1e-7, maxiter=3000)
        return optax.tree.sub(y, move), None

    return jax.lax.scan(step, y, length=steps)[0]


def trajectory(problem: Problem, x: Any, y: Any, batch: bx.Batch, steps: int, optimizer: Optimizer) -> tuple:
    """Moves x by the exact hypergradient; for float64 arguments.

    Returns:
      The points x [steps, N], the exact hypergradients there [steps, N], and the largest ‖∇_y g‖ that they were taken
      at.
    """

    def step(carry: tuple, _: None) -> tuple:
        x, y, state = carry
        y = newton(problem, x, y, batch.inner, steps=3)
        grad = exact_implicit(problem, x, y, batch)
        size = optax.tree.norm(jax.grad(problem.inner_loss, argnums=1)(x, y, batch.inner))
        updates, state = optimizer.update(grad, state, x)
        return (optax.apply_updates(x, updates), y, state), (x, grad, size)

    y = newton(problem, x, y, batch.inner, steps=10)
    trace: tuple = jax.lax.scan(step, (x, y, optimizer.init(x)), length=steps)[1]
    return trace[0], trace[1], jnp.max(trace[2])

"""What an inner solver must be, to be used by somebody else."""

from typing import Any

from bilevax import checks
from bilevax.carried import parameters
from bilevax.problem import InnerSolver, Iterate, SolverInfo
from bilevax.typing import PyTree


def check_solver(name: str, solver: Any, fix: str) -> None:
    """Raises ValueError unless it is an `InnerSolver` whose functions take what they are given."""
    checks.made_of(
        *(name, solver, InnerSolver, fix),
        init=("x", "y", "batch"),
        start=("x", "y"),
        forward=("key", "state", "x", "z", "batch"),
        backward=("residual", "state", "z_bar"),
    )
    if solver.tangent is not None:
        checks.function(f"{name}.tangent", solver.tangent, "key", "x", "y", "batch", "x_dot")


def started(z: Any) -> Iterate:
    """What `start` returns, if it is what it should be."""
    checks.instance("z of solver.start", z, Iterate, "Return bx.problem.Iterate(y, opt_state, t).")
    return z


def solved(parts: Any, z: Iterate, state: Any) -> tuple[Iterate, Any, Any]:
    """What `forward` returns from this z and state, if it is what it should be."""
    z_T, residual, after = checks.parts("solver.forward", parts, "z_T", "residual", "state")
    checks.instance("z_T of solver.forward", z_T, Iterate, "Return bx.problem.Iterate(y, opt_state, t).")
    checks.same_form("y of solver.forward", z_T.y, z.y, "Return a y like that of start.")
    fix = "Return the optimizer state and t in the form that start gives them."
    checks.same_form("opt_state of solver.forward", z_T.opt_state, z.opt_state, fix)
    checks.same_form("t of solver.forward", z_T.t, z.t, fix)
    checks.same_form("state after solver.forward", after, state, "Return a state like that of init.")
    return z_T, residual, after


def pulled_back(parts: Any, x: PyTree, z: Iterate, state: Any) -> tuple[tuple[PyTree, Iterate], Any, SolverInfo]:
    """What `backward` returns for this x, z_0 and state, if it is what it should be."""
    bars, after, info = checks.parts("solver.backward", parts, "(x_bar, z0_bar)", "state", "info")
    x_bar, z0_bar = checks.parts("solver.backward, as the first of three,", bars, "x_bar", "z0_bar")
    checks.same_form("x_bar of solver.backward", x_bar, x, "Return a cotangent like x.")
    checks.instance("z0_bar of solver.backward", z0_bar, Iterate, "Return bx.problem.Iterate(y_bar).")
    fix = "Return a cotangent like y, zeros for none; like y.params of a bx.inner.Carried."
    checks.same_form("y of z0_bar of solver.backward", z0_bar.y, parameters(z.y), fix)
    checks.same_form("state after solver.backward", after, state, "Return a state like that of init.")
    checks.instance("info of solver.backward", info, SolverInfo, "Return bx.problem.SolverInfo(...).")
    return (x_bar, z0_bar), after, info

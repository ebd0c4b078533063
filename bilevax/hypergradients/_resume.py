"""How an inner optimizer goes on from one outer step to the next."""

from typing import Any

import jax
from jax.extend import core

from bilevax import checks
from bilevax.curvature.capture.batch_axis import opened
from bilevax.inner._checked import started
from bilevax.problem import Iterate, Start, arrays
from bilevax.typing import PyTree


def first_state(start: Start, x: PyTree, y: PyTree, opt_state: Any) -> tuple[Any, Any]:
    """The first optimizer state and t: those of start, or the optimizer state that was trained elsewhere.

    Args:
      start: of the solver.
      x: outer variable.
      y: inner variable.
      opt_state: of a training state (flax `TrainState`, `nnx.Optimizer`) or of a loop by hand; None for a new one. The
        variables in which flax nnx wraps each array are taken off.

    Raises:
      ValueError: if opt_state is not one of the solver's optimizer for this y, or the solver has none.
    """
    z = started(start(x, y))
    return arrays(z.opt_state if opt_state is None else _taken_over(opt_state, z.opt_state)), arrays(z.t)


def resumed(start: Start, x: PyTree, y: PyTree, opt_state: Any, t: Any) -> Iterate:
    """`start(x, y)` with the warm optimizer state and t in it, as constants.

    What start computes from x is made anew: the numbers of `lambda x: optax.inject_hyperparams(optax.adam)(x)` stand in
    its state, and there they follow x, while the moments beside them are kept.
    """
    z = started(start(x, y))
    fix = "Pass the state of init(x, y) or of the last estimate of this solver."
    checks.same_shapes("opt_state of the state", opt_state, z.opt_state, fix)
    new, structure = jax.tree.flatten(z.opt_state)
    kept = jax.tree.leaves(jax.lax.stop_gradient(opt_state))
    leaves = (
        arrays(a) if of_x else b for a, b, of_x in zip(new, kept, _made_of_x(start, x, y, opt_state), strict=True)
    )
    return Iterate(z.y, jax.tree.unflatten(structure, leaves), t)


def refused(opt_state: Any, reason: str) -> None:
    """Raises ValueError if there is an optimizer state that nothing would read."""
    if opt_state is not None:
        raise ValueError(f"opt_state must be None where {reason}; got one. Leave it away.")


def _taken_over(opt_state: Any, like: Any) -> Any:
    """The leaves of `opt_state` in the structure of `like`; the names on the way to each leaf must agree."""
    fix = "Pass the state of the optimizer that the solver was made of, for this y."
    if isinstance(like, tuple) and not like and jax.tree.leaves(opt_state):
        refused(opt_state, "the solver has no optimizer")
    if hasattr(opt_state, "opt_state") and not isinstance(opt_state, tuple):  # those of optax may have one inside
        raise ValueError(
            f"opt_state must be the state of an optimizer; got {type(opt_state).__name__}. Pass its opt_state: "
            f"opt_state=given.opt_state."
        )
    got, expected = (jax.tree_util.tree_leaves_with_path(tree) for tree in (opt_state, like))
    if [_name(path) for path, _ in got] == [_name(path) for path, _ in expected]:
        opt_state = jax.tree.unflatten(jax.tree.structure(like), [leaf for _, leaf in got])
    elif (what := _kinds(opt_state)) != (want := _kinds(like)):
        raise ValueError(
            f"opt_state must keep its structure and shapes; got {', '.join(what) or type(opt_state).__name__}, "
            f"expected {', '.join(want) or type(like).__name__}. {fix}"
        )
    checks.same_form("opt_state", opt_state, like, fix)
    return opt_state


def _kinds(opt_state: Any) -> list[str]:
    """The names of the states of optax that one is made of."""
    if not isinstance(opt_state, tuple):
        return []
    name = [type(opt_state).__name__] if hasattr(opt_state, "_fields") else []
    return name + [kind for part in opt_state for kind in _kinds(part)]


def _name(path: Any) -> str:
    """The way to a leaf, without that into the variable of flax nnx that holds it."""
    return jax.tree_util.keystr(path).removesuffix(".value")


def _made_of_x(start: Start, x: PyTree, y: PyTree, opt_state: Any) -> list[bool]:
    """For each leaf of the first optimizer state, whether it is computed from x."""
    if not jax.tree.leaves(opt_state):
        return []
    program, _ = opened(jax.make_jaxpr(lambda x, y: start(x, y).opt_state)(x, y))
    number = len(jax.tree.leaves(x))
    return _reached(program, [i < number for i in range(len(program.invars))])


def _reached(program: Any, inputs: list[bool]) -> list[bool]:
    """For each result of a program, whether it reads one of these inputs."""
    found = {variable for variable, of_x in zip(program.invars, inputs, strict=True) if of_x}
    for equation in program.eqns:
        reads = [isinstance(atom, core.Var) and atom in found for atom in equation.invars]
        inner = equation.params.get("jaxpr") if equation.primitive.name in ("jit", "pjit") else None
        results = [any(reads)] * len(equation.outvars) if inner is None else _reached(opened(inner)[0], reads)
        found |= {variable for variable, of_x in zip(equation.outvars, results, strict=True) if of_x}
    return [isinstance(atom, core.Var) and atom in found for atom in program.outvars]

"""What a hypergradient must be, to be used by somebody else."""

from typing import Any

from bilevax import checks
from bilevax.problem import Hypergradient
from bilevax.typing import PyTree


def check_hypergrad(name: str, hypergrad: Any, fix: str = "Pass, say, bx.hypergradient(outer_loss, solver).") -> None:
    """Raises ValueError unless it is a `Hypergradient` whose functions take what they are given."""
    estimate = ("key", "state", "x", "batch")
    checks.made_of(name, hypergrad, Hypergradient, fix, init=("x", "y", "batch"), estimate=estimate)


def estimated(parts: Any, x: PyTree, state: Any, name: str = "hypergrad") -> tuple[PyTree, Any, Any]:
    """What `estimate` returns at this x from this state, if it is what it should be."""
    grad, after, info = checks.parts(f"{name}.estimate", parts, "grad", "state", "info")
    checks.same_form(f"grad of {name}.estimate", grad, x, "Return a gradient like x.")
    checks.same_form(f"state after {name}.estimate", after, state, "Return a state like that of init.")
    return grad, after, info

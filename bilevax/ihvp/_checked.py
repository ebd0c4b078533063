"""What an inverse-Hessian-vector product must be, to be used by somebody else."""

from typing import Any

from bilevax import checks
from bilevax.problem import IHVP, Apply


def check_ihvp(name: str, ihvp: Any, fix: str) -> None:
    """Raises ValueError unless it is an `IHVP` whose functions take what they are given."""
    init, prepare = ("x", "y", "batch", "inner_loss"), ("key", "state", "inner_loss", "point")
    checks.made_of(name, ihvp, IHVP, fix, init=init, prepare=prepare)


def prepared(name: str, parts: Any, state: Any) -> tuple[Apply, Any]:
    """What `prepare` returns for this state, if it is what it should be."""
    apply, after = checks.parts(f"{name}.prepare", parts, "apply", "state")
    checks.same_form(f"state after {name}.prepare", after, state, "Return from prepare a state like that of init.")
    return apply, after

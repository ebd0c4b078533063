"""What happens to a leaf that no rule covers: it is refused, or estimated, scaled, dropped."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn, Protocol

import jax.numpy as jnp

from bilevax.curvature.capture._remedies import remedies
from bilevax.typing import Array, Scalar


class SolveLeaf(Protocol):
    """v of one leaf, for b, weight decay and damping together (delta), and the mean eigenvalue of the other blocks."""

    def __call__(self, b: Array, delta: Scalar, scale: Scalar, /) -> Array: ...


class Treatment(NamedTuple):
    """What happens to a leaf that no rule covers.

    Attributes:
      rule: its name in reports.
      solve: `solve(b, delta, scale) -> v` for each leaf; scale is the mean eigenvalue of the other blocks.
      probes: random signs with which its diagonal is estimated; with 0, it is not, and `solve` is asked.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.capture.zero({"w": "unused"})["w"].rule
        'zero'
    """

    rule: str
    solve: SolveLeaf | None = None
    probes: int = 0


Unsupported = Callable[[Mapping[str, str]], Mapping[str, Treatment]]


def error(leaves: Mapping[str, str]) -> NoReturn:
    """Refuses leaves that no rule covers; the default.

    Args:
      leaves: name of the leaf -> what the model does with it.

    Raises:
      ValueError: always; it names every leaf and the primitive that uses it.

    Cost: none.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.capture.error({"w": "exp"})
        Traceback (most recent call last):
        ...
        ValueError: model must use each leaf of y in a way that has a curvature block; got w (exp)...
    """
    found = ", ".join(f"{name} ({what})" for name, what in leaves.items())
    raise ValueError(
        f"model must use each leaf of y in a way that has a curvature block; got {found}.{remedies(leaves)} Pass "
        f"unsupported=bx.curvature.capture.diagonal (or identity, or zero), or mark a layer with bx.curvature.observe. "
        f"Expected a matrix product or convolution with the examples, rows of a table, an element-wise scale or shift."
    )


def diagonal(leaves: Mapping[str, str], probes: int = 32) -> dict[str, Treatment]:
    """Estimates the diagonal of the Gauss–Newton matrix for leaves that no rule covers.

        diag(G) ≈ 1/R Σ_r (Σ_n ±1 √(w_n/N) J_nᵀ u_n)²

    Args:
      leaves: name of the leaf -> what the model does with it.
      probes: R, vectors of random signs; the error falls like 1/√R. To choose it, `functools.partial(diagonal,
        probes=100)`.

    Returns:
      A `Treatment` for each leaf.

    Cost: `probes` backward passes whenever factors are computed.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.capture.diagonal({"w": "exp"})["w"].probes
        32
    """
    return {name: Treatment("diagonal, estimated", None, probes) for name in leaves}


def identity(leaves: Mapping[str, str]) -> dict[str, Treatment]:
    """Scales leaves that no rule covers like the mean of the other blocks: v = b / (delta + mean eigenvalue).

    Args:
      leaves: name of the leaf -> what the model does with it.

    Returns:
      A `Treatment` for each leaf.

    Cost: none.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.capture.identity({"w": "exp"})["w"].rule
        'identity'
    """
    return {name: Treatment("identity", lambda b, delta, scale: b / (delta + scale)) for name in leaves}


def zero(leaves: Mapping[str, str]) -> dict[str, Treatment]:
    """Drops leaves that no rule covers: v = 0 there, so that the inverse is only positive semidefinite.

    Args:
      leaves: name of the leaf -> what the model does with it.

    Returns:
      A `Treatment` for each leaf.

    Cost: none.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.capture.zero({"w": "exp"})["w"].rule
        'zero'
    """
    return {name: Treatment("zero", lambda b, delta, scale: jnp.zeros_like(b)) for name in leaves}


def answered(unsupported: Unsupported, leaves: Mapping[str, str]) -> dict[str, Treatment]:
    """A treatment for each of these leaves."""
    treatments = unsupported(leaves)
    for name in leaves:
        treatment = treatments.get(name) if isinstance(treatments, Mapping) else None
        if not isinstance(treatment, Treatment):
            raise ValueError(
                f"unsupported must return a dict with a Treatment for each leaf that it is given; got {treatment!r} "
                f"for {name}. Return, say, bx.curvature.capture.identity(leaves)."
            )
    return {name: treatments[name] for name in leaves}

"""What the author of a model does about a leaf that has no block: one line for each reason."""

from collections.abc import Mapping, Sequence

from bilevax.curvature.capture.places import PAIRS

REMEDIES = {
    "meets no examples": "leave it out of y, or pass blocks={identity}",
    "while": "write a loop of fixed length, jax.lax.scan, in its place",
    "cond": "compute both branches and choose with jnp.where",
    "scan over a part": "make that part a leaf of its own, y = {{'first': ..., 'rest': ...}}, and hand it to the scan",
    "scan over a function": "hand the leaf itself to the scan, and apply the function in its body",
    "returned by": "return what the leaf makes of the examples, not the leaf",
    "is the output": "return what the leaf makes of the examples, not the leaf",
    "another matrix for each": "keep such a leaf as a table, and pick rows by ids that are among the inputs",
    "other values for other": "keep such a leaf as a table, and pick rows by ids that are among the inputs",
    "groups of the batch": "group the channels, feature_group_count, and not the batch",
}
"""Part of a reason -> what helps; `{identity}` stands for the choice of the identity for these leaves."""

CG = "bx.ihvp.cg(maxiter=5, curvature=bx.curvature.gauss_newton, damping=1e-3)"


def remedies(leaves: Mapping[str, str]) -> str:
    """The remedies for these leaves, name -> reason, each once; "" where none is known.

    Args:
      leaves: name of the leaf -> what the model does with it.

    Returns:
      A sentence for each.
    """
    found: dict[str, list[str]] = {}
    for name, what in leaves.items():
        for reason, remedy in REMEDIES.items():
            if reason in what:
                found.setdefault(remedy, []).append(name)
                break
    told = [(names, remedy.format(identity=_identity(names))) for remedy, names in found.items()]
    return "".join(f" For {', '.join(names)}: {remedy}." for names, remedy in told)


def _identity(names: Sequence[str]) -> str:
    return f"{{{', '.join(f'{name!r}: bx.curvature.capture.identity' for name in names)}}}"


def row_of_each(what: str, doubt: str, *, summed: bool = False) -> str:
    """What to do where the outputs hold no row for each example, and why they do not."""
    if summed and "dot_general" in what:
        fix = "A matrix whose rows belong to the examples stands among the inputs, (a, matrix). If another axis counts "
        fix += "them, say so: ModelLoss(..., examples=lambda inputs: 1). Else take"
    elif summed:
        fix = "If another axis counts them, say so: ModelLoss(..., examples=lambda inputs: 1). Else take"
    elif PAIRS in what:
        fix = "Pass the pairs as the examples, one row of the inputs for each, or take"
    else:
        fix = "Return one row for each example, in their order, or take"
    return (
        f"model must return outputs [N, ..., C] whose row n belongs to example n of the inputs; got outputs in which "
        f"the examples cannot be followed to the first axis: {what}. {fix} {CG}, which asks for no rows and no "
        f"blocks. {doubt}".rstrip()
    )

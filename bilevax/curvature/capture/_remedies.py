"""What the author of a model does about a leaf that has no block: one line for each reason."""

from collections.abc import Mapping

REMEDIES = {
    "meets no examples": "leave it out of y, or give it blocks={path: bx.curvature.capture.identity}",
    "while": "write a loop of fixed length, jax.lax.scan, in its place",
    "cond": "compute both branches and choose with jnp.where",
    "scan over a function": "hand the leaf itself to the scan, and apply the function in its body",
    "returned by": "return what the leaf makes of the examples, not the leaf",
    "is the output": "return what the leaf makes of the examples, not the leaf",
    "another matrix for each": "keep such a leaf as a table, and pick rows by ids that are among the inputs",
    "other values for other": "keep such a leaf as a table, and pick rows by ids that are among the inputs",
    "groups of the batch": "group the channels, feature_group_count, and not the batch",
}
"""Part of a reason -> what helps."""


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
    return "".join(f" For {', '.join(names)}: {remedy}." for remedy, names in found.items())

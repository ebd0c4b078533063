"""What a user chooses for single leaves, by path, pattern or function of the path."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from bilevax import checks

Choice: TypeAlias = Callable[..., Any] | int
"""`diagonal`, `identity`, `zero`, or another function from leaves to treatments; or the rank of a sketch."""
Blocks: TypeAlias = Mapping[str, Choice] | Callable[[str], Choice | None]
"""Path or pattern of a leaf -> `Choice`, of which the first that fits counts; or a function of the path."""


def chosen(blocks: Blocks | None, names: Sequence[str]) -> dict[int, Choice]:
    """The choice for each leaf that has one, by its place.

    Args:
      blocks: as of `kfac`.
      names: of the leaves.

    Returns:
      Place of the leaf -> its choice.

    Raises:
      ValueError: if a pattern fits no leaf, or a choice is none.
    """
    if blocks is None:
        return {}
    if not isinstance(blocks, Mapping):
        if not callable(blocks):
            raise ValueError(
                f"blocks must be a dict from paths or patterns of leaves to their blocks, or a function of the path; "
                f"got {blocks!r:.80}. Pass, say, blocks={{'{names[0]}': bx.curvature.capture.diagonal}}."
            )
        checks.function("blocks", blocks, "path")
        found = {leaf: blocks(name) for leaf, name in enumerate(names)}
    else:
        for pattern in blocks:
            if not isinstance(pattern, str):
                raise ValueError(
                    f"blocks must name leaves of y by path or pattern, which are strings; got {pattern!r:.80}. Pass, "
                    f"say, blocks={{'{names[0]}': 64}}."
                )
            if not any(_fits(name, pattern) for name in names):
                raise ValueError(
                    f"blocks must name leaves of y, by path or pattern; got {pattern!r}, which fits none of "
                    f"{', '.join(names)}. Print bx.curvature.describe(inner_loss, x, y, batch) for their paths."
                )
        first = {leaf: next((p for p in blocks if _fits(name, p)), None) for leaf, name in enumerate(names)}
        found = {leaf: blocks[pattern] for leaf, pattern in first.items() if pattern is not None}
    for leaf, choice in found.items():
        rank = isinstance(choice, int) and not isinstance(choice, bool) and choice > 0
        if choice is not None and not rank and not callable(choice):
            raise ValueError(
                f"blocks must give a leaf bx.curvature.capture.diagonal, identity or zero, a function like these, or a "
                f"rank >= 1; got {choice!r} for {names[leaf]}. Pass, say, {{'{names[leaf]}': 64}}."
            )
    return {leaf: choice for leaf, choice in found.items() if choice is not None}


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)

"""Steps that are chosen from a grid: those at an end of it are marked, since a better one may lie outside."""

from collections.abc import Mapping, Sequence
from typing import Any

END = "at_grid_end"


def at_ends(grid: Mapping[str, Sequence[float]], steps: Mapping[str, float]) -> list[str]:
    """Names of the steps that lie at an end of their grid; where there is one value, nothing was chosen."""
    ends = {name: {min(values), max(values)} for name, values in grid.items() if len({*values}) > 1}
    return [name for name, step in steps.items() if step in ends.get(name, ())]


def choice(grid: Mapping[str, Sequence[float]], steps: Mapping[str, float]) -> dict[str, Any]:
    """For the configuration of a run: what there was to choose from, what was chosen, and what lies at an end."""
    tried = {name: [*values] for name, values in grid.items()}
    return {"grid": tried, "step_sizes": dict(steps), END: at_ends(grid, steps)}

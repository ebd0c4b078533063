"""The options of a job as a JSON file holds them."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

# Options that say which runs there are or where they are kept, and not what a run is: runs that differ in them lie side
# by side.
SELECTING = (
    *("methods", "plugin", "kind", "seeds", "seed", "nets", "problems", "end_to_end"),
    *("results", "checkpoint", "checkpoint_every"),
)


def plain(value: Any) -> Any:
    """An option as a JSON file holds it."""
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    exact = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if exact else str(value)


def options_of(config: Any, without: Collection[str] = SELECTING) -> dict[str, Any]:
    """What a job's options say about each run, as a JSON file holds it."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= options_of(value, without)
        elif field.name not in without:
            found[field.name] = plain(value)
    return found

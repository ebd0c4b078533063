"""What must be the same when a run is resumed."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


def plain(config: Mapping[str, Any]) -> Any:
    """As JSON gives it back."""
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config must be a mapping of names to values; got {config!r:.80}. Pass, say, {{'rate': 0.1}}."
        )
    for path, value in _flat("config", config):
        if not isinstance(value, str | int | float | bool | None | Mapping | list | tuple):
            raise ValueError(
                f"config must be made of what JSON knows; got {value!r:.80} at {path}. Pass a str, a list, or "
                f"float(...) of it."
            )
    return json.loads(json.dumps(config, default=dict))


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and lists, each with its place."""
    if isinstance(value, Mapping | list | tuple) and value:
        for key, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            if not isinstance(key, str | int):
                raise ValueError(f"config must have names as keys; got {key!r:.80} at {path}. Pass a str.")
            yield from _flat(f"{path}[{key!r}]", one)
    else:
        yield path, value


def check_config(stored: Any, config: Any, at: Any) -> None:
    there, here = (dict(_flat("config", value)) for value in (stored or {}, config))
    for path in {**there, **here}:
        one, other = (json.dumps(values[path]) if path in values else "nothing" for values in (here, there))
        if one != other:
            raise ValueError(
                f"config must be the one of the run; got {path} = {one}, where {at} has {other}. Pass that, or give "
                f"this run a folder of its own."
            )

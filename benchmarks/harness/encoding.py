"""Results as JSON, exactly: floats to the last bit, arrays with their bytes, tuples apart from lists."""

import base64
import dataclasses
from typing import Any

import jax
import numpy as np


def encoded(value: Any) -> Any:
    """What `json.dumps` takes, from which `decoded` makes the same value again.

    A named tuple or a dataclass is kept by the name of its class; arrays of JAX and NumPy come back as NumPy's.

    Raises:
      TypeError: if there is no form for a value.
    """
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        text = base64.b64encode(array.tobytes()).decode()
        return {"array": text, "dtype": array.dtype.name, "shape": list(array.shape)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encoded(part) for part in value]
    if isinstance(value, dict):
        return {"dict": [[encoded(key), encoded(part)] for key, part in value.items()]}
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, "fields": {name: encoded(part) for name, part in fields.items()}}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        fields = value._asdict()
        return {"class": type(value).__name__, "fields": {name: encoded(part) for name, part in fields.items()}}
    if isinstance(value, tuple):
        return {"tuple": [encoded(part) for part in value]}
    raise TypeError(f"value must be of numbers, text, arrays, lists, tuples and dicts; got {type(value).__name__}")


def decoded(told: Any, *classes: type) -> Any:
    """The value again.

    Args:
      told: what `encoded` made.
      classes: of the named tuples and dataclasses in it; no other is made, whatever a file says.

    Raises:
      ValueError: if it is no such thing.
    """
    if isinstance(told, list):
        return [decoded(part, *classes) for part in told]
    if not isinstance(told, dict):
        return told
    try:
        if "array" in told:
            array = np.frombuffer(base64.b64decode(told["array"]), jax.numpy.dtype(told["dtype"]))
            array = array.reshape(told["shape"]).copy()
            return array if array.ndim else array[()]
        if "dict" in told:
            return {decoded(key, *classes): decoded(part, *classes) for key, part in told["dict"]}
        if "tuple" in told:
            return tuple(decoded(part, *classes) for part in told["tuple"])
        kind = {one.__name__: one for one in classes}[told["class"]]
        return kind(**{name: decoded(part, *classes) for name, part in told["fields"].items()})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"told must be made by encoded, with classes {[*classes]}; got {error!r}") from error

"""Weights of BERT from a local safetensors file, in the tree of `benchmarks.networks.encoder`."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from benchmarks.harness.errors import DataError
from bilevax.typing import Array, PyTree

NEW = "classifier"  # what no checkpoint has: it is learnt from the first value
PREFIXES = ("", "bert.")
EMBEDDINGS = {"word": "word_embeddings", "position": "position_embeddings", "type": "token_type_embeddings"}
BLOCK = {
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
FLOATS = ("F64", "F32", "F16", "BF16")  # what a safetensors file calls them
LEAVES = {"kernel": ("weight",), "embedding": ("weight",), "scale": ("weight", "gamma"), "bias": ("bias", "beta")}


def names(path: tuple[str, ...]) -> list[str]:
    """What a leaf of the encoder may be called in a checkpoint; layer norms have had two spellings.

    Example:
        >>> names(("block_3", "attention", "out", "kernel"))
        ['encoder.layer.3.attention.output.dense.weight', 'bert.encoder.layer.3.attention.output.dense.weight']
    """
    *parts, leaf = path
    match parts:
        case ["embeddings", "norm"]:
            stem = "embeddings.LayerNorm"
        case ["embeddings", table]:
            stem = f"embeddings.{EMBEDDINGS[table]}"
        case ["pooler"]:
            stem = "pooler.dense"
        case [block, "attention", "out"]:
            stem = f"encoder.layer.{block.removeprefix('block_')}.attention.output.dense"
        case [block, "attention", projection]:
            stem = f"encoder.layer.{block.removeprefix('block_')}.attention.self.{projection}"
        case [block, layer]:
            stem = f"encoder.layer.{block.removeprefix('block_')}.{BLOCK[layer]}"
        case _:
            raise ValueError(f"path must lead to a leaf of the encoder; got {'/'.join(path)}.")
    endings = LEAVES[leaf] if stem.endswith("LayerNorm") else LEAVES[leaf][:1]
    return [f"{prefix}{stem}.{ending}" for ending in endings for prefix in PREFIXES]


def stored_shape(path: tuple[str, ...], value: Array) -> tuple[int, ...]:
    """The shape of a leaf in a checkpoint: matrices are [outputs, inputs], and heads are not apart."""
    if path[-1] == "embedding":
        return value.shape
    if path[-1] != "kernel":
        return (value.size,)
    inputs = math.prod(value.shape[: 2 if path[-2] == "out" else 1])
    return value.size // inputs, inputs


def load(path: Path, y: PyTree) -> PyTree:
    """The parameters y with the values of the file; the classifier keeps those it has.

    Args:
      path: of a safetensors file with the tensor names of BERT, with or without "bert." before them. A matrix
        [outputs, inputs] is transposed, and its axes are split into heads where the encoder has them.
      y: parameters of an `Encoder`, whose shapes and types the result has.

    Returns:
      A tree like y.

    Raises:
      DataError: if the file cannot be read, or tensors are missing, have another shape, or are not finite floats; it
        names them.
    """
    problems: list[str] = []

    def leaf(key_path: Any, value: Array) -> Array:
        keys = tuple(key.key for key in key_path)
        if keys[0] == NEW:
            return value
        name = next((name for name in names(keys) if name in stored), None)
        if name is None:
            problems.append(f"{names(keys)[0]} is missing")
            return value
        described, expected = file.get_slice(name), stored_shape(keys, value)
        if (shape := tuple(described.get_shape())) != expected:
            problems.append(f"{name} has shape {shape}, expected {expected}")
            return value
        if (dtype := described.get_dtype()) not in FLOATS:
            problems.append(f"{name} has type {dtype}, expected {' or '.join(FLOATS)}")
            return value
        tensor = np.asarray(file.get_tensor(name))
        if not np.isfinite(tensor).all():
            problems.append(f"{name} has numbers that are not finite")
            return value
        return jnp.asarray((tensor.T if keys[-1] == "kernel" else tensor).reshape(value.shape).astype(value.dtype))

    try:
        with safe_open(path, framework="flax") as file:
            stored = {*file.keys()}
            loaded = jax.tree_util.tree_map_with_path(leaf, y)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} must be a safetensors file; it cannot be read: {error}. Name another one.") from error
    if problems:
        raise DataError(
            f"{path} must hold the weights of an encoder of this size; {len(problems)} tensors do not fit: "
            f"{'; '.join(problems[:5])}{' ...' * (len(problems) > 5)}. Name the file of another checkpoint."
        )
    return loaded

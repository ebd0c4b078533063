"""Bytes of idx, LIBSVM, npz and JSON files become arrays and records, or an error that says which is wrong, and where.

Nothing that a file says of its size is believed before it is compared with the bytes that are there, and no pickle is
read. `name` is always what the errors call the file.
"""

import array
import ast
import io
import json
import math
import reprlib
import zipfile
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from benchmarks.data.unpacking import UNREADABLE
from benchmarks.harness.errors import DataError

LARGEST = 2**28  # bytes of an array
HEADER = 2**12  # bytes of the description of an array
DRAWINGS = (20, 105, 105)  # drawers and pixels of a class of Omniglot
FIX = "Delete it, and run again to download it"


def idx(content: bytes, dimensions: int, name: str) -> np.ndarray:
    """Reads an idx file of bytes with so many dimensions."""
    start = 4 * (1 + dimensions)
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise DataError(
            f"{name}, an idx file, must start with 0, 0, 8, {dimensions} and {dimensions} sizes; got "
            f"{[*content[:4]]} and {len(content)} bytes in all. {FIX}."
        )
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    if len(content) != start + math.prod(shape) or math.prod(max(size, 1) for size in shape) > LARGEST:
        raise DataError(
            f"{name}, an idx file of shape {shape}, must have {start + math.prod(shape)} bytes; got {len(content)}. "
            f"{FIX}."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def sparse(content: bytes, features: int, name: str) -> tuple[csr_matrix, np.ndarray]:
    """Reads lines `label index:value …`, with indices 1 to `features` in ascending order; a # starts a comment."""
    labels, values, indices, ends = array.array("d"), array.array("d"), array.array("i"), array.array("q", [0])
    for number, line in enumerate(content.splitlines(), 1):
        if not (words := line.partition(b"#")[0].split()):
            continue
        try:
            label, pairs = float(words[0]), [word.split(b":") for word in words[1:]]
            columns, entries = [int(column) for column, _ in pairs], [float(entry) for _, entry in pairs]
        except ValueError:
            label, columns, entries = math.nan, [], []
        ascending = all(left < right for left, right in pairwise([0, *columns, features + 1]))
        if not (ascending and math.isfinite(label) and all(map(math.isfinite, entries))):
            raise DataError(
                f"{name}, line {number}, must be 'label index:value …' with finite numbers, and with indices from 1 to "
                f"{features} that ascend; got {reprlib.repr(line)}. {FIX}."
            )
        labels.append(label)
        values.extend(entries)
        indices.extend(column - 1 for column in columns)
        ends.append(len(values))
    rows = csr_matrix(
        (np.array(values, float), np.array(indices, np.int32), np.array(ends, np.int64)), (len(labels), features)
    )
    return rows, np.array(labels, float)


def _described(file: Any) -> tuple[dict[str, Any], int]:
    """What the head of an npy file of version 1 says, and how long it is."""
    head = file.read(10)
    size = int.from_bytes(head[8:], "little")
    if head[:8] != b"\x93NUMPY\x01\x00" or size > HEADER:
        raise ValueError(f"images.npy must be an npy file of version 1 with at most {HEADER} bytes of description")
    try:
        described = ast.literal_eval(file.read(size).decode("ascii"))
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:  # the last two: too many brackets
        raise ValueError(f"images.npy has no description: {type(error).__name__}") from error
    if not isinstance(described, dict) or {*described} != {"descr", "fortran_order", "shape"}:
        raise ValueError("images.npy must describe descr, fortran_order and shape")
    return described, 10 + size


def drawings(content: bytes, name: str) -> np.ndarray:
    """Reads the array `images` of an npz file, bool [class, 20, 105, 105]."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            member = archive.getinfo("images.npy")
            if member.file_size > LARGEST:
                raise ValueError(f"images.npy unpacks to {member.file_size} bytes, more than {LARGEST}")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"images.npy is compressed by method {member.compress_type}, which is not read")
            with archive.open(member) as file:
                described, size = _described(file)
                classes, rest = divmod(member.file_size - size, math.prod(DRAWINGS))
                expected = {"descr": "|b1", "fortran_order": False, "shape": (classes, *DRAWINGS)}
                if described != expected or rest:
                    raise ValueError(f"images.npy of {member.file_size} bytes is {reprlib.repr(described)}")
                numbers = np.frombuffer(file.read(), np.uint8)
        if numbers.size != classes * math.prod(DRAWINGS):
            raise ValueError(f"images.npy ends after {numbers.size} of {classes * math.prod(DRAWINGS)} pixels")
    except (
        *(ValueError, KeyError, zipfile.BadZipFile, *UNREADABLE),
        *(RuntimeError, NotImplementedError),  # encrypted, or of a version to come
    ) as error:
        raise DataError(
            f"{name} must be an npz file with images.npy, bool [class, 20, 105, 105] as numpy saves it: "
            f"{error or type(error).__name__}. {FIX}."
        ) from error
    return (numbers != 0).reshape(classes, *DRAWINGS)  # the published files hold 255 for true


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def records(content: bytes, name: str) -> Any:
    """Reads a JSON file."""
    try:
        return json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} must be JSON: {error}. {FIX}.") from error


def is_text(value: Any) -> bool:
    """Whether a value is a string that can be written, which one with half a surrogate pair cannot."""
    return isinstance(value, str) and not any("\ud800" <= mark <= "\udfff" for mark in value)


def is_int(value: Any, least: int, end: int) -> bool:
    """Whether a value is an int from `least` on and below `end`; truth values are none."""
    return type(value) is int and least <= value < end

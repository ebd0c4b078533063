"""What a reader on trial is, and how a file is damaged. Files are small; what they claim or unpack to is large."""

import bz2
import functools
import lzma
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Random = np.random.Generator
Packer = Callable[[bytes], bytes]

PACK: dict[str, Packer] = {
    ".gz": functools.partial(zlib.compress, wbits=31),
    ".bz2": bz2.compress,
    ".xz": functools.partial(lzma.compress, preset=0),
}


class Case(NamedTuple):
    """A reader on trial.

    Attributes:
      name: in the table.
      file: path of its file in the folder of data.
      good: the content of a file that it reads.
      read: reads the file at a path; returns whether what it read can be right.
      hostile: makes the content of a file, hostile in its form.
    """

    name: str
    file: str
    good: bytes
    read: Callable[[Path], bool]
    hostile: Callable[[Random], bytes]


def pick(random: Random, values: Sequence[Any]) -> Any:
    """One of them; what it is, it stays."""
    return values[int(random.integers(len(values)))]


def truncated(content: bytes, random: Random) -> bytes:
    """The first bytes of a file, not all of them."""
    return content[: random.integers(len(content))]


def flipped(content: bytes, random: Random) -> bytes:
    """A file with 1 to 16 bits flipped, as often at its front as anywhere."""
    changed, end = bytearray(content), len(content)
    for place in random.integers(min(end, 200) if random.random() < 0.5 else end, size=random.integers(1, 17)):
        changed[place] ^= 1 << random.integers(8)
    return bytes(changed)


@functools.cache
def zeros(suffix: str) -> bytes:
    """A bomb: 3 GB in 60 streams."""
    return PACK[suffix](bytes(5 * 10**7)) * 60


def greedy_xz(content: bytes) -> bytes:
    """An xz file that asks for a dictionary of 4 GiB."""
    packed = lzma.compress(content)
    head = packed[12:16] + bytes([40]) + packed[17:20]
    return packed[:12] + head + zlib.crc32(head).to_bytes(4, "little") + packed[24:]


KINDS: dict[str, Callable[[Case, Random], bytes]] = {
    "truncated": lambda case, random: truncated(case.good, random),
    "flipped": lambda case, random: flipped(case.good, random),
    "hostile": lambda case, random: case.hostile(random),
}

"""Packed files whose sha256 is known, and files of arrays: idx, LIBSVM, npz."""

import functools
import hashlib
import io
import lzma
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.data import download, readers
from benchmarks.robustness.hostile.making import PACK, Case, Random, flipped, greedy_xz, pick, zeros

PUBLISHED = np.random.default_rng(0).integers(97, 105, 6000, np.uint8).tobytes()


def _hostile_packed(suffix: str, random: Random) -> bytes:
    pack = PACK[suffix]
    made: list[Callable[[], bytes]] = [
        lambda: zeros(suffix),
        lambda: pack(b"") * 20_000,
        lambda: pack(PUBLISHED) + zeros(suffix),
        lambda: pack(PUBLISHED) * 200,
        lambda: pack(PUBLISHED + b"!"),
        lambda: pack(flipped(PUBLISHED, random)),
        lambda: pack(pack(PUBLISHED)),
        lambda: pack(PUBLISHED) + flipped(pack(PUBLISHED), random),
        lambda: PACK[pick(random, [*PACK])](PUBLISHED),
        lambda: greedy_xz(PUBLISHED),
        lambda: lzma.compress(PUBLISHED, lzma.FORMAT_ALONE),
        lambda: bytes(10**7),
    ]
    return pick(random, made)()


def _published(suffix: str) -> Case:
    name = f"fuzz/published{suffix}"
    source = download.Source(f"http://127.0.0.1:9/published{suffix}", 6000, hashlib.sha256(PUBLISHED).hexdigest())
    download.SOURCES[name.removesuffix(suffix)] = source

    def read(path: Path) -> bool:
        return download.fetch(name.removesuffix(suffix)) == PUBLISHED

    return Case(f"published {suffix}", name, PACK[suffix](PUBLISHED), read, functools.partial(_hostile_packed, suffix))


# Arrays


def _hostile_idx(random: Random) -> bytes:
    sizes = pick(
        random, [[2**32 - 1] * 3, [0, 2**32 - 1, 2**32 - 1], [2**16, 2**16, 1], [0, 0, 0], [1, 4, 5], [2, 3, 4]]
    )
    body = random.integers(0, 256, pick(random, [0, 1, 20, 24, 25, 10**6]), np.uint8).tobytes()
    front = bytes(pick(random, [[0, 0, 8, 3], [0, 0, 8, 255], [0, 0, 13, 3], [8, 0, 0, 3]]))
    return front + b"".join(int(size).to_bytes(4, "big") for size in sizes) + body


def _read_idx(path: Path) -> bool:
    array = readers.idx(path.read_bytes(), 3, path.name)
    return array.ndim == 3 and array.size == path.stat().st_size - 16


TOKENS = [
    "1",
    "-1",
    "1:1",
    "2:0.5",
    "4:1e3",
    "5:1",
    "0:1",
    "-1:2",
    "1:nan",
    "1:1e999",
    "nan",
    "inf",
    "9" * 5000 + ":1",
    "1:" + "9" * 5000,
    "99999999999:1",
    ":",
    "1:",
    ":1",
    "1:1:1",
    "qid:3",
    "1_0:1",
    "0x1:1",
    "\0",
    "#",
    "\x0b",
    "é:1",
    "+1",
    "\r",
    "3:-0",
]


def _hostile_libsvm(random: Random) -> bytes:
    lines = [" ".join(random.choice(TOKENS, random.integers(8))) for _ in range(random.integers(1, 20))]
    return "\n".join(lines).encode() * pick(random, [1, 1, 1, 1, 500])


def _read_libsvm(path: Path) -> bool:
    rows, labels = readers.sparse(path.read_bytes(), 4, path.name)
    rows.check_format()
    return bool(rows.shape == (len(labels), 4) and np.isfinite(rows.data).all() and np.isfinite(labels).all())


def _npy(description: str, body: bytes, version: int = 1) -> bytes:
    head = description.encode().ljust(118)
    return b"\x93NUMPY" + bytes([version, 0]) + len(head).to_bytes(2 if version == 1 else 4, "little") + head + body


def _zipped(members: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w", method, compresslevel=1) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


PLAIN = "{'descr': '|b1', 'fortran_order': False, 'shape': (1, 20, 105, 105), }"
PIXELS = bytes(20 * 105 * 105)
DESCRIPTIONS = [
    PLAIN,
    PLAIN.replace("(1,", "(99999999999999999,"),
    PLAIN.replace("(1,", "(-1,"),
    PLAIN.replace("(1,", "(1.5,"),
    PLAIN.replace("(1,", "(True,"),
    PLAIN.replace("|b1", "|O"),
    PLAIN.replace("|b1", "|V2000000000"),
    PLAIN.replace("False", "True"),
    PLAIN.replace("'|b1'", "[('a', '|b1')]"),
    "(" * 3000,
    "-" * 3000 + "1",
    "{" + "[" * 900 + "]" * 900 + ": 1}",
    "{'descr': '|b1'}",
    "__import__('os').abort()",
    "9" * 3500,
    "",
    "\0",
]


@functools.cache
def _npz_bomb() -> bytes:
    return _zipped([("images.npy", _npy(PLAIN.replace("(1,", "(1361,"), bytes(1361 * len(PIXELS))))])


def _hostile_npz(random: Random) -> bytes:
    if random.random() < 0.04:
        return _npz_bomb()
    body = PIXELS[: pick(random, [len(PIXELS), len(PIXELS), 0, 7])]
    content = _npy(pick(random, DESCRIPTIONS), body, pick(random, [1, 1, 1, 2, 3]))
    name = pick(random, ["images.npy"] * 6 + ["../images.npy", "/images.npy", "images", "images.npy/"])
    method = pick(random, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    packed = _zipped([(name, content)] * pick(random, [1, 1, 1, 3]), method)
    end = len(packed)
    return packed if random.random() < 0.5 else packed[: end - 100] + flipped(packed[end - 100 :], random)


def _read_npz(path: Path) -> bool:
    array = readers.drawings(path.read_bytes(), path.name)
    return array.dtype == bool and array.shape[1:] == (20, 105, 105)


ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
IDX = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in ARRAY.shape) + ARRAY.tobytes()
CASES = [
    *map(_published, PACK),
    Case("idx", "fuzz/images-idx3-ubyte", IDX, _read_idx, _hostile_idx),
    Case("LIBSVM", "fuzz/rows", b"-1 1:0.5 3:2e0\n+1 2:-1 # said\n2\n" * 20, _read_libsvm, _hostile_libsvm),
    Case("npz", "fuzz/images.npz", _zipped([("images.npy", _npy(PLAIN, PIXELS))]), _read_npz, _hostile_npz),
]

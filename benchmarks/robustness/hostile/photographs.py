"""JPEG and PNG files, and archives of them."""

import functools
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.data import photos
from benchmarks.robustness.hostile.making import PACK, Case, Random, flipped, greedy_xz, pick, truncated, zeros

SIDE = 32  # pixels


def _image(form: str, side: int = SIDE, **options: Any) -> bytes:
    file = io.BytesIO()
    shades = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(shades).save(file, form, **options)
    return file.getvalue()


def _chunk(kind: bytes, content: bytes, claimed: int | None = None) -> bytes:
    size = len(content) if claimed is None else claimed
    return size.to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


@functools.cache
def _bomb() -> bytes:
    return zlib.compress(bytes(10**8), 1)


def _hostile_png(random: Random) -> bytes:
    good = _image("PNG")
    width, height = (int(pick(random, [SIDE, SIDE, 0, 2**31 - 1, 50_000])) for _ in range(2))
    kinds = bytes(int(pick(random, [0, 1, 2, 3, 6, 8, 16, 255])) for _ in range(5))
    head = (
        width.to_bytes(4, "big")
        + height.to_bytes(4, "big")
        + pick(random, [b"\x08\x02\0\0\0", b"\x08\x02\0\0\1", kinds])
    )
    bomb = _bomb()
    between = [
        b"",
        _chunk(b"zTXt", b"a\0\0" + bomb),
        _chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
        _chunk(b"iCCP", b"a\0\0" + bomb),
        _chunk(b"PLTE", bytes(7)),
        _chunk(b"tRNS", bytes(3)),
        _chunk(b"acTL", (2**31).to_bytes(4, "big") * 2),
        _chunk(b"eXIf", b"II*\0" + b"\xff" * 40),
        _chunk(b"tEXt", b"a\0b", 2**31 - 1),
        _chunk(b"pHYs", b""),
        _chunk(b"IDAT", bomb[:1000]),
    ]
    return good[:8] + _chunk(b"IHDR", head) + pick(random, between) + good[33:]


def _hostile_jpeg(random: Random) -> bytes:
    good = _image("JPEG", progressive=bool(random.integers(2)))
    frame = max(good.find(b"\xff\xc0"), good.find(b"\xff\xc2"))
    sides = b"".join(int(pick(random, [SIDE, 0, 65_535, 20_000])).to_bytes(2, "big") for _ in range(2))
    segment = b"\xff" + bytes([pick(random, [0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xDB, 0xC4, 0xDD, 0xFE])])
    content = pick(
        random, [b"Exif\0\0II*\0" + b"\xff" * 30, b"MPF\0" + bytes(20), b"Photoshop 3.0\x008BIM" + b"\xff" * 9, b""]
    )
    size = pick(random, [len(content) + 2, 0, 1, 65_535])
    made = [
        lambda: good[: frame + 5] + sides + good[frame + 9 :],
        lambda: good[:2] + segment + size.to_bytes(2, "big") + content + good[2:],
        lambda: good[:2] + good[2:] * 3,
        lambda: _image(pick(random, ["GIF", "BMP", "TIFF", "PPM", "WEBP", "ICO", "PDF", "TGA", "EPS"])),
        lambda: _image("JPEG", 300),
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n",
    ]
    return pick(random, made)()


def _read_image(path: Path) -> bool:
    return np.asarray(photos.picture(path.read_bytes(), SIDE, path.name)).shape == (SIDE, SIDE, 3)


def _tar(members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, content in members:
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **more: Any) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    for key, value in more.items():
        setattr(member, key, value)
    return member


def _claimed(name: str, size: int, kind: bytes, content: bytes = b"") -> bytes:
    """A head that claims so many bytes, before as many as there are."""
    return _member(name, size, kind).tobuf(tarfile.GNU_FORMAT) + content.ljust(
        -len(content) % 512 + len(content), b"\0"
    )


KINDS = [
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    tarfile.CONTTYPE,
    b"Z",
    tarfile.DIRTYPE,
]
PAX = [
    {"size": "99999999999999"},
    {"size": "-1"},
    {"size": "x"},
    {"path": "../../escaped.jpg"},
    {"path": "/tmp/escaped.jpg"},
    {"path": ""},
    {"GNU.sparse.map": "0,99999999999", "GNU.sparse.realsize": "99999999999"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 20},
    {"mtime": "nan"},
    {"uid": "9" * 5000},
    {"hdrcharset": "BINARY", "path": "\udcff.jpg"},
]
PHOTO = _image("JPEG")
ALBUM = [(_member(f"test/cat/{number}.jpg", len(PHOTO)), PHOTO) for number in range(3)]


@functools.cache
def _many_members() -> bytes:
    return lzma.compress(_claimed("", 0, tarfile.DIRTYPE) * (photos.MEMBERS + 1), preset=0)


def _hostile_tar(random: Random) -> bytes:
    where = pick(random, ["/tmp/escaped.jpg", "../escaped.jpg", "test/../../escaped.jpg", "test/cat/link.jpg"])
    lines = [b"30 path=a.jpg\n", b"9999999999 path=a.jpg\n", b"-1 a=b\n", b"0 a=b\n", b"a=b\n", b"9 size=1\n" * 9]
    large = int(pick(random, [2**20, 2**33 - 1, 2**60, 600]))
    made: list[Callable[[], bytes]] = [
        lambda: _tar([*ALBUM, (_member(where, 0, pick(random, KINDS), linkname="/etc/passwd"), b"")]),
        lambda: _tar([*ALBUM, (_member(where, len(PHOTO)), PHOTO)]),
        lambda: _tar([(_member("test/cat/0.jpg", len(PHOTO), pax_headers=pick(random, PAX)), PHOTO)]),
        lambda: _claimed("test/cat/0.jpg", large, pick(random, [b"0", b"L", b"K", b"x", b"g", b"S", b"5"]), PHOTO),
        lambda: (
            _claimed("head", len(body := pick(random, lines)), pick(random, [b"x", b"g", b"L"]), body) + _tar(ALBUM)
        ),
        lambda: _tar([(_member("test/cat/0.jpg", 10**5), bytes(10**5))]),
        lambda: flipped(_tar(ALBUM)[:600], random) + _tar(ALBUM)[600:],
        lambda: flipped(_tar(ALBUM), random),
        lambda: truncated(_tar(ALBUM), random),
    ]
    if random.random() < 0.04:
        return pick(random, [zeros(".xz"), _many_members(), greedy_xz(_tar(ALBUM)), zeros(".gz")])
    return lzma.compress(pick(random, made)(), preset=0)


def _read_tar(path: Path) -> bool:
    return all(name.endswith(".jpg") and ".." not in name for name in photos.members(path))


CASES = [
    Case("tar.xz", "fuzz/photos.tar.xz", PACK[".xz"](_tar(ALBUM)), _read_tar, _hostile_tar),
    Case("JPEG", "fuzz/photo.jpg", PHOTO, _read_image, _hostile_jpeg),
    Case("PNG", "fuzz/photo.png", _image("PNG"), _read_image, _hostile_png),
]

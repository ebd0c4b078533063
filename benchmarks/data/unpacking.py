"""Compressed bytes become what was compressed, and never more than is asked for."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any

SLACK = 2**12  # bytes that a compressed file may be larger than its content
STREAMS = 100  # that may lie one after the other in a file
MEMORY = 2**27  # bytes that an xz decoder may take
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)

# By how a file ends: what unpacks the first stream of its bytes.
DECODERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY),
}
SUFFIXES = ("", *DECODERS)


def unpacked(packed: bytes, suffix: str, most: int) -> bytes:
    """The content of a compressed file, or the first bytes of it.

    Args:
      packed: the whole file.
      suffix: how it is compressed, one of SUFFIXES.
      most: bytes that are unpacked at most.

    Returns:
      All of the content, if it is no longer than `most`; what is cut off is not looked at.

    Raises:
      EOFError, OSError, zlib.error, lzma.LZMAError: if the file is damaged; all are in UNREADABLE.
    """
    if not suffix:
        return packed[:most]
    content, streams = b"", 0
    while packed and len(content) < most:
        streams += 1
        if streams > STREAMS:
            raise EOFError(f"it has more than {STREAMS} streams")
        decoder = DECODERS[suffix]()
        content += decoder.decompress(packed, most - len(content))
        if len(content) == most:
            break
        if not decoder.eof:
            raise EOFError(f"the file ends within a stream, after {len(content)} bytes of content")
        packed = decoder.unused_data.lstrip(b"\0")
    return content

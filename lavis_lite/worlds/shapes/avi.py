"""Clips as AVI files of JPEG frames (MJPEG), which every decoder reads: no video encoder is needed to write them."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

from PIL import Image

HAS_INDEX = 0x10  # avih's flag
KEY_FRAME = 0x10  # idx1's flag: every JPEG stands alone


def jpeg(picture: Image.Image, *, quality: int = 90) -> bytes:
    """A frame's JPEG with full-resolution colour."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality, subsampling=0)
    return data.getvalue()


def avi(frames: Sequence[bytes], *, size: tuple[int, int], fps: int = 8) -> bytes:
    """The file's content.

    Args:
        frames: JPEGs of the same size. size: their width and height in pixels.
    """
    width, height = size
    longest = max(map(len, frames))
    main = struct.pack("<14I", 1_000_000 // fps, longest * fps, 0, HAS_INDEX, len(frames), 0, 1, longest,
                       width, height, 0, 0, 0, 0)  # fmt: skip
    stream = struct.pack("<4s4sIHHIIIIIIII4H", b"vids", b"MJPG", 0, 0, 0, 0, 1, fps, 0, len(frames), longest,
                         0xFFFFFFFF, 0, 0, 0, width, height)  # fmt: skip
    bitmap = struct.pack("<IIIHH4sIIIII", 40, width, height, 1, 24, b"MJPG", width * height * 3, 0, 0, 0, 0)
    header = _list(
        b"hdrl", _chunk(b"avih", main) + _list(b"strl", _chunk(b"strh", stream) + _chunk(b"strf", bitmap))
    )
    chunks = [_chunk(b"00dc", frame) for frame in frames]
    entries, offset = [], 4  # offsets count from the list's name
    for frame, chunk in zip(frames, chunks, strict=True):
        entries.append(struct.pack("<4sIII", b"00dc", KEY_FRAME, offset, len(frame)))
        offset += len(chunk)
    body = header + _list(b"movi", b"".join(chunks)) + _chunk(b"idx1", b"".join(entries))
    return _chunk(b"RIFF", b"AVI " + body)


def _chunk(name: bytes, content: bytes) -> bytes:
    """A chunk with its length; the padding to even lengths isn't counted in it."""
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _list(name: bytes, content: bytes) -> bytes:
    return _chunk(b"LIST", name + content)

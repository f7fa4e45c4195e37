"""Small mp4 files with H.264 that tests write themselves: uncompressed macroblocks, key frames and frames between.

Baseline profile: a key frame has the samples of all its macroblocks (I_PCM); a frame between them those of its left
half, and skips the right half, which keeps what the key frame shows. So what is seen depends on where decoding began.
"""

from __future__ import annotations

import struct
from pathlib import Path

STEP = 20  # as of `clip_helpers`: by so much of 255 a frame is brighter than the one before
BLOCK = 16
RATE = 10  # frames a second


def save_mp4(path: Path, *, frames: int = 10, blocks: tuple[int, int] = (4, 2), every: int = 4) -> Path:
    """A clip whose left half tells a frame's number, and the right half that of the key frame, of which each `every`th
    is one. blocks: macroblocks across and down, an even number across."""
    pictures = [_picture(number, blocks, every) for number in range(frames)]
    keys = [number + 1 for number in range(0, frames, every)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_mp4([struct.pack(">I", len(one)) + one for one in pictures], keys, blocks))
    return path


# --- H.264 --------------------------------------------------------------------------------------------------


class _Bits:
    """Bits of a NAL unit's payload."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.length = 0

    def put(self, value: int, width: int) -> None:
        self.text.append(f"{value:0{width}b}")
        self.length += width

    def golomb(self, *values: int) -> None:
        """Unsigned Exp-Golomb codes; that of 0 is also the signed one."""
        for value in values:
            width = (value + 1).bit_length()
            self.put(value + 1, 2 * width - 1)

    def align(self) -> None:
        if self.length % 8:
            self.put(0, 8 - self.length % 8)

    def unit(self, header: int) -> bytes:
        """The unit with its end, zeros escaped."""
        self.put(1, 1)
        self.align()
        payload = int("".join(self.text), 2).to_bytes(self.length // 8, "big")
        escaped = bytearray([header])
        zeros = 0
        for byte in payload:
            if zeros >= 2 and byte <= 3:
                escaped.append(3)
                zeros = 0
            escaped.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return bytes(escaped)


def _sequence(blocks: tuple[int, int]) -> bytes:
    bits = _Bits()
    bits.put(66 << 16 | 0xC0 << 8 | 20, 24)  # baseline, level 2
    bits.golomb(0, 4, 2, 1)  # number, 8 bits of frame_num, order of output is that of decoding, one reference
    bits.put(0, 1)
    bits.golomb(blocks[0] - 1, blocks[1] - 1)
    bits.put(0b1100, 4)  # frames, 8x8 inference, no cropping, no more
    return bits.unit(0x67)


def _parameters() -> bytes:
    bits = _Bits()
    bits.golomb(0, 0)
    bits.put(0, 2)
    bits.golomb(0, 0, 0)
    bits.put(0, 3)
    bits.golomb(0, 0, 0)
    bits.put(0b100, 3)  # slices say whether edges are smoothed
    return bits.unit(0x68)


def _picture(number: int, blocks: tuple[int, int], every: int) -> bytes:
    key = number % every == 0
    bits = _Bits()
    bits.golomb(0, 7 if key else 5, 0)
    bits.put(0 if key else number % every, 8)
    if key:
        bits.golomb(number % 2)
        bits.put(0, 2)
    else:
        bits.put(0, 3)
    bits.golomb(0, 1)  # quality as it is, edges not smoothed
    luma = 16 + round((STEP * number + 10) * 219 / 255)
    samples = bytes([luma] * BLOCK * BLOCK + [128] * (BLOCK * BLOCK // 2))
    skipped = 0
    for place in range(blocks[0] * blocks[1]):
        if not key and place % blocks[0] >= blocks[0] // 2:
            skipped += 1
            continue
        bits.golomb(*([25] if key else [skipped, 30]))
        skipped = 0
        bits.align()
        bits.put(int.from_bytes(samples, "big"), 8 * len(samples))
    if skipped:
        bits.golomb(skipped)
    return bits.unit(0x65 if key else 0x41)


# --- mp4 ----------------------------------------------------------------------------------------------------


def _box(name: str, *content: bytes) -> bytes:
    data = b"".join(content)
    return struct.pack(">I", len(data) + 8) + name.encode() + data


def _full(name: str, *content: bytes, flags: int = 0) -> bytes:
    return _box(name, struct.pack(">I", flags), *content)


def _numbers(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def _mp4(samples: list[bytes], keys: list[int], blocks: tuple[int, int]) -> bytes:
    width, height = blocks[0] * BLOCK, blocks[1] * BLOCK
    sequence, parameters = _sequence(blocks), _parameters()
    start = _box("ftyp", b"isom", _numbers(512), b"isomavc1mp41")
    first = len(start) + 8
    matrix = _numbers(1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    configuration = _box(
        "avcC",
        bytes([1, 66, 0xC0, 20, 0xFF, 0xE1]),
        struct.pack(">H", len(sequence)) + sequence,
        bytes([1]) + struct.pack(">H", len(parameters)) + parameters,
    )
    entry = _box(
        "avc1",
        bytes(6) + struct.pack(">H", 1) + bytes(16) + struct.pack(">HH", width, height),
        _numbers(72 << 16, 72 << 16, 0) + struct.pack(">H", 1) + bytes(32) + struct.pack(">Hh", 24, -1),
        configuration,
    )
    table = _box(
        "stbl",
        _full("stsd", _numbers(1), entry),
        _full("stts", _numbers(1, len(samples), 1)),
        _full("stss", _numbers(len(keys), *keys)),
        _full("stsc", _numbers(1, 1, len(samples), 1)),
        _full("stsz", _numbers(0, len(samples), *map(len, samples))),
        _full("stco", _numbers(1, first)),
    )
    media = _box(
        "minf",
        _full("vmhd", bytes(8), flags=1),
        _box("dinf", _full("dref", _numbers(1), _full("url ", flags=1))),
        table,
    )
    track = _box(
        "trak",
        _full(
            "tkhd",
            _numbers(0, 0, 1, 0, len(samples)),
            bytes(16),
            matrix,
            _numbers(width << 16, height << 16),
            flags=3,
        ),
        _box(
            "mdia",
            _full("mdhd", _numbers(0, 0, RATE, len(samples)), struct.pack(">HH", 0x55C4, 0)),
            _full("hdlr", bytes(4) + b"vide" + bytes(12) + b"clip\0"),
            media,
        ),
    )
    header = _full(
        "mvhd", _numbers(0, 0, RATE, len(samples), 1 << 16, 1 << 24), bytes(8), matrix, bytes(24), _numbers(2)
    )
    return start + _box("mdat", *samples) + _box("moov", header, track)

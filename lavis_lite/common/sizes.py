"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)


def parse_bytes(size: int | str, *, binary: bool = False) -> int:
    """A number of bytes from a whole number or a text such as 500MB, 1.5 TB, 16g or 20GiB.

    binary: MB, GB and so on are powers of 1024 too, as the memory of GPUs is named.

    Raises ValueError for anything else, or a number below zero.
    """
    match = _SIZE.fullmatch(str(size))
    # An i stands between a letter and B.
    if match is None or (match[3] and not (match[2] and match[4])):
        raise ValueError(f"expected a number of bytes such as 500MB or 20GB, got {size!r}")
    base = 1024 if binary or match[3] else 1000
    return round(float(match[1]) * base ** _POWERS[match[2].upper()])


def show_bytes(count: int) -> str:
    """A number of bytes with three digits: 512 B, 16.4 kB, 1.31 GB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"

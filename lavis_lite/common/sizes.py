"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(size: int | str) -> int:
    """A number of bytes from a whole number or a text such as 500MB, 1.5 TB or 20GiB.

    Raises ValueError for anything else, or a number below zero.
    """
    match = _SIZE.fullmatch(str(size))
    unit = (match[2].upper() or "B") if match else ""
    if match is None or unit not in UNITS:
        raise ValueError(f"expected a number of bytes such as 500MB or 20GB, got {size!r}")
    return round(float(match[1]) * UNITS[unit])


def show_bytes(count: int) -> str:
    """A number of bytes with three digits: 512 B, 16.4 kB, 1.31 GB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"

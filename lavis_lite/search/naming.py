"""Which images somebody means by a name or a pattern."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Sequence

from lavis_lite.search.sources import short_name


def find_rows(names: Iterable[tuple[int, str]], wanted: Sequence[str]) -> list[list[int]]:
    """The rows of the images that each of `wanted` means, in the order of `names`, (row, name).

    Those of that very name, whole or from some folder or the tar file on; only where there is none it is a pattern
    (`*`, `?` and `[..]` as in a shell): `ph[1].png` is a file's name, too.
    """
    equal: list[list[int]] = [[] for _ in wanted]
    fitting: list[list[int]] = [[] for _ in wanted]
    for row, name in names:
        shown = short_name(name)
        for number, one in enumerate(wanted):
            if shown == one or shown.endswith((f"/{one}", f"::{one}")):
                equal[number].append(row)
            elif _fits(shown, one):
                fitting[number].append(row)
    return [same or fit for same, fit in zip(equal, fitting, strict=True)]


def _fits(name: str, pattern: str) -> bool:
    """Whether a name, or its end from some folder or the tar file on, fits a pattern."""
    patterns = (pattern,) if os.path.isabs(pattern) else (f"*/{pattern}", f"*::{pattern}")
    return any(fnmatch.fnmatchcase(name, whole) for whole in patterns)

"""The disk space that stored features take: estimated, and asked for before any is taken."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from lavis_lite.common import dist
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.feature_config import FeatureConfig
from lavis_lite.common.sizes import show_bytes
from lavis_lite.datasets.feature_store import FeatureStore


def agree(settings: FeatureConfig, found: Sequence[tuple[FeatureStore, Sequence[int]]]) -> None:
    """Ask for the disk space that stores take, or look it up in run.features.max_bytes.

    found: stores and their missing files; nothing is asked where none is.
    Raises ConfigError when it is too much or nobody agrees, DataError when the disk hasn't got it.
    """
    needed = sum(store.size(missing) for store, missing in found)
    if not needed:
        return
    total = sum(store.size() for store, _ in found)
    what = " + ".join(str(store) for store, missing in found if missing)
    want = f"stored features take {show_bytes(total)} ({what})"
    less = "fewer run.features.views or run.features.precision=int8 take less"
    limit = settings.limit
    if limit is not None:
        if total > limit:
            raise ConfigError(
                f"run.features.max_bytes: {want}, more than the {show_bytes(limit)} allowed; raise it, or: {less}"
            )
    elif not _terminal_agrees(f"{want} in {found[0][0].folder.parent}"):
        raise ConfigError(
            f"run.cache_features: {want}; agree to that with run.features.max_bytes={_rounded_up(total)}, or: {less}"
        )
    free = shutil.disk_usage(found[0][0].folder).free
    if needed > free:
        raise DataError(
            f"{want}, of which {show_bytes(needed)} are missing, and the disk of {found[0][0].folder.parent} has "
            f"{show_bytes(free)} left; set run.features.folder to another, or: {less}"
        )


def _rounded_up(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{-(-count * 10 // size) / 10:g}{unit}"
    return str(count)


def _terminal_agrees(want: str) -> bool:
    """Ask on a terminal; without one nobody agrees."""
    if dist.world_size() > 1 or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"{want}. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")

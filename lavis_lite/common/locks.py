"""One process at a time: a lock that a killed process does not leave behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lavis_lite.common.logging import get_logger

logger = get_logger(__name__)


@contextlib.contextmanager
def locked(path: str | Path, *, what: str) -> Iterator[None]:
    """Hold the lock of a file within the block; while another process holds it, say so (`what`) and wait.

    The system releases it when its process ends, however that ends. Nothing is locked where the system has no such
    locks (Windows), or in a folder that this process may only read.
    """
    try:
        import fcntl

        file = open(path, "a")  # noqa: SIM115  # closed below
    except (ImportError, PermissionError):
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that %s", what)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

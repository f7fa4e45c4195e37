"""One process at a time: a lock that a killed process does not leave behind."""

from __future__ import annotations

import contextlib
import errno
import functools
from collections.abc import Iterator
from pathlib import Path

from lavis_lite.common.logging import get_logger

logger = get_logger(__name__)

# What file systems without locks answer: some NFS, Lustre mounted without them.
UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


class Busy(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: str | Path, *, what: str, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file within the block; while another process holds it, say so (`what`) and wait.

    Args:
        wait: False: raise Busy instead.

    The system releases it when its process ends, however that ends. Nothing is locked where the system has no such
    locks (Windows), in a folder that this process may only read, or, with a warning, on a file system without them.
    """
    try:
        import fcntl

        file = open(path, "a")  # noqa: SIM115  # closed below
    except (ImportError, PermissionError):
        yield
        return

    def take(blocking: bool) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            _warn_unlocked(str(Path(path).parent), error.strerror)
        return True

    with file:
        if not take(blocking=False):
            if not wait:
                raise Busy(f"another process {what}")
            logger.info("waiting for another process that %s", what)
            take(blocking=True)
        yield


@functools.cache  # said once
def _warn_unlocked(folder: str, reason: str) -> None:
    logger.warning(
        "'%s': its file system has no locks (%s): let no two processes write there at once", folder, reason
    )

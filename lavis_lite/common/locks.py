"""One process at a time: a lock that a killed process does not leave behind."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lavis_lite.common.logging import get_logger

logger = get_logger(__name__)

# What file systems without locks answer: some NFS, Lustre mounted without them.
UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
# Of a folder that this process may only read.
READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
# To wait for where the holder may just have been killed: it, and workers that write for it, take a while to be gone.
GRACE_SECONDS = 3.0


class Busy(Exception):
    """Another process holds the lock."""


# Held by this process and not by those that it forks.
_own: set[io.FileIO] = set()


@contextlib.contextmanager
def locked(
    path: str | Path, *, what: str, wait: bool | float = True, with_children: bool = True
) -> Iterator[None]:
    """Hold the lock of a file within the block; while another process holds it, say so (`what`) and wait.

    Args:
        wait: seconds after which to raise Busy instead; False: at once.
        with_children: whether processes that are forked within the block hold it, too, until the last has ended.

    The system releases it when its process ends, however that ends; the file stays, empty where all went well. Nothing
    is locked where the system has no such locks (Windows), in a folder that this process may only read, or, with a
    warning, on a file system without them.
    """
    file = _opened(Path(path))
    if file is None:
        yield
        return
    with file:
        if not _take(file, blocking=False):
            _outwait(file, what, math.inf if wait is True else float(wait))
        _note(file, f"process {os.getpid()} on {socket.gethostname()}\n")
        if not with_children:
            _own.add(file)
        try:
            yield
        finally:
            _own.discard(file)
            _note(file, "")


@contextlib.contextmanager
def held(
    path: str | Path,
    *,
    what: str,
    refused: Callable[[str], Exception],
    wait: bool | float,
    with_children: bool = True,
) -> Iterator[None]:
    """`locked`, where a lock that another process keeps is an error: what `refused` makes of the words for it."""
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(locked(path, what=what, wait=wait, with_children=with_children))
        except Busy as error:
            raise refused(str(error)) from error
        yield


def _opened(path: Path) -> io.FileIO | None:
    try:
        import fcntl  # noqa: F401

        return open(path, "ab", buffering=0)
    except ImportError:
        return None
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        return None


def _take(file: io.FileIO, *, blocking: bool) -> bool:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_unlocked(str(Path(str(file.name)).parent), error.strerror)
    return True


def _outwait(file: io.FileIO, what: str, seconds: float) -> None:
    """Take a lock that another process holds, when it is free; Busy where it still isn't after so many seconds."""
    if seconds == math.inf:
        logger.info("waiting for another process that %s%s", what, _holder(file))
        _take(file, blocking=True)
        return
    deadline = time.monotonic() + seconds
    while not _take(file, blocking=False):
        if time.monotonic() >= deadline:
            raise Busy(f"another process {what}{_holder(file)}")
        time.sleep(0.1)


def _note(file: io.FileIO, holder: str) -> None:
    """Leave in a lock's file who holds it; nothing happens where the disk is full, or a child has closed the file."""
    with contextlib.suppress(OSError, ValueError):
        file.truncate(0)
        file.write(holder.encode())


def _holder(file: io.FileIO) -> str:
    """Who says to hold a lock, in brackets; nothing where that can't be read."""
    try:
        lines = Path(str(file.name)).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return f" ({lines[0][:100]})" if lines else ""


def _leave_to_parent() -> None:
    for file in _own:
        file.close()
    _own.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


@functools.cache  # said once
def _warn_unlocked(folder: str, reason: str) -> None:
    logger.warning(
        "'%s': its file system has no locks (%s): let no two processes write there at once", folder, reason
    )

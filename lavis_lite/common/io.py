"""Files: where caches live, and writing that is complete or absent, never half done."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from lavis_lite.common.errors import ConfigError

TEMPORARY = ".tmp-"
# What a folder is called from when it lost its name to its successor until it is gone.
REPLACED = f"{TEMPORARY}replaced-"
# More files than this are flushed to the disk together.
MANY_FILES = 256


def cache_dir() -> Path:
    """Where generated and downloaded files go: $LAVIS_LITE_CACHE, else ~/.cache/lavis_lite; not created."""
    folder = os.environ.get("LAVIS_LITE_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "lavis_lite"


def _temporary(path: Path) -> Path:
    return path.with_name(
        f"{TEMPORARY}{path.name}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    )


def _sync(path: Path) -> None:
    """Flush a file's or folder's contents to the disk, where the system can do that for it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(paths: list[Path]) -> None:
    # One by one took two minutes for 20,000 pictures; for that many, wait for the whole disk once.
    if len(paths) > MANY_FILES and hasattr(os, "sync"):
        os.sync()
        return
    for path in paths:
        _sync(path)


def check_writable(path: str | Path, *, where: str) -> None:
    """Make the folder of a file that will be written later; an old file of that name stays as it is.

    Raises ConfigError, with the option that named the file, for a folder and where nothing may be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{where}: no folder '{path.parent}' can be made: {error.strerror}") from error
    if path.is_dir():
        raise ConfigError(f"{where}: '{path}' is a folder; name a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{where}: '{path}' may not be written to")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file's path; the file written there becomes `path` when the block ends without error.

    Readers, and a crash at any moment, see the old or the new content only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write a file so that readers, and a crash at any moment, see the old or the new content only.

    Text is written as UTF-8. Raises OSError, with the old file intact, when the disk is full.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_dir(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, and vanishes when the block fails.

    When `path` exists by then, it is kept (another process was first with the same content), unless
    `replace`. Files are on the disk before the folder gets its name, so that after a power cut or SIGKILL
    `path` is complete or absent; a left-over temporary folder is removed by `remove_leftovers`. An old
    folder loses its name before the new one gets it: after a crash between the two `remove_leftovers` gives it back.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        _sync_all([temporary, *temporary.rglob("*")])
        _move_into_place(temporary, path, replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(path.parent)


def _move_into_place(temporary: Path, path: Path, replace: bool) -> None:
    if replace and path.exists():
        old = path.with_name(f"{REPLACED}{uuid.uuid4().hex[:8]}-{path.name}")
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            # Of two errors the first is told; remove_leftovers tries again.
            with contextlib.suppress(OSError):
                os.rename(old, path)
            raise
        with contextlib.suppress(OSError):
            shutil.rmtree(_never_restored(old, path), ignore_errors=True)
        return
    try:
        os.rename(temporary, path)
    except OSError:
        if not path.is_dir():
            raise


def _never_restored(old: Path, path: Path) -> Path:
    """Give a replaced folder another name before it is deleted: what is left of it must not be `path` again."""
    discarded = _temporary(path)
    os.rename(old, discarded)
    return discarded


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Remove what interrupted writes left in `folder`, which no other process may be writing to now; the removed paths.

    A folder that was to be replaced, and whose successor never got its name, has it again.
    """
    for path in Path(folder).glob(f"{REPLACED}*"):
        name = path.with_name(path.name.removeprefix(REPLACED).split("-", 1)[1])
        if not name.exists():
            os.rename(path, name)
        else:
            _never_restored(path, name)
    leftovers = sorted(Path(folder).glob(f"{TEMPORARY}*"))
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return leftovers

"""Locks of files: one holder, others that wait or that don't wait."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import threading
from pathlib import Path

import pytest
from data_helpers import warnings_logged

from lavis_lite.common.locks import Busy, locked


def test_who_does_not_wait_is_told_who_holds(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock", what="works"),
        pytest.raises(Busy, match="another process works"),
        locked(tmp_path / "lock", what="works", wait=False),
    ):
        pass
    with locked(tmp_path / "lock", what="works", wait=False):
        pass


def test_who_waits_has_the_lock_when_its_holder_lets_go(tmp_path: Path) -> None:
    holder = contextlib.ExitStack()
    holder.enter_context(locked(tmp_path / "lock", what="works"))
    free = threading.Event()
    threading.Timer(0.3, lambda: (free.set(), holder.close())).start()
    with locked(tmp_path / "lock", what="works"):
        assert free.is_set()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*args: object) -> None:
        raise OSError(number, "not there")

    monkeypatch.setattr(fcntl, "flock", flock)
    with warnings_logged() as lines:
        for _ in range(2):
            with locked(tmp_path / "lock", what="works", wait=False):
                pass
    assert lines == [
        f"'{tmp_path}': its file system has no locks (not there): let no two processes write there at once"
    ]
    number = errno.EIO
    with pytest.raises(OSError, match="not there"), locked(tmp_path / "lock", what="works"):
        pass

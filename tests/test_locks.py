"""Locks of files: one holder, others that wait or that don't wait."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import threading
import time
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


def test_who_waits_for_seconds_is_told_which_process_holds(tmp_path: Path) -> None:
    holder = contextlib.ExitStack()
    holder.enter_context(locked(tmp_path / "lock", what="works"))
    began = time.monotonic()
    this = rf"another process works \(process {os.getpid()} on {socket.gethostname()}\)$"
    with pytest.raises(Busy, match=this), locked(tmp_path / "lock", what="works", wait=0.2):
        pass
    assert time.monotonic() - began >= 0.2
    threading.Timer(0.3, holder.close).start()
    with locked(tmp_path / "lock", what="works", wait=60.0):
        pass
    assert (tmp_path / "lock").read_text() == ""


@pytest.mark.parametrize("with_children", [True, False])
def test_a_killed_process_leaves_its_lock_to_children_or_to_nobody(
    tmp_path: Path, with_children: bool
) -> None:
    read, write = os.pipe()
    if (parent := os.fork()) == 0:
        with locked(tmp_path / "lock", what="works", with_children=with_children):
            if (child := os.fork()) == 0:
                signal.pause()
            os.write(write, str(child).encode())
            signal.pause()
    child = int(os.read(read, 20))
    try:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        expected = (
            pytest.raises(Busy, match=f"process {parent} on") if with_children else contextlib.nullcontext()
        )
        with expected, locked(tmp_path / "lock", what="works", wait=0.0 if with_children else 5.0):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_nothing_is_locked_in_a_folder_that_may_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (errno.EACCES, errno.EROFS):
        monkeypatch.setattr("builtins.open", lambda *_, number=number, **__: _refuse(number))
        with locked(tmp_path / "lock", what="works"):
            pass
    monkeypatch.setattr("builtins.open", lambda *_, **__: _refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"), locked(tmp_path / "lock", what="works"):
        pass


def _refuse(number: int) -> None:
    raise OSError(number, os.strerror(number))


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

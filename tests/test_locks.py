"""Locks of files: one holder, others that wait, that do something meanwhile, or that don't wait."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from lavis_lite.common import locks
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


def test_who_waits_does_something_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.0)
    holder, calls = contextlib.ExitStack(), []
    holder.enter_context(locked(tmp_path / "lock", what="works"))

    def meanwhile() -> None:
        calls.append(1)
        if len(calls) == 3:
            holder.close()

    with locked(tmp_path / "lock", what="works", meanwhile=meanwhile):
        assert len(calls) == 3

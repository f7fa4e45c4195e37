from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lavis_lite.common.io import atomic_dir, atomic_write, cache_dir, remove_leftovers


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("LAVIS_LITE_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "lavis_lite"


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    atomic_write(path, "é1")
    atomic_write(path, b"2")
    assert path.read_bytes() == b"2"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    atomic_write(path, "old")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_dir_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(RuntimeError, match="half way"), atomic_dir(path) as temporary:
        (temporary / "one").write_text("1")
        assert not path.exists()
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []
    with atomic_dir(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "one").write_text("1")
    assert (path / "sub" / "one").read_text() == "1"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("replace", [False, True])
def test_atomic_dir_keeps_or_replaces_what_is_there(tmp_path: Path, replace: bool) -> None:
    path = tmp_path / "folder"
    for content in ("first", "second"):
        with atomic_dir(path, replace=replace) as temporary:
            (temporary / "file").write_text(content)
    assert (path / "file").read_text() == ("second" if replace else "first")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_folder_that_is_replaced_is_old_or_new_after_a_kill(
    tmp_path: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after so many of the three renames: nothing else is done, as cleaning up after an error would be."""
    path = tmp_path / "step_000800"
    with atomic_dir(path) as temporary:
        (temporary / "file").write_text("old")

    done: list[str] = []
    rename = os.rename

    def rename_or_die(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        rename(source, target)
        done.append(target.name)

    with monkeypatch.context() as patched, pytest.raises((KeyboardInterrupt, SystemExit)):
        patched.setattr(os, "rename", rename_or_die)
        patched.setattr("lavis_lite.common.io.shutil.rmtree", lambda *_, **__: sys.exit())
        with atomic_dir(path, replace=True) as temporary:
            (temporary / "file").write_text("new")
    assert len(done) == renames and len(list(tmp_path.iterdir())) == 2
    assert len(remove_leftovers(tmp_path)) == 1
    assert [one.name for one in tmp_path.iterdir()] == ["step_000800"]
    assert (path / "file").read_text() == ("new" if renames >= 2 else "old")


def test_a_folder_whose_successor_gets_no_name_has_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step_000800"
    with atomic_dir(path) as temporary:
        (temporary / "file").write_text("old")
    rename, failed = os.rename, []

    def rename_once_full(source: Path, target: Path) -> None:
        if target == path and not failed:
            failed.append(source)
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_once_full)
    with pytest.raises(OSError, match="No space"), atomic_dir(path, replace=True) as temporary:
        (temporary / "file").write_text("new")
    assert failed and list(tmp_path.iterdir()) == [path]
    assert (path / "file").read_text() == "old"


@pytest.mark.parametrize("killed", [False, True])
def test_what_is_left_of_a_replaced_folder_does_not_come_back(
    tmp_path: Path, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step_000800"
    with monkeypatch.context() as patched:
        patched.setattr("lavis_lite.common.io.shutil.rmtree", lambda *_, **__: None)
        if killed:  # before the old folder lost its second name
            (tmp_path / ".tmp-replaced-01234567-step_000800").mkdir()
            path.mkdir()
        else:
            for _ in range(2):
                with atomic_dir(path, replace=True):
                    pass
        remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    path.rmdir()  # as a checkpoint that is one too many
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".tmp-folder-x").mkdir()
    (tmp_path / ".tmp-folder-x" / "part").write_text("half")
    (tmp_path / ".tmp-file").write_text("half")
    (tmp_path / "whole").write_text("whole")
    assert len(remove_leftovers(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert remove_leftovers(tmp_path / "absent") == []

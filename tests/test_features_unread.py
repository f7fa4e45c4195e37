"""Stored features of pictures that can't be read for a while: they come back, and cost nothing else meanwhile."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from feature_world import PICTURE_BYTES, noise_pictures, prepared

from lavis_lite.datasets import feature_store, pictures
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.image_features import ImageFeatures

ALLOWED = "run.max_bad_fraction=0.5"


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pictures a file."""
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 5 * PICTURE_BYTES)


@contextlib.contextmanager
def disk_error(*names: str) -> Iterator[list[str]]:
    """Within the block these pictures are there but can't be read; the names of all that one tries to read."""
    tried: list[str] = []

    def failing(read: Any) -> Any:
        def reader(path: str) -> Any:
            tried.append(Path(path).name)
            if tried[-1] in names:
                raise UnreadableSample(path, "Input/output error")
            return read(path)

        return reader

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pictures, "read_bytes", failing(pictures.read_bytes))
        yield tried


def built(folder: Path) -> list[int]:
    """When each file was written."""
    return [path.stat().st_mtime_ns for path in sorted((folder / "features").glob("*/*.safetensors"))]


def has_features(rows: Any, row: int) -> bool:
    try:
        return isinstance(rows.load(row, seed=0)["image"], ImageFeatures)
    except UnreadableSample:
        return False


def test_a_picture_that_could_not_be_read_once_comes_back(tmp_path: Path) -> None:
    with disk_error("6.jpg"):
        assert not has_features(prepared(tmp_path, ALLOWED)["own"]["train"], 6)
    before = built(tmp_path)
    assert has_features(prepared(tmp_path, ALLOWED)["own"]["train"], 6)
    after = built(tmp_path)
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True, True, True]
    prepared(tmp_path, ALLOWED)
    assert built(tmp_path) == after


@pytest.mark.parametrize("copied", [False, True])
def test_one_that_still_cannot_be_read_is_all_that_is_tried_again(tmp_path: Path, copied: bool) -> None:
    with disk_error("6.jpg"):
        prepared(tmp_path, ALLOWED)
        if copied:
            (tmp_path / "images" / "7.jpg").touch()
            prepared(tmp_path, ALLOWED)
    before = built(tmp_path)
    with disk_error("6.jpg") as tried:
        prepared(tmp_path, ALLOWED)
    # 0 and 20, as the first of the first and of the last file, are looked at for another reason.
    assert sorted(tried) == ["0.jpg", "20.jpg", "6.jpg"] and built(tmp_path) == before
    assert has_features(prepared(tmp_path, ALLOWED)["own"]["train"], 6)


def test_times_that_older_versions_noted_are_not_trusted(tmp_path: Path) -> None:
    with disk_error("6.jpg"):
        prepared(tmp_path, ALLOWED)
    (times,) = (tmp_path / "features").glob("*/times.json")
    noted = {shard: entry[:2] for shard, entry in json.loads(times.read_text()).items()}
    times.write_text(json.dumps(noted))
    assert has_features(prepared(tmp_path, ALLOWED)["own"]["train"], 6)


def test_stored_pictures_that_cannot_be_read_now_do_not_end_the_run(tmp_path: Path) -> None:
    """Whether the encoder still makes the same is seen by the next picture, where there is one."""
    noise_pictures(tmp_path, 5)
    prepared(tmp_path)
    before = built(tmp_path)
    with disk_error("0.jpg") as tried:
        prepared(tmp_path)
    assert tried == ["0.jpg", "1.jpg"]
    with disk_error(*(f"{row}.jpg" for row in range(5))):
        rows = prepared(tmp_path)["own"]["train"]
    assert has_features(rows, 0) and built(tmp_path) == before

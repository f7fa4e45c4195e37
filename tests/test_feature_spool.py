"""Features in memory and on disk: the same rows come back, whatever the blocks they went in and come out by."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from lavis_lite.common.errors import DataError
from lavis_lite.tasks.feature_spool import FeatureSpool

ROWS = torch.randn(11, 3, 5, generator=torch.Generator().manual_seed(0))


def filled(folder: Path, limit: int, *, total: int = 11) -> FeatureSpool:
    spool = FeatureSpool(total, folder, memory_limit=limit)
    for rows in ROWS.split((4, 1, 6)):
        spool.append(rows)
    return spool


@pytest.mark.parametrize("limit", [0, 4 * 15 * 5, 4 * 15 * 11])
def test_rows_come_back_in_any_order(tmp_path: Path, limit: int) -> None:
    spool = filled(tmp_path / "new", limit)
    assert (len(spool), spool.row_numel, spool.on_disk) == (11, 15, limit < ROWS.nbytes)
    expected = ROWS.half().float() if spool.on_disk else ROWS
    for rows in (range(11), range(3, 6), [4], [10, 0, 4, 5, 3], [7, 7]):
        assert torch.equal(spool.read(rows).float(), expected[list(rows)])
    spool.append(ROWS[:2])  # reading doesn't move the place where writing goes on
    assert torch.equal(spool.read([12, 0]).float(), expected[[1, 0]])


@pytest.mark.parametrize("total", [11, 22])
def test_all_processes_rows_decide_and_not_this_one_s(tmp_path: Path, total: int) -> None:
    """The limit lies between what this process has and what two have."""
    spool = filled(tmp_path, 4 * 15 * 15, total=total)
    assert spool.on_disk == (total == 22) and spool.read([0]).dtype == (
        torch.float16 if spool.on_disk else torch.float32
    )


def test_what_fp16_cannot_hold_is_clamped_rather_than_infinite(tmp_path: Path) -> None:
    spool = FeatureSpool(1, tmp_path, memory_limit=0)
    spool.append(torch.tensor([[1e9, -1e9, 1.5]]))
    assert spool.read([0]).tolist() == [[65504.0, -65504.0, 1.5]]


def test_nothing_is_left_on_disk(tmp_path: Path) -> None:
    spool = filled(tmp_path, 0)
    assert spool.on_disk and not list(tmp_path.iterdir())
    del spool
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_no_room_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(DataError, match=r"No space left on device; they take 30 bytes an image"):
        filled(tmp_path, 0)

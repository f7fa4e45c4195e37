"""Two ranks of which one may read slowly: every rank's wait is logged, and one line warns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runner_helpers import project, run_ranks, train_command

from lavis_lite.common.logging import read_rows


def _waits(folder: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    """The last row of training, and what both ranks said."""
    path = project(folder, max_steps=4, log_every=3)
    said = run_ranks(train_command(path, *options), timeout=300)
    return [row for row in read_rows(folder / "run" / "log.jsonl") if row["kind"] == "train"], "\n".join(said)


@pytest.mark.slow
def test_a_rank_that_reads_slowly_is_logged_and_named_once_a_row(tmp_path: Path) -> None:
    rows, said = _waits(tmp_path, "datasets.fake.seconds=0.2", "datasets.fake.slow_rank=1")
    assert [row["step"] for row in rows] == [1, 3, 4]
    for row in rows:
        fast, slow = row["data_waits"]
        assert slow >= 4 * 0.2 > fast  # a batch is four rows
        assert (row["slowest_data_rank"], row["slowest_data_wait"]) == (1, slow)
    assert said.count("rank 1 waits ") == len(rows), said[-3000:]
    assert "rank 0 waits " not in said


@pytest.mark.slow
def test_ranks_that_read_evenly_are_no_reason_to_warn(tmp_path: Path) -> None:
    rows, said = _waits(tmp_path, "datasets.fake.seconds=0.4")
    assert all(min(row["data_waits"]) >= 4 * 0.4 for row in rows)
    assert " waits " not in said, said[-3000:]

"""Two ranks of which one may read slowly: every rank's wait is logged, and one line warns."""

from __future__ import annotations

from pathlib import Path

import pytest
from runner_helpers import project, run_ranks, train_command

from lavis_lite.common.logging import read_rows
from lavis_lite.runners.state import straggling


@pytest.mark.slow
def test_a_rank_that_reads_slowly_is_logged_and_named_once_a_row(tmp_path: Path) -> None:
    path = project(tmp_path, max_steps=4, log_every=3)
    slow_rank = ("datasets.fake.seconds=0.2", "datasets.fake.slow_rank=1")
    said = "\n".join(run_ranks(train_command(path, *slow_rank), timeout=300))
    rows = [row for row in read_rows(tmp_path / "run" / "log.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 3, 4]
    # On a busy machine the first step's waits are anything: processes begin to read at different times.
    for row in rows[1:]:
        fast, slow = row["data_waits"]
        assert slow >= 4 * 0.2 and slow > fast  # a batch is four rows
        assert (row["slowest_data_rank"], row["slowest_data_wait"]) == (1, slow)
    assert "rank 1 waits " in said, said[-3000:]


def test_a_rank_that_takes_a_fifth_of_a_step_longer_is_worth_a_warning() -> None:
    assert straggling([0.5, 0.5], 1.0) is None
    assert straggling([0.1, 0.29, 0.1], 1.0) is None
    assert straggling([0.1, 0.5, 0.2], 1.0) == (
        "rank 1 waits 0.50 s a step for data, the others 0.15 s, of 1.00 s: all wait for its disk or workers"
    )
    assert straggling([0.1, 0.5, 0.2], 2.0) is None

"""A run that continues on another number of processes; one process here, the number in the checkpoint is rewritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runner_helpers import config

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.errors import ConfigError
from lavis_lite.runners import resume
from lavis_lite.runners.runner import Runner


def one_epoch(folder: Path, processes: int) -> None:
    """A finished run of one epoch, six steps, that so many processes have trained."""
    result = Runner(config(folder, max_steps=None, max_epochs=1)).train()
    assert result.checkpoint is not None and result.step == 6
    path = result.checkpoint / ckpt.STATE
    path.write_text(json.dumps({**json.loads(path.read_text()), "world_size": processes}))


def test_epochs_are_not_counted_with_other_processes(tmp_path: Path) -> None:
    one_epoch(tmp_path, processes=2)
    message = (
        r"the run had 2 processes and now has 1, .*start it with 2 processes, or set .*run\.max_steps=<steps>"
    )
    with pytest.raises(ConfigError, match=message):
        Runner(config(tmp_path, max_steps=None, max_epochs=2)).train()


def test_a_finished_run_stays_finished_with_other_processes(tmp_path: Path) -> None:
    one_epoch(tmp_path, processes=2)
    assert Runner(config(tmp_path, max_steps=None, max_epochs=1)).train().finished


def test_epochs_go_on_with_as_many_processes(tmp_path: Path) -> None:
    one_epoch(tmp_path, processes=1)
    assert Runner(config(tmp_path, max_steps=None, max_epochs=2)).train().step == 12


def test_steps_go_on_and_the_order_of_samples_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_epoch(tmp_path, processes=2)
    said: list[str] = []

    def note(text: str, *args: Any) -> None:
        said.append(text % args)

    monkeypatch.setattr(resume.logger, "warning", note)
    assert Runner(config(tmp_path, max_steps=7)).train().step == 7
    assert said == [
        "the run had 2 processes and now has 1: its global batch changes, and as it goes on at the same number of "
        "batches, some samples come once more"
    ]

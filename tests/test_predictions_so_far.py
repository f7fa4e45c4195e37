"""An evaluation that is ended before its time: what it has predicted until then stays on the disk."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from data_helpers import warnings_logged
from runner_helpers import start, wait_for
from vqa_world import SECOND_PREDICTION, Answerer, Questions

from lavis_lite.common.errors import DataError
from lavis_lite.tasks.base import EvalArgs
from lavis_lite.tasks.so_far import keeping_predictions
from lavis_lite.tasks.vqa import VqaTask


class Tiring(Answerer):
    """Fails in its fourth batch."""

    def predict_answers(self, samples: Any, **settings: Any) -> list[str]:
        if len(self.calls) == 3:
            raise MemoryError("no more")
        return super().predict_answers(samples, **settings)


def kept(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def arguments(folder: Path, **more: Any) -> EvalArgs:
    return EvalArgs(batch_size=5, folder=folder / "run", label="test", **more)


def test_answers_given_before_an_error_are_on_the_disk(tmp_path: Path) -> None:
    file = tmp_path / "run" / "predictions_test.part0.jsonl"
    with warnings_logged() as told, pytest.raises(MemoryError):
        VqaTask().evaluate(Tiring(), Questions(23), loader_args=arguments(tmp_path))
    assert [row["question_id"] for row in kept(file)] == list(range(1000, 1015))
    assert kept(file)[1] == SECOND_PREDICTION
    assert told == [f"the 15 predictions made so far are in {file}"]
    # The next one begins anew, and nothing is left of one that came to its end.
    VqaTask().evaluate(Answerer(), Questions(23), loader_args=arguments(tmp_path))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "predictions_test.json",
        "results_test.json",
    ]


def test_too_many_unreadable_pictures_leave_the_answers_to_the_others(tmp_path: Path) -> None:
    data = Questions(60, unreadable=tuple(range(20, 50)))
    with pytest.raises(DataError, match="max_bad_fraction"):
        VqaTask(loss_batches=0).evaluate(
            Answerer(), data, loader_args=arguments(tmp_path, max_bad_fraction=0.1)
        )
    assert len(kept(tmp_path / "run" / "predictions_test.part0.jsonl")) == 20


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_what_was_captioned(tmp_path: Path, number: signal.Signals) -> None:
    file = tmp_path / "run" / "predictions_test.part0.jsonl"
    process = start([sys.executable, __file__, str(tmp_path)])
    try:
        wait_for(lambda: file.exists() and file.stat().st_size > 0)
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert {row["caption"] for row in kept(file)[:5]} == {"a slow caption"}


def test_a_disk_that_takes_nothing_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("no folder")
    with warnings_logged(logging.WARNING) as told, keeping_predictions(arguments(tmp_path)) as so_far:
        so_far.add([{"caption": "a"}])
        so_far.add([{"caption": "b"}])
    assert len(told) == 1 and "predictions are not kept while they are made" in told[0]


def _caption_slowly(folder: Path) -> None:
    import time

    from caption_world import Annotated, Captioner

    from lavis_lite.tasks.captioning import CaptioningTask

    # A shell's background job would ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    class Slow(Captioner):
        def generate(self, samples: Any, **_: Any) -> list[str]:
            time.sleep(0.5)
            return ["a slow caption"] * len(samples["image"])

    CaptioningTask(metrics=[]).evaluate(Slow(), Annotated(), loader_args=arguments(folder))


if __name__ == "__main__":
    _caption_slowly(Path(sys.argv[1]))

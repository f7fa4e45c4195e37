from __future__ import annotations

import importlib
import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lavis_lite.common import logging as log
from lavis_lite.common.errors import MissingDependencyError


@pytest.mark.parametrize("how", ["say('x' * 60)", "get_logger().warning('x' * 60)"])
def test_lines_of_processes_with_unbuffered_output_stay_whole(tmp_path: Path, how: str) -> None:
    code = f"from lavis_lite.common.logging import get_logger, say\nfor _ in range(3000): {how}"
    with (tmp_path / "said").open("wb") as said:
        ranks = [subprocess.Popen([sys.executable, "-u", "-c", code], stderr=said) for _ in range(3)]
        assert [rank.wait(timeout=60) for rank in ranks] == [0, 0, 0]
    lines = (tmp_path / "said").read_text().splitlines()
    assert len(lines) == 9000 and {line[-61:].lstrip() for line in lines} == {"x" * 60}


def test_rows_are_on_the_disk_at_once_and_valid_json(tmp_path: Path) -> None:
    run_log = log.RunLog(tmp_path)
    run_log.write("train", 1, {"loss": 0.5, "grad_norm": float("nan"), "lr": float("inf")})
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"kind": "train", "step": 1, "loss": 0.5, "grad_norm": "nan", "lr": "inf"}
    run_log.close()


def test_opening_drops_rows_after_the_resumed_step_and_cut_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        "".join(json.dumps({"kind": "train", "step": s}) + "\n" for s in (2, 4, 6)) + '{"kind": "tr'
    )
    run_log = log.RunLog(tmp_path, last_step=4)
    run_log.write("train", 6, {"loss": 1.0})
    run_log.close()
    assert [(row["step"], row.get("loss")) for row in log.read_rows(path)] == [(2, None), (4, None), (6, 1.0)]
    assert log.read_rows(tmp_path / "absent") == []


@pytest.mark.parametrize(("last", "kept"), [(None, [2, 4]), (2, [2]), (0, [])])
def test_opening_drops_evaluations_after_the_last_that_is_kept(
    tmp_path: Path, last: int | None, kept: list[int]
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"kind": "eval", "step": s}) + "\n" for s in (2, 4, 6)))
    log.RunLog(tmp_path, last_step=4, last_evaluation=last).close()
    assert [row["step"] for row in log.read_rows(path)] == kept


def test_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lavis-lite\[log\]'"):
        log.RunLog(tmp_path, tensorboard=True)


def test_tensorboard_gets_the_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((Path(folder).name, purge_step))

        def add_scalar(self, *values: Any) -> None:
            written.append(values)

        def close(self) -> None:
            written.append(("closed",))

    module = ModuleType("fake")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    run_log = log.RunLog(tmp_path, last_step=3, tensorboard=True)
    run_log.write("train", 4, {"loss": 0.5})
    run_log.write("eval", 4, {"split": "val", "val/loss": 0.6})
    run_log.close()
    assert written == [("tensorboard", 4), ("train/loss", 0.5, 4), ("val/loss", 0.6, 4), ("closed",)]


def test_without_a_terminal_progress_is_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    values = {"loss": 1.25, "loss_itc": 1.0, "itm_acc": 0.5, "lr": 1e-4, "images_per_s": 80.4}
    with log.ProgressDisplay(100, 20) as progress:
        for step in (21, 22, 40, 100):
            clock[0] += 4.0
            progress.advance(step)
            progress.show(values)
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    shown = "loss 1.250  loss_itc 1.000  itm_acc 0.500  80 images/s"
    # At first, then not more often than every ten seconds, and at the end.
    assert lines == [f"step 21/100  {shown}", f"step 100/100  {shown}"]


def test_progress_tells_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    with log.ProgressDisplay(100, 50) as progress:
        clock[0] = 30.0
        progress.advance(60)
        progress.show({"loss": 1.0})
    assert "step 60/100  loss 1.000  2 min 00 s left" in capsys.readouterr().err


def test_one_bar_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation re-ranks within training, whose bar is on the terminal: older versions of rich refuse a second."""
    lines: list[str] = []
    monkeypatch.setattr(log, "get_logger", lambda: SimpleNamespace(info=lines.append))
    terminal = Console(file=StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(log, "console", lambda: terminal)
    with log.ProgressDisplay(10, 3) as outer:
        with log.ProgressDisplay(20, 0, unit="pair") as inner:
            assert outer._bar is not None and inner._bar is None
            inner.advance(5)
            inner.show({})
        outer.advance(4)
    assert [line.split("  ")[0] for line in lines] == ["pair 5/20"]
    with log.ProgressDisplay(10, 0) as after:
        assert after._bar is not None


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with log.ProgressDisplay(10, 0, shown=False) as progress:
        progress.advance(10)
        progress.show({"loss": 1.0})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.6, "8 s"), (125, "2 min 05 s"), (12_000, "3 h 20 min"), (59.6, "1 min 00 s")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert log.duration(seconds) == text

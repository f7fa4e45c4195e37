from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.errors import CheckpointError, ConfigError, TrainingError
from lavis_lite.common.registry import registry
from lavis_lite.models.base import build_model
from lavis_lite.runners import resume
from lavis_lite.runners import runner as runner_module
from lavis_lite.runners.resume import differing_keys
from lavis_lite.runners.runner import Runner
from tests.runner_helpers import (
    ROOT,
    assert_same_bits,
    config,
    logged,
    project,
    start,
    train_command,
    weights,
)

KILLED_WHILE_WRITING = """
import os, signal, sys
sys.argv = ["train.py", *sys.argv[1:]]
from lavis_lite.common import checkpoint
whole = checkpoint.save_tensors
calls = 0
def half(path, tensors):
    global calls
    calls += 1
    whole(path, tensors)
    if calls == int(os.environ["KILL_AT_CALL"]):
        path.write_bytes(path.read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_tensors = half
from lavis_lite.commands.run import train_main
train_main()
"""


class Crash(Exception):
    pass


def crash_before(step: int, cfg: Any) -> None:
    """Train, but die without warning before the given step."""
    runner = Runner(cfg)
    original = runner.train_step

    def train_step(batches: Any) -> None:
        if runner.state.step == step:
            raise Crash
        original(batches)

    runner.train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(Crash):
        runner.train()


@pytest.mark.parametrize(
    ("workers", "settings"),
    [
        (0, {}),
        (2, {}),
        (0, {"accum_grad_iters": 2, "max_grad_norm": 0.5, "lr_layer_decay": 0.5}),
        (0, {"precision": "fp16"}),
        (0, {"precision": "bf16", "log_every": 4}),
    ],
)
def test_three_and_three_steps_are_six(tmp_path: Path, workers: int, settings: dict[str, Any]) -> None:
    run = {"save_every": 3, "eval_every": 2, "num_workers": workers, "max_steps": 6, **settings}
    whole = Runner(config(tmp_path / "whole", **run)).train()
    # It dies after the fourth step; that step, its log row and its evaluation are done again.
    crash_before(4, config(tmp_path / "parts", **run))
    assert ckpt.newest(tmp_path / "parts/run") == tmp_path / "parts/run/checkpoints/step_000003"
    parts = Runner(config(tmp_path / "parts", **run)).train()
    assert_same_bits(weights(whole.checkpoint), weights(parts.checkpoint))
    assert whole.metrics == parts.metrics
    assert logged(tmp_path / "whole/run") == logged(tmp_path / "parts/run")


def test_sigkill_during_a_checkpoint_write(tmp_path: Path) -> None:
    run = {"save_every": 2, "max_steps": 6}
    whole = Runner(config(tmp_path / "whole", **run)).train()
    path = project(tmp_path / "parts", **run)
    # The frozen part is a file, each checkpoint two: the fourth is the second checkpoint's model, cut in its middle.
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, *train_command(path)[2:]]
    process = start(command, KILL_AT_CALL="4")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    folder = tmp_path / "parts/run/checkpoints"
    assert [step for step, _ in ckpt.list_checkpoints(folder)] == [2]
    assert len(list(folder.iterdir())) == 2  # the half one is there, under a temporary name
    parts = Runner(config(tmp_path / "parts", **run)).train()
    assert_same_bits(weights(whole.checkpoint), weights(parts.checkpoint))
    assert sorted(p.name for p in folder.iterdir()) == ["step_000004", "step_000006"]
    assert logged(tmp_path / "whole/run") == logged(tmp_path / "parts/run")


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    cfg = config(tmp_path, save_every=2)
    original = ckpt.save_tensors

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if "step_000004" in str(path):
            raise OSError(28, "No space left on device")
        original(path, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ckpt, "save_tensors", full)
        with pytest.raises(CheckpointError, match=r"No space left.*step_000002' is intact"):
            Runner(cfg).train()
    assert Runner(cfg).train().step == 6


def _evaluations_end(monkeypatch: pytest.MonkeyPatch, *, after: bool) -> None:
    """Evaluations die: before they have come to anything, or before their result is in the checkpoint."""

    def crash(*args: Any, **kwargs: Any) -> Any:
        raise Crash

    if after:
        monkeypatch.setattr(ckpt, "amend_state", crash)
    else:
        monkeypatch.setattr(registry.get_task_class("fake_loss"), "evaluate", crash)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("every", "step"), [({}, 6), ({"eval_every": 2, "save_every": 2}, 2)])
def test_an_evaluation_that_fails_loses_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: dict[str, int], step: int, after: bool
) -> None:
    run = {"best_metric": "val/loss", "best_mode": "min", "keep_last": 1, **every}
    whole = Runner(config(tmp_path / "whole", **run)).train()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        _evaluations_end(patch, after=after)
        Runner(config(tmp_path / "parts", **run)).train()
    kept = ckpt.newest(tmp_path / "parts/run")
    assert kept == ckpt.step_dir(tmp_path / "parts/run/checkpoints", step)
    assert ckpt.load_state(kept)["evaluated_step"] is None
    again = Runner(config(tmp_path / "parts", **run))
    parts = again.train()
    assert_same_bits(weights(whole.checkpoint), weights(parts.checkpoint))
    assert whole.metrics == parts.metrics
    assert logged(tmp_path / "whole/run") == logged(tmp_path / "parts/run")
    one, other = (
        {**state, "elapsed_s": 0}
        for state in map(ckpt.load_state, (whole.checkpoint, parts.checkpoint))  # type: ignore[arg-type]
    )
    assert one == other and one["evaluated_step"] == 6
    folders = [
        sorted(p.name for p in (tmp_path / n / "run/checkpoints").iterdir()) for n in ("whole", "parts")
    ]
    assert folders[0] == folders[1]


def test_an_evaluation_is_added_to_the_checkpoint_without_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[Path] = []
    original = ckpt.save_tensors
    monkeypatch.setattr(
        ckpt, "save_tensors", lambda path, tensors: (writes.append(path), original(path, tensors))
    )
    run = {"best_metric": "val/loss", "best_mode": "min", "eval_every": 1, "save_every": 1, "keep_last": 9}
    Runner(config(tmp_path, max_steps=3, **run)).train()
    assert len(writes) == 2 * 3
    states = [ckpt.load_state(path) for _, path in ckpt.list_checkpoints(tmp_path / "run/checkpoints")]
    assert [state["evaluated_step"] for state in states] == [1, 2, 3]
    assert all(state["metrics"].keys() >= {"val/loss"} and state["best"] for state in states)


def test_a_disk_that_has_no_room_for_an_evaluation_leaves_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "atomic_write", full)
        with pytest.raises(CheckpointError, match=r"step_000006', which is intact: .*No space left"):
            Runner(config(tmp_path)).train()
    assert Runner(config(tmp_path)).train().metrics


def test_a_finished_run_is_told_again_without_building_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Runner(config(tmp_path)).train()
    table = capsys.readouterr().out
    monkeypatch.setattr(runner_module, "build_parts", lambda *args: pytest.fail("built"))
    again = Runner(config(tmp_path, num_workers=1)).train()
    assert again == first
    assert table in capsys.readouterr().out


def test_a_finished_run_without_its_summary_is_evaluated_again(tmp_path: Path) -> None:
    first = Runner(config(tmp_path)).train()
    before = logged(tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    assert Runner(config(tmp_path)).train() == first
    assert logged(tmp_path / "run") == before


def test_a_longer_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Runner(config(tmp_path, max_steps=3)).train()
    assert Runner(config(tmp_path, max_steps=5)).train().step == 5
    err = capsys.readouterr().err
    assert "run.max_steps is now 5 (was 3)" in err and "at step 3" in err


@pytest.mark.parametrize(
    ("options", "run", "keys"),
    [
        (["model.width=4"], {}, "model.width"),
        (["datasets.fake.rows=12"], {"seed": 1}, "datasets.fake.rows, run.seed"),
        (["task.loss_batch_size=2"], {"batch_size_train": 2}, "task.loss_batch_size, run.batch_size_train"),
    ],
)
def test_another_run_in_the_folder_is_not_mixed_in(
    tmp_path: Path, options: list[str], run: dict[str, Any], keys: str
) -> None:
    Runner(config(tmp_path, max_steps=2)).train()
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(ConfigError, match=rf"differs in {keys}; .*run\.output_dir=.*run\.resume=never"):
        Runner(config(tmp_path, *options, **run)).train()
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


def test_never_starts_anew_and_keeps_the_old_run_beside(tmp_path: Path) -> None:
    old = Runner(config(tmp_path, max_steps=2)).train()
    kept = weights(old.checkpoint)
    new = Runner(config(tmp_path, max_steps=3, resume="never", seed=1)).train()
    assert new.step == 3 and logged(tmp_path / "run")[0]["step"] == 1
    assert_same_bits(kept, weights(tmp_path / "run/previous_1/checkpoints/step_000002"))
    assert (tmp_path / "run/previous_1/log.jsonl").is_file()
    assert [step for step, _ in ckpt.list_checkpoints(tmp_path / "run/checkpoints")] == [3]


def test_a_path_continues_that_checkpoint_and_called_again_what_came_of_it(tmp_path: Path) -> None:
    run = {"save_every": 2, "keep_last": 9}
    whole = Runner(config(tmp_path / "a", **run)).train()
    source = tmp_path / "a/run/checkpoints/step_000002"
    options = {**run, "resume": str(source)}
    crash_before(5, config(tmp_path / "b", **options))
    again = Runner(config(tmp_path / "b", **options))
    built: list[Any] = []
    again.log = lambda: built.append(again.state.step)  # type: ignore[method-assign]
    result = again.train()
    assert built == [5, 6]  # not once more from step 2
    assert_same_bits(weights(whole.checkpoint), weights(result.checkpoint))


def test_a_path_in_its_own_folder_puts_later_checkpoints_aside(tmp_path: Path) -> None:
    run = {"save_every": 2, "keep_last": 9}
    whole = Runner(config(tmp_path, **run)).train()
    before = weights(whole.checkpoint)
    back = Runner(config(tmp_path, **run, resume=str(tmp_path / "run/checkpoints/step_000002"))).train()
    assert_same_bits(before, weights(back.checkpoint))
    aside = sorted(path.name for path in (tmp_path / "run/previous_1/checkpoints").iterdir())
    assert aside == ["step_000004", "step_000006"]
    assert [row["step"] for row in logged(tmp_path / "run") if row["kind"] == "train"] == [1, 2, 4, 6]


def test_a_path_that_is_no_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    result = Runner(config(tmp_path, max_steps=1)).train()
    assert result.checkpoint is not None
    with pytest.raises(CheckpointError, match=r"set model\.pretrained"):
        Runner(config(tmp_path / "b", resume=str(result.checkpoint / "model.safetensors"))).train()
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        Runner(config(tmp_path / "b", resume=str(tmp_path / "absent"))).train()


def test_the_number_of_threads_is_the_run_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Sums are split by threads: a resumed run on a busier machine would otherwise differ in the last bit.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    monkeypatch.setattr("lavis_lite.runners.setup.choose_threads", lambda *args: 1)
    crash_before(2, config(tmp_path, save_every=1, num_threads="auto"))
    monkeypatch.setattr("lavis_lite.runners.setup.choose_threads", lambda *args: pytest.fail("chose anew"))
    assert Runner(config(tmp_path, save_every=1, num_threads="auto")).train().finished
    torch.set_num_threads(before)


def test_differing_keys_names_leaves() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": 3}, "gone": 1}
    new = {"a": 1, "b": {"c": [1, 3], "d": 3, "e": {"f": 1}}}
    assert differing_keys(old, new) == ["b.c", "b.e", "gone"]
    assert differing_keys(old, old) == []


def test_the_killed_script_is_the_real_command() -> None:
    assert "train_main()" in (ROOT / "train.py").read_text()


def test_frozen_parts_that_another_checkpoint_gave_come_back(tmp_path: Path) -> None:
    given = tmp_path / "given" / "model.safetensors"
    given.parent.mkdir()
    model = build_model(config(tmp_path).model)
    torch.manual_seed(7)
    ckpt.save_tensors(given, {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()})

    def settings(name: str, **run: Any) -> Any:
        return config(tmp_path / name, f"model.pretrained={given}", **run)

    whole = Runner(settings("whole")).train()
    crash_before(3, settings("parts", save_every=3))
    parts = Runner(settings("parts", save_every=3))
    assert_same_bits(weights(whole.checkpoint), weights(parts.train().checkpoint))
    assert torch.equal(parts.parts.model.frozen.weight.cpu(), ckpt.load_tensors(given)["frozen.weight"])

    again = build_model({"arch": "fake_mlp", "pretrained": str(tmp_path / "parts/run")})
    assert torch.equal(again.frozen.weight, ckpt.load_tensors(given)["frozen.weight"])
    given.unlink()
    with pytest.raises(
        CheckpointError, match=r"has the frozen parts of '.*given.*', which isn't there any more"
    ):
        build_model({"arch": "fake_mlp", "pretrained": str(tmp_path / "parts/run")})


def test_settings_that_came_later_leave_a_finished_run_finished(tmp_path: Path) -> None:
    Runner(config(tmp_path)).train()
    summary = tmp_path / "run/summary.json"
    content = json.loads(summary.read_text())
    old = json.loads(content["fingerprint"])
    del old["run"]["compile"]  # as before it existed
    summary.write_text(json.dumps({**content, "fingerprint": json.dumps(old)}))
    again = Runner(config(tmp_path, timeout=5.0))
    again.train()
    assert not hasattr(again, "parts")  # nothing was built
    other = Runner(config(tmp_path, weight_decay=0.3))
    other.train()
    assert hasattr(other, "parts")


def test_a_second_run_in_the_folder_leaves_the_first_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it trains; and neither its end nor an error keeps the folder."""
    monkeypatch.setattr(resume, "GRACE_SECONDS", 0.1)
    first, other = Runner(config(tmp_path, save_every=2)), Runner(config(tmp_path, save_every=2))
    run_dir, train_step, tried = tmp_path / "run", first.train_step, []

    def step(batches: Any) -> None:
        train_step(batches)
        if first.state.step == 3:
            (run_dir / "checkpoints" / ".tmp-step_000004").mkdir()  # of a write that goes on
            before = _contents(run_dir)
            said = rf"another process trains in '{run_dir}' \(process {os.getpid()} on .*set another run\.output_dir"
            with pytest.raises(TrainingError, match=said):
                other.train()
            assert _contents(run_dir) == before
            tried.append(True)
            raise Crash

    monkeypatch.setattr(first, "train_step", step)
    with pytest.raises(Crash):
        first.train()
    assert tried and other.train().finished
    assert [row["step"] for row in logged(run_dir) if row["kind"] == "train"] == [1, 2, 4, 6]
    assert first.train().finished


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}

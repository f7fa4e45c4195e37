"""Checkpoints written while training goes on, and by several processes."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from runner_helpers import ROOT, assert_same_bits, config, project, start, train_command, wait_for, weights
from torch import Tensor

from lavis_lite.capfilt.weights import _digest
from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common import tensor_parts
from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.tensor_parts import PARTS, PartsError, check_parts, write_tied
from lavis_lite.runners import saving
from lavis_lite.runners.runner import Runner

SAVE = ckpt.save_tensors


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Runner(config(tmp_path / "plain", save_every=2)).train()
    runner = Runner(config(tmp_path / "behind", save_every=2, save_async=True))
    went_on = threading.Event()
    steps, original = [], runner.train_step

    def step(batches: Any) -> None:
        original(batches)
        steps.append(runner.state.step)
        if runner.state.step == 3:
            went_on.set()

    def patient(path: Path, tensors: Mapping[str, Tensor]) -> None:
        assert went_on.wait(60), "the third step never came"
        SAVE(path, tensors)

    monkeypatch.setattr(runner, "train_step", step)
    monkeypatch.setattr(ckpt, "save_tensors", patient)
    result = runner.train()
    assert steps == [1, 2, 3, 4, 5, 6]
    for at in (4, 6):
        ours, theirs = (ckpt.step_dir(r.checkpoint.parent, at) for r in (result, plain) if r.checkpoint)
        assert_same_bits(weights(ours), weights(theirs))
        assert (ours / ckpt.MODEL).stat().st_size == (theirs / ckpt.MODEL).stat().st_size  # tied weights once


def test_a_write_that_fails_in_the_background_ends_the_run_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, tensors: Mapping[str, Tensor]) -> None:
        if "step_000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        SAVE(path, tensors)

    monkeypatch.setattr(ckpt, "save_tensors", full)
    with pytest.raises(CheckpointError, match=r"step_000004.*No space left.*step_000002' is intact"):
        Runner(config(tmp_path, save_every=2, save_async=True)).train()
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step_000002"]
    monkeypatch.setattr(ckpt, "save_tensors", SAVE)
    assert Runner(config(tmp_path, save_every=2)).train().step == 6


def test_a_second_signal_does_not_end_a_write_in_the_background(tmp_path: Path) -> None:
    """torchrun passes on what the scheduler has sent already."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(root=ROOT))
    path = project(tmp_path, max_steps=400, save_every=0, save_async=True)
    process = start([sys.executable, str(script), *train_command(path)[2:], "datasets.fake.seconds=0.01"])
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") > 3, 300)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: any((tmp_path / "run" / "checkpoints").glob(".tmp-*")), 60)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped by SIGTERM" in err, err[-2000:]
    assert [path.name[:5] for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_"]


SLOW = """
import sys, time
sys.path.insert(0, "{root}")
from lavis_lite.commands.run import train_main
from lavis_lite.common import checkpoint as ckpt
save = ckpt.save_tensors
ckpt.save_tensors = lambda *arguments: (time.sleep(1.5), save(*arguments))
train_main()
"""


def test_a_run_that_fails_keeps_what_was_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(config(tmp_path, save_every=2, save_async=True))
    failed, original = threading.Event(), runner.train_step

    def step(batches: Any) -> None:
        if runner.state.step == 2:
            failed.set()
            raise RuntimeError("a fault")
        original(batches)

    def patient(path: Path, tensors: Mapping[str, Tensor]) -> None:
        assert failed.wait(60)
        SAVE(path, tensors)

    monkeypatch.setattr(runner, "train_step", step)
    monkeypatch.setattr(ckpt, "save_tensors", patient)
    with pytest.raises(RuntimeError, match="a fault"):
        runner.train()
    assert ckpt.list_checkpoints(tmp_path / "run" / "checkpoints")[-1][0] == 2


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A checkpoint's folder as processes write it, with two names of one tensor."""
    folder = ckpt.step_dir(tmp_path / "checkpoints", 3)
    tensors = {"model/a": torch.arange(6.0).reshape(3, 2), "model/n": torch.ones(2, dtype=torch.bfloat16)}
    folder.mkdir(parents=True)
    dcp.save({**tensors, "optimizer/a|exp_avg": torch.full((3, 2), 0.5)}, checkpoint_id=folder, no_dist=True)
    write_tied(folder, {"b": "a"})
    (folder / ckpt.STATE).write_text('{"step": 3}')
    return folder


def test_parts_are_read_like_any_other_weights(parts: Path, tmp_path: Path) -> None:
    assert ckpt.resolve_checkpoint(tmp_path) == ckpt.resolve_checkpoint(parts) == parts / PARTS
    assert ckpt.newest(tmp_path) == parts
    store = ckpt.open_tensors(parts / PARTS)
    assert list(store) == ["a", "n", "b"] and len(store) == 3
    assert store["a"].tolist() == store["b"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert store["n"].dtype == torch.bfloat16 and store.spec("b").shape == (3, 2)
    assert store.spec("b").is_meta and store.owner("a") == store.owner("b") != store.owner("n")
    optimizer = ckpt.open_optimizer(parts)
    assert {name: x.tolist() for name, x in optimizer.items()} == {"a|exp_avg": [[0.5, 0.5]] * 3}
    before = _digest(parts / PARTS)
    file = next(parts.glob("*.distcp"))
    file.write_bytes(file.read_bytes() + b" ")
    assert before and _digest(parts / PARTS) not in (None, before)


def test_an_index_that_would_run_something_is_not_read(parts: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'evil'}",)

    (parts / PARTS).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(
        CheckpointError, match=r"no index of a checkpoint's parts: an index has no use for .*system"
    ):
        ckpt.open_tensors(parts / PARTS)
    assert not (tmp_path / "evil").exists()


def test_parts_that_are_missing_before_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"12345")
    check_parts(tmp_path, {"__0_0.distcp": 5})
    for files in ({"__0_0.distcp": 6}, {"__0_0.distcp": 5, "__1_0.distcp": 1}):
        with pytest.raises(PartsError, match=r"all machines must see run\.output_dir"):
            check_parts(tmp_path, files)


def test_torch_says_what_failed_in_one_line_and_hides_nothing() -> None:
    def fail(*failures: BaseException) -> None:
        with tensor_parts._in_one_line():
            raise dcp.CheckpointException("x", {rank: (f, None) for rank, f in enumerate(failures)})

    with pytest.raises(
        PartsError, match=r"^process 0: \[Errno 28\] full; process 1: PytorchStreamWriter failed$"
    ):
        fail(OSError(28, "full"), RuntimeError("PytorchStreamWriter failed\nbacktrace"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    with pytest.raises(RuntimeError, match="TypeError"):
        fail(TypeError("ours"))


def test_every_tensor_that_ranks_hold_whole_is_written_by_one_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = [
        {"a": torch.zeros(100), "b": torch.zeros(60), "c": torch.zeros(30), "own0": torch.zeros(1)},
        {"a": torch.zeros(100), "b": torch.zeros(60), "c": torch.zeros(30), "own1": torch.zeros(500)},
    ]
    monkeypatch.setattr(
        saving.dist, "gather_objects", lambda own: [{k: x.nbytes for k, x in h.items()} for h in held]
    )
    written = []
    for rank, tensors in enumerate(held):
        monkeypatch.setattr(saving.dist, "rank", lambda rank=rank: rank)
        written.append(set(saving._shared_out(tensors)))
    assert written == [{"a", "b", "c", "own0"}, {"own1"}]


def test_parts_that_cannot_be_read_are_named(parts: Path) -> None:
    store = ckpt.open_tensors(parts / PARTS)
    for file in parts.glob("*.distcp"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"parts of a can't be read"):
        store["a"]
    (parts / "tied.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tied.json' can't be read"):
        ckpt.open_tensors(parts / PARTS)
    (parts / PARTS).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"\.metadata' is no index of a checkpoint's parts"):
        ckpt.open_tensors(parts / PARTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("parts_at_once", "parts_behind", "large_parts_at_once", "large_parts_behind"),
        *("whole_at_once", "whole_behind"),
    ],
)
def test_one_rank_that_cannot_write_ends_all_with_one_line(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    process = start([sys.executable, "-m", "tests.narrow_disk_scenario", str(folder)])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    said = (folder / "rank0").read_text()
    assert said.startswith("CheckpointError: could not write checkpoint") and "\n" not in said
    assert "File too large" in said and "none before it" in said
    assert (folder / "rank1").read_text() == "SystemExit: 1"
    assert list((folder / "run" / "checkpoints").iterdir()) == []


def test_what_torch_says_of_a_full_disk_is_told_as_such() -> None:
    """Also where only the zip writer's complaint is left, of a file shorter than it should be."""

    def told(*failures: BaseException) -> str:
        wrapped = {rank: (failure, traceback.StackSummary()) for rank, failure in enumerate(failures)}
        with pytest.raises(PartsError) as raised, tensor_parts._in_one_line():
            raise dcp.CheckpointException("write", wrapped)
        return str(raised.value)

    short = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598\nframe #0")
    full = OSError(errno.ENOSPC, "No space left on device")
    assert told(short) == f"process 0: {str(short).splitlines()[0]}"
    assert told(full, short).startswith("process 0: [Errno 28] No space left on device; process 1: [enforce")
    with pytest.raises(RuntimeError, match=r"checkpoint failed: .*a fault"):
        told(full, RuntimeError("a fault"))

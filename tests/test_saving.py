"""Checkpoints written while training goes on, and by several processes."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from runner_helpers import assert_same_bits, config, start, weights
from torch import Tensor

from lavis_lite.capfilt.weights import _digest
from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common import tensor_parts
from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.tensor_parts import PARTS, write_tied
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


@pytest.mark.parametrize("room", [1, 28, 10**6])
def test_parts_are_read_a_few_at_once(parts: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    whole = dict(ckpt.open_tensors(parts / PARTS))
    monkeypatch.setattr(tensor_parts, "READ_BYTES", room)
    loads, load = [], dcp.load
    monkeypatch.setattr(dcp, "load", lambda wanted, **more: loads.append(len(wanted)) or load(wanted, **more))
    assert_same_bits(dict(ckpt.open_tensors(parts / PARTS)), whole)
    assert (
        loads == {1: [1, 1, 1], 28: [2], 10**6: [2]}[room]
    )  # b shares a's tensor, which may be gone by then


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
@pytest.mark.parametrize("name", ["at_once", "behind"])
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

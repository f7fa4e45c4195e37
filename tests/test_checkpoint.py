from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.errors import CheckpointError


def save(folder: Path, step: int, **state: object) -> Path:
    tensors = {"w": torch.full((3,), float(step))}
    return ckpt.save_checkpoint(folder, step, model=tensors, optimizer={}, state=state)


def test_tied_and_overlapping_tensors_survive(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "a": base,
        "tied": base,
        "row": base[1],
        "column": base[:, 2],
        "t": base.t(),
        "empty": base[:0],
    }
    ckpt.save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = ckpt.load_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert loaded["tied"].data_ptr() == loaded["a"].data_ptr()


def test_foreign_files_are_read_as_weights_only(tmp_path: Path) -> None:
    state = nn.Linear(2, 2).state_dict()
    torch.save({"model": state, "epoch": 3}, tmp_path / "lavis.pth")
    assert ckpt.load_tensors(tmp_path / "lavis.pth").keys() == state.keys()
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match=r"code\.pth.*weights only"):
        ckpt.load_tensors(tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="no mapping of names to tensors"):
        ckpt.load_tensors(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=r"text\.pth"):
        ckpt.load_tensors(tmp_path / "text.pth")


def test_a_cut_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    ckpt.save_tensors(path, {"w": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors' is not a complete"):
        ckpt.load_tensors(path)


def test_resolve_finds_best_then_newest(tmp_path: Path) -> None:
    folder = tmp_path / ckpt.FOLDER
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        ckpt.resolve_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds neither"):
        ckpt.resolve_checkpoint(tmp_path)
    first = save(folder, 1, best=None)
    save(folder, 10, best=None)
    assert ckpt.resolve_checkpoint(tmp_path) == folder / "step_000010" / ckpt.MODEL
    save(folder, 20, best={"step": 1, "value": 0.5})
    assert ckpt.resolve_checkpoint(tmp_path) == first / ckpt.MODEL
    assert ckpt.resolve_checkpoint(first) == first / ckpt.MODEL
    assert ckpt.resolve_checkpoint(first / ckpt.MODEL) == first / ckpt.MODEL


def test_incomplete_folders_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / ckpt.FOLDER
    save(folder, 5)
    (folder / "step_000009").mkdir()
    (folder / "step_000009" / ckpt.MODEL).write_text("")
    (folder / ".tmp-step_000010-x").mkdir()
    newest = ckpt.newest(tmp_path)
    assert newest is not None and newest.name == "step_000005"
    amended = folder / "step_000002"
    amended.mkdir(exist_ok=True)
    (amended / ".tmp-state.json-x").write_text("{")
    assert [path.name for path in ckpt.clean(tmp_path)] == [".tmp-step_000010-x", ".tmp-state.json-x"]
    assert not (amended / ".tmp-state.json-x").exists()


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    ckpt.prune(tmp_path, keep_last=2, best_step=2)
    assert [step for step, _ in ckpt.list_checkpoints(tmp_path)] == [2, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000004", "step_000005"]


def test_steps_beyond_six_digits_sort_by_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert [step for step, _ in ckpt.list_checkpoints(tmp_path)] == [999_999, 1_000_000]


@contextmanager
def tiny_files() -> Iterator[None]:
    """The system refuses to let a file grow beyond 8 KiB, as a full disk would.

    Only around the call under test, not as a fixture: the limit holds for the whole process, so a report by
    pytest between a fixture's two halves would hit it where its own output is a longer file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_leaves_the_previous_one_good(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    message = r"could not write .*step_000002.*step_000001' is intact"
    with pytest.raises(CheckpointError, match=message), tiny_files():
        ckpt.save_checkpoint(tmp_path, 2, model={"w": torch.ones(100_000)}, optimizer={}, state={})
    assert list(tmp_path.iterdir()) == [good]
    assert torch.equal(ckpt.load_tensors(good / ckpt.MODEL)["w"], torch.ones(3))


def test_state_names_its_step(tmp_path: Path) -> None:
    path = save(tmp_path, 7, note="x")
    assert ckpt.load_state(path) == {"note": "x", "step": 7}
    (path / ckpt.STATE).write_text(json.dumps({"note": "x"}))
    with pytest.raises(CheckpointError, match="names no step"):
        ckpt.load_state(path)
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        ckpt.load_state(tmp_path)


def test_better_follows_the_direction_and_never_nan() -> None:
    assert (
        ckpt.is_better(0.5, None, "max")
        and ckpt.is_better(0.6, 0.5, "max")
        and ckpt.is_better(0.4, 0.5, "min")
    )
    assert not ckpt.is_better(0.5, 0.5, "max") and not ckpt.is_better(0.6, 0.5, "min")
    assert not ckpt.is_better(float("nan"), None, "max")


def test_a_hub_model_that_cannot_be_fetched_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    folder = tmp_path / "snapshot"
    folder.mkdir()
    ckpt.save_tensors(folder / ckpt.MODEL, {"w": torch.ones(1)})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    assert ckpt.resolve_checkpoint("hub:somebody/model") == folder / ckpt.MODEL

    def offline(name: str, **_: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"'hub:somebody/model' is not in the hub's cache.*no network"):
        ckpt.resolve_checkpoint("hub:somebody/model")

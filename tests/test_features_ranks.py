"""Stored features and several processes: who builds, who waits, and what is left of a build that is killed."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from feature_world import PICTURE_BYTES, config, files, project
from runner_helpers import assert_same_bits, run_ranks, start, train_command, wait_for, weights
from torch import Tensor

from lavis_lite.cli import main
from lavis_lite.common import dist, locks
from lavis_lite.datasets import feature_store
from lavis_lite.runners import features, setup
from lavis_lite.runners.feature_keys import LOCK
from lavis_lite.runners.runner import Runner

BUILD = [sys.executable, "-m", "lavis_lite.cli", "features", "build", "--cfg-path"]


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pictures a file."""
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 5 * PICTURE_BYTES)


def test_ranks_meet_while_one_waits_for_another_build_and_while_it_encodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path)
    Runner(cfg).train()
    files(tmp_path)[0].unlink()
    (folder,) = (tmp_path / "features").iterdir()
    base = setup.build_base(cfg, model_cfg=cfg.model)
    other, said, fill = contextlib.ExitStack(), [], features.fill
    other.enter_context(locks.locked(folder / LOCK, what="stores features too"))

    def all_reduce(flag: Tensor, op: Any) -> None:
        said.append(int(flag))
        if len(said) == 3:
            other.close()

    def fill_slowly(*args: Any, **kwargs: Any) -> Any:
        assert said == [0] * (len(said) - 1) + [1]
        said.clear()
        wait_for(lambda: len(said) >= 3, seconds=60.0)
        return fill(*args, **kwargs)

    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "MEET_SECONDS", 0.05)
    monkeypatch.setattr(dist, "broadcast_object", lambda found: found)
    monkeypatch.setattr(dist, "gather_objects", lambda unread: [unread])
    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    monkeypatch.setattr(features, "fill", fill_slowly)
    assert features.prepare(cfg, base.datasets, setup.encoder_of(base))
    assert said == [0] * (len(said) - 1) + [1] and len(files(tmp_path)) == 5


@pytest.mark.slow
def test_ranks_train_on_stored_features_as_on_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one view that nothing is drawn for, a stored run and an encoding one read the same."""
    plain = "datasets.own.vis_processor.train.name=blip_image_eval"

    def ranks(name: str, *options: str) -> list[str]:
        output = f"run.output_dir={tmp_path / name}"
        path = project(tmp_path, batch_size_train=4)
        return run_ranks(train_command(path, plain, output, "run.features.views=1", *options), timeout=240.0)

    ranks("stored")
    monkeypatch.setenv("FEATURE_ROUNDED", "1")
    ranks("live", "run.cache_features=false")
    stored, live = (weights(tmp_path / name / "checkpoints/step_000009") for name in ("stored", "live"))
    assert_same_bits(stored, live)


@pytest.mark.slow
def test_ranks_outwait_another_build_that_takes_longer_than_the_timeout(tmp_path: Path) -> None:
    path = str(project(tmp_path, batch_size_eval=4))
    main(["features", "build", "--cfg-path", path])
    (folder,) = (tmp_path / "features").iterdir()
    with contextlib.ExitStack() as other:
        other.enter_context(locks.locked(folder / LOCK, what="stores features too"))
        threading.Timer(35.0, other.close).start()
        outputs = run_ranks([*BUILD, path, "--options", "run.timeout=0.2"], timeout=120.0)
    assert "waiting for another process that stores features" in outputs[0]


@pytest.mark.slow
def test_a_killed_build_goes_on_and_ranks_share_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(project(tmp_path, batch_size_eval=4))
    monkeypatch.setenv("FEATURE_SHARD_BYTES", str(PICTURE_BYTES))  # a picture a file
    slow = start([*BUILD, path], FEATURE_SECONDS="0.2")
    try:
        wait_for(lambda: len(files(tmp_path)) >= 3, seconds=240.0)
    finally:
        slow.send_signal(signal.SIGKILL)
        slow.communicate()
    done = {file: file.stat().st_mtime_ns for file in files(tmp_path)}
    assert 3 <= len(done) < 24
    for output in run_ranks([*BUILD, path], timeout=240.0):
        assert "Traceback" not in output
    assert len(files(tmp_path)) == 24
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert not list((tmp_path / "features").glob("*/.tmp-*"))
    built = {file.name: file.read_bytes() for file in files(tmp_path)}
    shutil.rmtree(tmp_path / "features")
    monkeypatch.setattr(feature_store, "SHARD_BYTES", PICTURE_BYTES)
    main(["features", "build", "--cfg-path", path])
    assert {file.name: file.read_bytes() for file in files(tmp_path)} == built


@pytest.mark.slow
def test_a_mistake_is_said_once_and_not_tried_again(tmp_path: Path) -> None:
    path = project(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start([*launch, "--max-restarts=1", *BUILD[1:], str(path)])
    _, err = process.communicate(timeout=240.0)
    assert process.returncode == 1, err[-3000:]
    said = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "no annotation file" in said[0], err[-3000:]

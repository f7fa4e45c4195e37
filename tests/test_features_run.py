"""Runs on stored features: the same losses as without, and what happens when something changed, broke or died."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
from collections import namedtuple
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import warnings_logged
from feature_world import PICTURE_BYTES, config, files, noise_pictures, prepared
from runner_helpers import assert_same_bits, logged, weights
from stage1_helpers import TinyPatches
from torch import Tensor, nn

from lavis_lite.common.config import Config
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.datasets import feature_store
from lavis_lite.datasets.order import CHOICE, seed_of
from lavis_lite.datasets.pictures import Pictures
from lavis_lite.models.vision.tower import VisionTower
from lavis_lite.runners import features, setup
from lavis_lite.runners.resume import StartPoint
from lavis_lite.runners.runner import Runner
from lavis_lite.runners.state import RunResult


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pictures a file."""
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 5 * PICTURE_BYTES)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images the encoder was given in each call."""
    calls: list[int] = []
    forward = TinyPatches.forward

    def counted(self: TinyPatches, image: Tensor) -> Tensor:
        calls.append(len(image))
        return forward(self, image)

    monkeypatch.setattr(TinyPatches, "forward", counted)
    return calls


def train(cfg: Config) -> RunResult:
    return Runner(cfg).train()


def told() -> AbstractContextManager[list[str]]:
    """Like `warnings_logged`, with what is no warning."""
    return warnings_logged(logging.INFO)


class LiveViews:
    """The same rows with the pictures themselves: of the fixed views the one that the row's seed draws."""

    def __init__(self, rows: Any, views: int) -> None:
        self.rows, self.count, self.name = rows, views, rows.name
        self.pictures = Pictures(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, *, seed: int) -> dict[str, Any]:
        views = self.pictures.views(self.pictures.of_row(index), count=self.count, seed=0)
        return {**self.rows.load(index, seed=seed), "image": views[seed_of(CHOICE, seed) % self.count]}

    def collate(self, samples: list[dict[str, Any]]) -> Any:
        return self.rows.collate(samples)


def rounding(precision: str) -> Any:
    """An encoder whose features are rounded as they are when stored."""
    forward = VisionTower.forward

    def rounded(self: VisionTower, images: Any) -> Tensor:
        made = forward(self, images)
        if precision != "int8":
            return made.to({"bf16": torch.bfloat16, "fp16": torch.float16}[precision]).float()
        scale = made.abs().amax(-1, keepdim=True) / 127
        return (made / scale).round().clamp(-127, 127) * scale

    return rounded


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_training_is_bit_for_bit_what_it_is_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int], precision: str
) -> None:
    settings = {"folder": str(tmp_path / "features"), "max_bytes": "1MB", "views": 3, "precision": precision}
    stored = train(config(tmp_path, output_dir=str(tmp_path / "stored"), features=settings))
    assert sum(encoded) == 24 * 3 + 1  # and one for the features' shape
    with monkeypatch.context() as changed:
        changed.setattr(
            setup,
            "with_features",
            lambda cfg, datasets, encoder: {"own": {"train": LiveViews(datasets["own"]["train"], 3)}},
        )
        changed.setattr(VisionTower, "forward", rounding(precision))
        live = train(config(tmp_path, output_dir=str(tmp_path / "live"), features=settings))
    assert logged(tmp_path / "stored") == logged(tmp_path / "live")
    assert_same_bits(weights(stored.checkpoint), weights(live.checkpoint))
    assert sum(encoded) == 24 * 3 + 1 + 9 * 8


def test_a_second_run_encodes_nothing_and_workers_change_nothing(tmp_path: Path, encoded: list[int]) -> None:
    first = train(config(tmp_path, output_dir=str(tmp_path / "first"), num_workers=2))
    assert len(files(tmp_path)) == 5
    encoded.clear()
    second = train(config(tmp_path, output_dir=str(tmp_path / "second")))
    assert encoded == [1, 1]  # it is only looked whether the encoder still makes the same
    assert_same_bits(weights(first.checkpoint), weights(second.checkpoint))


def test_changed_data_is_refused_before_its_features_are_made(tmp_path: Path, encoded: list[int]) -> None:
    train(config(tmp_path, save_every=4))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000009")
    (tmp_path / "run" / "summary.json").unlink()
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:-2]))
    encoded.clear()
    with pytest.raises(ConfigError, match=r"datasets\.own: .* now there are 22 rows"):
        train(config(tmp_path))
    assert not encoded


def test_a_resumed_run_is_bit_exact_and_other_views_are_another_run(tmp_path: Path) -> None:
    whole = train(config(tmp_path, output_dir=str(tmp_path / "whole"), save_every=4, keep_last=9))
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for step in (8, 9):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step_{step:06d}")
    (tmp_path / "part" / "summary.json").unlink()
    part = train(config(tmp_path, output_dir=str(tmp_path / "part"), num_workers=2))
    assert_same_bits(weights(whole.checkpoint), weights(part.checkpoint))
    assert logged(tmp_path / "whole") == logged(tmp_path / "part")
    for option in ("run.features.views=2", "run.cache_features=false"):
        with pytest.raises(ConfigError, match=f"a run that differs in {option.partition('=')[0]}"):
            train(config(tmp_path, option, output_dir=str(tmp_path / "part")))


def test_evaluation_may_read_stored_features(tmp_path: Path, encoded: list[int]) -> None:
    noise_pictures(tmp_path, 24)
    val = [
        "datasets.own.val.annotations=rows.jsonl",
        "datasets.own.val.images=images",
        "datasets.own.val.limit=8",
    ]
    results = {}
    for evaluation in ("false", "true"):
        options = [f"run.features.evaluation={evaluation}", *val]
        train(config(tmp_path, *options, output_dir=str(tmp_path / "warm")))  # what is missing is stored
        shutil.rmtree(tmp_path / "warm")
        encoded.clear()
        results[evaluation] = train(config(tmp_path, *options, output_dir=str(tmp_path / evaluation))).metrics
        assert (max(encoded) == 1) == (evaluation == "true")
    assert results["true"] == pytest.approx(results["false"], rel=0.01)
    assert len(files(tmp_path)) == 5 + 1


# What changed


@pytest.mark.parametrize(
    ("option", "differs"),
    [
        ("run.seed=7", "encoder.weights"),  # which draws the weights of this encoder
        ("model.vision_encoder.dropout=0.1", "encoder.dropout"),
        ("datasets.own.vis_processor.train.min_scale=0.4", "transform.scale, transform.transform"),
        ("run.features.seed=1", "seed"),
        ("run.features.precision=int8", "precision"),
    ],
)
def test_what_changed_is_told_and_stored_anew(tmp_path: Path, option: str, differs: str) -> None:
    prepared(tmp_path)
    with told() as messages:
        prepared(tmp_path, option)
    assert any(f"own train are stored anew: {differs} differs from those in" in m for m in messages), messages
    assert len(list((tmp_path / "features").iterdir())) == 2
    with told() as messages:
        prepared(tmp_path, option)
        prepared(tmp_path)
    assert not any("anew" in message for message in messages)


def test_only_the_file_of_a_changed_picture_is_built_again(tmp_path: Path, encoded: list[int]) -> None:
    before = prepared(tmp_path)["own"]["train"].load(7, seed=0)["image"].float()
    times = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    shutil.copy(tmp_path / "images" / "3.jpg", tmp_path / "images" / "7.jpg")
    encoded.clear()
    rows = prepared(tmp_path)["own"]["train"]
    assert sum(encoded) == 2 + 5 * 4
    assert [path.stat().st_mtime_ns == times[path] for path in files(tmp_path)] == [
        True,
        False,
        True,
        True,
        True,
    ]
    assert not torch.equal(rows.load(7, seed=0)["image"].float(), before)


def test_a_copy_of_the_pictures_elsewhere_reads_what_is_stored(
    tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, there = prepared(tmp_path), tmp_path / "scratch"
    shutil.copytree(tmp_path / "images", there / "images", copy_function=shutil.copyfile)
    shutil.copyfile(tmp_path / "rows.jsonl", there / "rows.jsonl")
    os.utime(there / "images" / "9.jpg", (5, 5))
    times = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    encoded.clear()
    with told() as messages:
        rows = prepared(tmp_path, f"datasets.own.root={there}")["own"]["train"]
    assert rows.image_path(3).startswith(str(there)) and encoded == [1, 1]
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path)} == times
    assert any("24 pictures have other times, so that their contents are compared" in m for m in messages)
    row = (rows.load(9, seed=3)["image"], first["own"]["train"].load(9, seed=3)["image"])
    assert torch.equal(row[0].float(), row[1].float())
    # What was compared once is known from then on, wherever it is.
    monkeypatch.setattr(Pictures, "content", lambda *_: pytest.fail("read again"))
    prepared(tmp_path, f"datasets.own.root={there}")


def test_a_picture_that_changed_while_copied_is_noticed(tmp_path: Path, encoded: list[int]) -> None:
    prepared(tmp_path)
    path = tmp_path / "images" / "7.jpg"
    path.write_bytes(path.read_bytes()[:-60] + bytes(60))  # as long as before
    encoded.clear()
    prepared(tmp_path)
    assert sum(encoded) == 2 + 5 * 4
    encoded.clear()
    prepared(tmp_path)
    assert encoded == [1, 1]


def test_equal_paths_of_another_dataset_are_its_own(tmp_path: Path, encoded: list[int]) -> None:
    """Views depend on the dataset's name, also where names become one in a folder's."""
    cfg = config(tmp_path)
    for name in ("a-b", "a_b"):
        datasets = {name: {"train": setup.build_base(cfg, model_cfg=cfg.model).datasets["own"]["train"]}}
        features.prepare(cfg, datasets, setup.encoder_of(setup.build_base(cfg, model_cfg=cfg.model)))
    assert len({path.parent for path in files(tmp_path)}) == 2


def test_more_pictures_keep_what_is_stored(tmp_path: Path, encoded: list[int]) -> None:
    prepared(tmp_path, "datasets.own.train.limit=10")
    encoded.clear()
    prepared(tmp_path)
    assert len(files(tmp_path)) == 5 and sum(encoded) == 2 + 14 * 4


def test_an_encoder_whose_code_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = prepared(tmp_path)["own"]["train"].load(23, seed=0)["image"].float()
    monkeypatch.setattr(
        TinyPatches, "forward", lambda self, image: self.patches(image).flatten(2).transpose(1, 2) * 1.1
    )
    with warnings_logged() as messages:
        rows = prepared(tmp_path)["own"]["train"]
    assert any(
        "built again: the encoder now makes others of the same picture" in message for message in messages
    )
    assert torch.allclose(rows.load(23, seed=0)["image"].float(), before * 1.1, rtol=0.02)


# What broke


def test_a_broken_picture_is_counted_logged_once_and_replaced(tmp_path: Path) -> None:
    noise_pictures(tmp_path, 24)
    broken = tmp_path / "images" / "6.jpg"
    broken.write_bytes(broken.read_bytes()[:40])
    cfg = config(tmp_path, "run.max_bad_fraction=0.2", max_steps=12)
    with warnings_logged() as messages:
        train(cfg)
    about = [message for message in messages if "6.jpg" in message]
    assert len(about) == 2 and "no features are stored" in about[0] and "replaced by another row" in about[1]
    rows = logged(tmp_path / "run")
    assert 2 <= rows[-1]["bad_images"] <= 6
    again = config(tmp_path, "run.max_bad_fraction=0.2", max_steps=12, output_dir=str(tmp_path / "again"))
    train(again)
    assert logged(tmp_path / "again") == rows


def test_too_many_broken_pictures_stop_the_build(tmp_path: Path) -> None:
    noise_pictures(tmp_path, 60)
    for row in range(2, 50):
        (tmp_path / "images" / f"{row}.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"of \d+ reads failed, more than run.max_bad_fraction=0.01 allows"):
        prepared(tmp_path)


def test_features_that_the_precision_cannot_hold_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TinyPatches.forward
    monkeypatch.setattr(TinyPatches, "forward", lambda self, image: forward(self, image) * 1e6)
    with pytest.raises(
        DataError, match=r"images/0.jpg are not finite in fp16 .*set run.features.precision=bf16"
    ):
        prepared(tmp_path, "run.features.precision=fp16")


# Disk space


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_disk_space_is_estimated_and_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = r"stored features take 18.4 kB \(24 pictures x 4 views x 4 tokens x 24 in bf16\)"
    settings = {"folder": str(tmp_path / "features")}
    with pytest.raises(
        ConfigError, match=f"cache_features: {need}; agree to that with run.features.max_bytes=18432,"
    ):
        prepared(tmp_path, features=settings)
    with pytest.raises(ConfigError, match=f"max_bytes: {need}, more than the 9 kB allowed; raise it"):
        prepared(tmp_path, features={**settings, "max_bytes": "9kB"})
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
        with pytest.raises(
            DataError, match=f"{need}, of which 18.4 kB are missing, and the disk .* has 5 kB left"
        ):
            prepared(tmp_path, features={**settings, "max_bytes": "1MB"})
    assert files(tmp_path) == []
    for answer, agreed in (("n\n", False), ("", False), ("y\n", True)):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        monkeypatch.setattr(sys, "stderr", asked := Terminal())
        if agreed:
            prepared(tmp_path, features=settings)
        else:
            with pytest.raises(ConfigError, match="agree to that"):
                prepared(tmp_path, features=settings)
        assert "18.4 kB" in asked.getvalue() and "[y/N]" in asked.getvalue()
    assert len(files(tmp_path)) == 5
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    prepared(tmp_path, features=settings)  # nothing is missing, nothing is asked


def test_only_the_encoder_is_on_the_device_when_features_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    move, make = nn.Module.to, setup.with_features

    def noted(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        moved.extend(f"{type(module).__name__} to {a}" for a in args if isinstance(a, (torch.device, str)))
        return move(module, *args, **kwargs)

    def made(*args: Any) -> Any:
        moved.append("features")
        return make(*args)

    monkeypatch.setattr(nn.Module, "to", noted)
    monkeypatch.setattr(setup, "with_features", made)
    setup.build_parts(config(tmp_path), StartPoint())
    assert moved[:3] == ["VisionTower to cpu", "features", "VisionTower to cpu"]


# What can't be stored


def test_a_trained_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"the image encoder is trained \(model.vision_encoder.freeze=false\)"
    ):
        train(config(tmp_path, "model.vision_encoder.freeze=false"))


def test_models_without_encoder_and_rows_without_pictures_are_refused(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    no_encoder = Config(cfg.run, {"arch": "fake_mlp"}, cfg.datasets, cfg.task)
    with pytest.raises(ConfigError, match="model 'fake_mlp' has no image encoder"):
        features.check_encoder(no_encoder)
    no_pictures = Config(cfg.run, cfg.model, {"fake": {"builder": "fake_rows"}}, cfg.task)
    base = setup.build_base(no_pictures, model_cfg=cfg.model)
    with pytest.raises(ConfigError, match=r"dataset 'fake' \(FakeRows\) has no picture files"):
        features.with_features(no_pictures, base.datasets, setup.encoder_of(base))

"""The `shapes` builder: draws the world when it isn't there, then reads it as any user's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lavis_lite.common.config import load_dataset_preset, merge
from lavis_lite.common.errors import ConfigError
from lavis_lite.datasets.builders import build_datasets, make_builder
from lavis_lite.datasets.loader import eval_loader
from lavis_lite.worlds.shapes.captions import captions
from lavis_lite.worlds.shapes.scene import sample_scene

SMALL = {"train": 24, "val": 6, "test": 6}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path))
    return tmp_path


def section(**changes: object) -> dict[str, object]:
    return merge(load_dataset_preset("shapes_caption"), {**SMALL, **changes})


def test_preset_gives_three_splits_of_captioned_pictures() -> None:
    splits = build_datasets({"shapes_caption": section()})["shapes_caption"]
    # Every picture has two captions; how many rows that makes in training is the generic builder's business.
    assert {name: len(rows) for name, rows in splits.items() if name != "train"} == {"val": 6, "test": 6}
    scene = sample_scene(seed=0, split="val", index=2)
    assert splits["val"].captions(2) == captions(scene)
    row = splits["train"].load(5, seed=3)
    assert row["image"].shape == (3, 64, 64) and row["text_input"]
    assert torch.equal(row["image"], splits["train"].load(5, seed=3)["image"])
    (batch,) = eval_loader(splits["val"], batch_size=6)
    assert batch["image"].shape == (6, 3, 64, 64)
    assert 0.5 < batch["image"].std() < 1.5


def test_rows_of_captions_share_their_pictures_number() -> None:
    rows = build_datasets({"shapes_caption": section(split_captions=True)})["shapes_caption"]
    assert len(rows["train"]) == 48 and len(rows["val"]) == 6
    first, second, third = (rows["train"].load(index, seed=0) for index in range(3))
    assert first["image_id"] == second["image_id"] != third["image_id"]
    assert first["text_input"] != second["text_input"]
    held_out = build_datasets({"shapes_caption": section(split_captions=True, train=0)})["shapes_caption"]
    assert set(held_out) == {"val", "test"}
    with pytest.raises(ConfigError, match="questions are rows of their own"):
        make_builder("shapes_vqa", {"builder": "shapes", "texts": "questions", "split_captions": True})
    both = {"train": {"images": "x", "group_by_image": True, "split_captions": True}}
    with pytest.raises(ConfigError, match="set one"):
        make_builder("mine", both)


def test_checking_a_configuration_draws_nothing(cache: Path) -> None:
    make_builder("shapes_caption", section())
    assert list(cache.iterdir()) == []


def test_mistakes_are_named_before_anything_is_drawn(cache: Path) -> None:
    with pytest.raises(ConfigError, match="image_size must be from 16"):
        make_builder("shapes_caption", section(image_size=4))
    with pytest.raises(ConfigError, match=r"unknown key 'datasets\.shapes_caption\.trian'"):
        make_builder("shapes_caption", section(trian=3))
    with pytest.raises(ConfigError, match="shapes_image_train"):
        make_builder("shapes_caption", section(vis_processor={"train": {"name": "shapes_image_trian"}}))
    assert list(cache.iterdir()) == []


def test_a_split_can_be_left_out() -> None:
    splits = build_datasets({"shapes_caption": section(test=0)})["shapes_caption"]
    assert set(splits) == {"train", "val"}

"""The `datasets` section: presets, paths, processors, and each mistake as one line that names its key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_jsonl, save_picture
from shard_helpers import write_shards

from lavis_lite.common.config import PRESETS, load_config, load_dataset_preset
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.datasets.builders import build_dataset_from_preset, build_datasets, validate_datasets_config
from lavis_lite.datasets.image_text import ImageTextDataset
from lavis_lite.processors.image import BlipImageEval
from lavis_lite.processors.text import BlipCaption

CARDS = Path(__file__).resolve().parents[1] / "dataset_card"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def train(section: dict[str, Any], name: str = "own") -> ImageTextDataset:
    built = build_datasets({name: section})[name]["train"]
    assert isinstance(built, ImageTextDataset)
    return built


# --- presets ------------------------------------------------------------------------------------------------


def test_every_preset_is_valid_and_has_a_card() -> None:
    names = sorted(path.stem for path in (PRESETS / "datasets").rglob("*.yaml"))
    expected = {
        "coco_caption",
        "coco_caption_2017",
        "vg_caption",
        "flickr30k",
        "cc3m",
        "cc12m",
        "sbu",
        "laion115m",
        "laion400m",
        "nocaps",
    }
    assert expected <= set(names) and len(names) >= len(expected)
    for name in names:
        card = CARDS / ("shapes.md" if name.startswith("shapes") else f"{name}.md")
        assert card.is_file(), f"no {card}"
        validate_datasets_config({name: load_dataset_preset(name)})
        if card.stem == name:
            text = card.read_text(encoding="utf-8")
            for part in (
                "**Source**",
                "**Licence**",
                "**Content**",
                "**Fields**",
                "## Obtain it",
                "## Layout",
                f"# {name}:",
            ):
                assert part in text, f"{card}: {part}"


@pytest.mark.parametrize(
    "name", ["coco_caption", "coco_caption_2017", "flickr30k", "vg_caption", "cc3m", "cc12m", "sbu"]
)
def test_a_preset_without_its_files_says_what_where_and_how(name: str, cache: Path) -> None:
    with pytest.raises(DataError) as caught:
        build_dataset_from_preset(name)
    message = str(caught.value)
    assert str(cache / name) in message and "\n" not in message
    assert (
        f"set datasets.{name}.train." in message and f"dataset_card/{name}.md says how to get it" in message
    )


def test_presets_read_the_layout_their_cards_show(tmp_path: Path, cache: Path) -> None:
    def image(number: int, split: str) -> dict[str, Any]:
        save_picture(cache / "coco_caption" / "images" / "val2014" / f"{number}.jpg", number)
        return {
            "filepath": "val2014",
            "filename": f"{number}.jpg",
            "cocoid": number,
            "split": split,
            "sentences": [{"raw": f"A Picture, {split}."}],
        }

    splits = ["train", "restval", "val", "test", "test"]
    content = {"images": [image(number, split) for number, split in enumerate(splits)]}
    (cache / "coco_caption" / "dataset_coco.json").write_text(json.dumps(content), encoding="utf-8")
    write_shards(cache / "cc3m" / "shards", 2, 3)
    for number in range(4):
        save_picture(cache / "cc12m" / "train" / "00000" / f"{number}.jpg", number)
        (cache / "cc12m" / "train" / "00000" / f"{number}.txt").write_text("a caption", encoding="utf-8")
    coco = build_dataset_from_preset("coco_caption")
    assert {split: len(rows) for split, rows in coco.items()} == {"train": 2, "val": 1, "test": 2}
    assert coco["val"].captions(0) == ["a picture, val"] and coco["val"].image(0).size == (40, 30)
    # LAVIS's row lists instead, by overriding the preset.
    make_jsonl(tmp_path / "rows", 2)
    other = {"annotations": "rows/rows.jsonl", "images": "rows/images", "format": "auto", "where": None}
    lists = {"root": str(tmp_path), "train": other, "val": None, "test": None}
    assert len(build_dataset_from_preset("coco_caption", lists)["train"]) == 2
    assert len(build_dataset_from_preset("cc3m")["train"]) == 6
    folder = {"builder": "image_text", "train": {"images": "train"}}  # another builder than the preset's
    assert len(build_dataset_from_preset("cc12m", folder)["train"]) == 4


def test_nocaps_reads_the_official_file_with_each_pictures_domain(cache: Path) -> None:
    domains = ["in-domain", "near-domain", "out-domain"]
    images = []
    for number, domain in enumerate(domains):
        save_picture(cache / "nocaps" / "val" / f"{number:016x}.jpg", number)
        images.append(
            {"id": number, "file_name": f"{number:016x}.jpg", "domain": domain, "coco_url": "http://x"}
        )
    annotations = [{"image_id": n % 3, "id": n, "caption": f"Caption {n}."} for n in range(6)]
    content = {"licenses": [], "info": {}, "images": images, "annotations": annotations}
    (cache / "nocaps" / "nocaps_val_4500_captions.json").write_text(json.dumps(content), encoding="utf-8")
    built = build_dataset_from_preset("nocaps")
    assert list(built) == ["val"]
    records = [built["val"].record(row) for row in range(3)]  # type: ignore[attr-defined]
    assert [record.group for record in records] == domains
    assert records[1].captions == ["Caption 1.", "Caption 4."] and records[1].image_id == 1


# --- paths --------------------------------------------------------------------------------------------------


def test_paths_are_absolute_or_start_from_root_cache_or_the_working_directory(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_jsonl(tmp_path / "data", 2)
    relative = {"annotations": "rows.jsonl", "images": "images"}
    absolute = {key: str(tmp_path / "data" / path) for key, path in relative.items()}
    assert len(train({"train": absolute})) == 2
    assert len(train({"train": relative, "root": str(tmp_path / "data")})) == 2
    monkeypatch.setenv("MY_DATA", str(tmp_path / "data"))
    assert len(train({"train": relative, "root": "$MY_DATA"})) == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(train({"train": relative, "root": "~/data"})) == 2
    monkeypatch.chdir(tmp_path / "data")
    assert len(train({"train": relative})) == 2
    make_jsonl(cache / "own", 3)
    assert len(train({"train": relative})) == 3
    # Without an image folder, picture paths start from the dataset's root.
    (tmp_path / "data" / "here.jsonl").write_text(
        '{"image": "images/1.jpg", "caption": "x"}\n', encoding="utf-8"
    )
    assert train({"root": ".", "train": {"annotations": "here.jsonl"}})[0]["image"].size == (40, 30)


def test_missing_files_are_named_before_anything_is_converted(tmp_path: Path, cache: Path) -> None:
    make_jsonl(tmp_path, 2)
    good = {"annotations": "rows.jsonl", "images": "images"}
    section: dict[str, Any] = {
        "root": str(tmp_path),
        "train": good,
        "val": {**good, "annotations": "val.jsonl"},
    }
    with pytest.raises(DataError) as caught:
        build_datasets({"own": section})
    assert str(caught.value) == (
        f"dataset 'own': no annotation file {tmp_path / 'val.jsonl'}; "
        "set datasets.own.val.annotations=<path> or datasets.own.root=<folder>, "
        "or leave the split out with datasets.own.val=null"
    )
    assert not (cache / "tables").exists()
    section["val"] = [good, {**good, "images": "imags"}]
    with pytest.raises(
        DataError, match=rf"no image folder {tmp_path / 'imags'}; set datasets\.own\.val\[1\]\.images="
    ):
        build_datasets({"own": section})
    with pytest.raises(
        DataError, match=r"no annotation file .*cache/own/a\.jsonl or .*/a\.jsonl; set datasets"
    ):
        build_datasets({"own": {"train": {"annotations": "a.jsonl"}}})


def test_a_folder_that_holds_none_of_the_pictures_is_the_wrong_one(tmp_path: Path) -> None:
    make_jsonl(tmp_path, 40)
    (tmp_path / "images" / "0.jpg").unlink()
    assert (
        len(train({"root": str(tmp_path), "train": {"annotations": "rows.jsonl", "images": "images"}})) == 40
    )
    expected = (
        rf"none of \d+ pictures .* exists, for example {tmp_path}/0\.jpg; set datasets\.own\.train\.images"
    )
    with pytest.raises(DataError, match=expected):
        train({"root": str(tmp_path), "train": {"annotations": "rows.jsonl"}})
    (tmp_path / "urls.csv").write_text("image,caption\nhttp://a.b/c.jpg,x\n", encoding="utf-8")
    with pytest.raises(DataError, match="these are addresses: fetch the pictures first"):
        train({"root": str(tmp_path), "train": {"annotations": "urls.csv"}})


# --- the section --------------------------------------------------------------------------------------------


def test_fields_limit_and_processors_reach_the_dataset(tmp_path: Path) -> None:
    make_jsonl(tmp_path, 5)
    lines = [f'{{"url": "{n}.jpg", "text": "Nr. {n}", "nr": {n % 2}}}' for n in range(5)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = build_datasets(
        {
            "own": {
                "root": str(tmp_path),
                "fields": {"image": "url", "caption": "text", "image_id": "nr"},
                "train": {"annotations": "own.jsonl", "images": "images"},
                "val": {"annotations": "own.jsonl", "images": "images", "limit": 2},
                "vis_processor": {
                    "train": {"image_size": 24},
                    "eval": {"name": "blip_image_eval", "image_size": [8, 12]},
                },
                "text_processor": {"train": {"prompt": "a photo of ", "max_words": 2}},
                "limit": 4,
            }
        }
    )["own"]
    train, val = data["train"], data["val"]
    assert isinstance(train, ImageTextDataset) and isinstance(val, ImageTextDataset)
    assert len(train) == 4 and len(val) == 2
    assert train.load(3, seed=0)["image"].shape == (3, 24, 24) and val.load(0, seed=0)["image"].shape == (
        3,
        8,
        12,
    )
    assert train.captions(3) == ["a photo of nr 3"] and val.captions(1) == ["nr 1"]
    assert (
        train.load(1, seed=0)["image_id"]
        == train.load(3, seed=0)["image_id"]
        != train.load(0, seed=0)["image_id"]
    )
    assert isinstance(val.vis_processor, BlipImageEval) and isinstance(val.text_processor, BlipCaption)


def test_evaluation_splits_join_the_rows_of_a_picture_and_training_does_not(tmp_path: Path) -> None:
    make_jsonl(tmp_path, 2)
    rows = [f'{{"image": "{n % 2}.jpg", "caption": "c{n}"}}' for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    split = {"annotations": "rows.jsonl", "images": "images"}
    data = build_datasets({"own": {"root": str(tmp_path), "train": split, "val": split}})["own"]
    assert len(data["train"]) == 6 and len(data["val"]) == 2
    assert data["val"].captions(1) == ["c1", "c3", "c5"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"train": {"annotation": "a"}},
            "unknown key 'datasets.own.train.annotation'; did you mean 'annotations'",
        ),
        ({"trian": {"annotations": "a"}}, "unknown key 'datasets.own.trian'; did you mean 'train'"),
        ({"train": {"annotations": 5}}, "datasets.own.train.annotations: expected str"),
        (
            {"train": {"annotations": "a", "format": "jsno"}},
            "datasets.own.train.format: 'jsno' (str) is not one of",
        ),
        (
            {"train": {"annotations": "a", "fields": {"img": "x"}}},
            "unknown key 'datasets.own.train.fields.img'",
        ),
        ({"train": [{"annotations": "a"}, {"image": "b"}]}, "unknown key 'datasets.own.train[1].image'"),
        ({"train": {"limit": 3}}, "set datasets.own.train.annotations to a file"),
        ({"train": {"annotations": "a", "limit": 0}}, "datasets.own.train.limit must be at least 1"),
        ({"train": "a.json"}, "datasets.own.train: expected"),
        (
            {"train": {"annotations": "a/00.tar"}},
            "set datasets.own.builder=shards and datasets.own.train.shards to",
        ),
        ({}, "datasets.own: no split is set and there is no preset of that name"),
        ({"train": {"images": "a"}, "ratio": -1}, "datasets.own.ratio can't be negative"),
        ({"train": {"images": "a"}, "ratio": "much"}, "datasets.own.ratio: expected float"),
        (
            {"train": {"images": "a"}, "vis_processor": {"trian": {}}},
            "unknown key 'datasets.own.vis_processor.trian'; did you mean 'train'",
        ),
        (
            {"train": {"images": "a"}, "vis_processor": {"train": {"image_sz": 3}}},
            "unknown key 'datasets.own.vis_processor.train.image_sz'; did you mean 'image_size'",
        ),
        (
            {"train": {"images": "a"}, "text_processor": {"eval": {"name": "blip_captoin"}}},
            "unknown processor 'blip_captoin', did you mean 'blip_caption'",
        ),
        (
            {"val": {"annotations": "a"}, "split_captions": True},
            "unknown key 'datasets.own.split_captions'; it is one of a split: datasets.own.val.split_captions",
        ),
        (
            {"builder": "vqa", "questions": "a"},
            "unknown key 'datasets.own.questions'; it is one of a split: datasets.own.train.questions",
        ),
        ({"builder": "imagetext"}, "unknown builder 'imagetext', did you mean 'image_text'"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        validate_datasets_config({"own": section})
    assert "\n" not in str(caught.value)


def test_a_split_s_key_beside_the_splits_is_told_with_the_configuration(tmp_path: Path) -> None:
    project = tmp_path / "own.yaml"
    project.write_text(
        "model: {arch: blip2, model_type: shapes}\ntask: {name: retrieval}\n"
        "datasets: {own: {train: {images: a}, split_captions: true}}\n"
    )
    with pytest.raises(ConfigError, match=r"one of a split: datasets\.own\.train\.split_captions"):
        load_config(project)


def test_a_misspelt_preset_is_recognised() -> None:
    with pytest.raises(ConfigError, match="no preset of that name, did you mean 'coco_caption"):
        validate_datasets_config({"coco_captions": {}})

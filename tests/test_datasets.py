"""Pictures of every kind, broken ones among them, and rows as a pure function of (index, seed)."""

from __future__ import annotations

import io
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import COCO_MINI, make_jsonl, needs_coco_mini, save_picture, warnings_logged
from PIL import Image

from lavis_lite.common.errors import DataError
from lavis_lite.datasets.base import MapDataset, UnreadableSample
from lavis_lite.datasets.builders import build_datasets
from lavis_lite.datasets.image_text import ImageTextDataset
from lavis_lite.datasets.images import read_image
from lavis_lite.datasets.loader import TrainLoader, eval_loader

SMALL = {"vis_processor": {"train": {"image_size": 32}, "eval": {"image_size": 32}}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))


def jsonl_dataset(folder: Path, rows: int = 6, name: str = "tiny", **extra: Any) -> ImageTextDataset:
    make_jsonl(folder, rows, **extra)
    section = {"root": str(folder), "train": {"annotations": "rows.jsonl", "images": "images"}, **SMALL}
    built = build_datasets({name: section})[name]["train"]
    assert isinstance(built, ImageTextDataset) and isinstance(built, MapDataset)
    return built


# --- pictures -----------------------------------------------------------------------------------------------


def grey_ramp() -> np.ndarray:
    return np.tile(np.linspace(0, 255, 32).astype(np.uint8), (16, 1))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_rgb_with_its_brightness(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(grey_ramp())
    path = tmp_path / (
        "picture.jpg" if mode in ("CMYK", "YCbCr") else "picture.tif" if mode in ("I", "F") else "picture.png"
    )
    if mode == "I;16":
        Image.fromarray(grey_ramp().astype(np.uint16) * 257).save(path)
    elif mode == "I":
        Image.fromarray(grey_ramp().astype(np.int32) * 257).save(path)
    elif mode == "F":
        Image.fromarray(grey_ramp().astype(np.float32) / 255).save(path)
    else:
        grey.convert("RGB").convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (32, 16)
    values = np.asarray(image, np.float32).mean((0, 2))
    if mode == "1":
        assert set(np.unique(np.asarray(image))) <= {0, 255}
    else:
        np.testing.assert_allclose(values, grey_ramp()[0], atol=20 if mode in ("CMYK", "P") else 6)


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:, 2:] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "b.png", transparency=0)
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "a.png").getpixel((3, 0)) == (255, 0, 0)
    assert read_image(tmp_path / "b.png").getpixel((0, 0)) == (255, 255, 255)


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :24] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "turned.jpg")
    assert image.size == (16, 48)
    assert np.asarray(image)[4].mean() > 250 and np.asarray(image)[44].mean() < 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF"])
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    whole = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(whole, kind)
    outcomes = set()
    for _ in range(100):
        content = np.frombuffer(whole.getvalue(), np.uint8).copy()
        places = rng.integers(0, min(len(content), rng.choice([40, 400, 10_000])), 3)
        content[places] = rng.integers(0, 256, 3)
        (tmp_path / "a").write_bytes(content[: rng.integers(1, len(content) * 2)].tobytes())
        try:
            outcomes.add(read_image(tmp_path / "a").mode)
        except UnreadableSample:
            outcomes.add("unreadable")
    assert "unreadable" in outcomes and outcomes <= {"RGB", "unreadable"}


def test_unreadable_files_say_why(tmp_path: Path) -> None:
    save_picture(tmp_path / "whole.jpg", size=(200, 200))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-400])
    save_picture(tmp_path / "whole.png", size=(200, 200))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    for name, reason in {
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "empty.jpg": "the file is empty",
        "page.jpg": "not a picture",
        "absent.jpg": "no such file",
        ".": "directory",
    }.items():
        with pytest.raises(UnreadableSample, match=reason) as caught:
            read_image(tmp_path / name)
        assert caught.value.path == str(tmp_path / name)


# --- rows ---------------------------------------------------------------------------------------------------


def test_rows_are_a_function_of_index_and_seed(tmp_path: Path) -> None:
    data = jsonl_dataset(tmp_path, captions=3)
    torch.manual_seed(1)
    first = data.load(2, seed=11)
    state = torch.get_rng_state()
    second = data.load(2, seed=11)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["image"], second["image"]) and first["text_input"] == second["text_input"]
    texts = {data.load(2, seed=seed)["text_input"] for seed in range(40)}
    assert texts == {f"row 2 caption {k}" for k in range(3)}
    assert data.captions(2) == [f"row 2 caption {k}" for k in range(3)]


def test_batches_have_the_contracts_fields(tmp_path: Path) -> None:
    data = jsonl_dataset(tmp_path)
    batch = data.collate([data.load(row, seed=0) for row in (4, 1)])
    assert batch["image"].shape == (2, 3, 32, 32) and batch["image"].dtype == torch.float32
    assert batch["index"].tolist() == [4, 1] and batch["image_id"].dtype == torch.int64
    assert [text.split(" caption")[0] for text in batch["text_input"]] == ["row 4", "row 1"]


def test_a_row_as_people_look_at_it(tmp_path: Path) -> None:
    data = jsonl_dataset(tmp_path, image_id=5)
    row = data[-1]
    assert row["text_input"] == "row 5 caption 0" and len(row["captions"]) == 2 and row["image_id"] == 5
    assert row["image"].mode == "RGB" and row["image"].size == (40, 30)
    assert len(list(data)) == 6
    with pytest.raises(IndexError, match="row 6 of dataset 'tiny', which has 6"):
        data[6]


def test_picture_numbers_meet_only_within_a_dataset(tmp_path: Path) -> None:
    with_numbers = jsonl_dataset(tmp_path / "a", image_id=7, name="a")
    other = jsonl_dataset(tmp_path / "b", image_id=7, name="b")
    without = jsonl_dataset(tmp_path / "c", name="c")

    def numbers(data: ImageTextDataset) -> set[int]:
        return {data.load(row, seed=0)["image_id"] for row in range(len(data))}

    assert len(numbers(with_numbers)) == len(numbers(other)) == 1
    assert len(numbers(without)) == 6
    assert len(numbers(with_numbers) | numbers(other) | numbers(without)) == 8
    assert min(numbers(without)) >= 0  # negative ones belong to callers without numbers


def test_datasets_travel_to_worker_processes_as_a_few_bytes(tmp_path: Path) -> None:
    data = jsonl_dataset(tmp_path)
    packed = pickle.dumps(data)
    assert len(packed) < 10_000
    assert torch.equal(pickle.loads(packed).load(3, seed=5)["image"], data.load(3, seed=5)["image"])


def test_parts_follow_each_other(tmp_path: Path) -> None:
    for part in ("a", "b"):
        make_jsonl(tmp_path / part, 3)
    parts = [{"annotations": f"{part}/rows.jsonl", "images": f"{part}/images"} for part in ("a", "b")]
    data = build_datasets({"both": {"root": str(tmp_path), "train": parts, **SMALL}})["both"]["train"]
    assert isinstance(data, ImageTextDataset)
    assert [data.image_path(row) for row in (2, 3, -1)] == [
        str(tmp_path / "a" / "images" / "2.jpg"),
        str(tmp_path / "b" / "images" / "0.jpg"),
        str(tmp_path / "b" / "images" / "2.jpg"),
    ]
    assert len({data.load(row, seed=0)["image_id"] for row in range(6)}) == 6


def test_bad_files_among_good_ones(tmp_path: Path) -> None:
    """A folder with captions: truncated, greyscale, CMYK, missing caption, caption that isn't UTF-8."""
    root = tmp_path / "pictures"
    for number in range(60):
        save_picture(root / f"{number:02d}.jpg", number)
        (root / f"{number:02d}.txt").write_text(f"picture {number}", encoding="utf-8")
    (root / "00.jpg").write_bytes((root / "00.jpg").read_bytes()[:300])
    Image.new("L", (40, 30), 90).save(root / "01.jpg")
    Image.new("CMYK", (40, 30), (10, 80, 90, 0)).save(root / "02.jpg")
    (root / "03.txt").write_bytes(b"K\xe4tzchen")
    (root / "04.txt").unlink()
    data = build_datasets({"own": {"train": {"images": str(root)}, "val": {"images": str(root)}, **SMALL}})[
        "own"
    ]
    loader = TrainLoader([data["train"]], batch_size=6, max_bad_fraction=0.1)
    with warnings_logged() as lines:
        rows = [row for batch in itertools.islice(loader.batches(0), 20) for row in batch["index"].tolist()]
    assert set(rows) == set(range(60)) - {0, 3, 4} and loader.seen == 120
    assert len(lines) == 3 and all("unreadable, replaced by another row: " in line for line in lines)
    for name, reason in [
        ("00.jpg", "truncated"),
        ("03.txt", "not valid UTF-8 (byte 1)"),
        ("04.txt", "no caption file"),
    ]:
        assert (
            sum(
                str(root / name) in line and reason in line.replace("Truncated", "truncated")
                for line in lines
            )
            == 1
        )
    evaluated = eval_loader(data["val"], batch_size=7, max_bad_fraction=0.1)
    assert [row for batch in evaluated for row in batch["index"].tolist()] == [*range(1, 3), *range(5, 60)]
    assert data["val"].captions(3) == [] and data["val"].captions(5) == ["picture 5"]


# --- photographs --------------------------------------------------------------------------------------------


def coco_mini(root: Path) -> dict[str, Any]:
    return {
        "root": str(root),
        "train": {"annotations": "annotations/captions_train2017.json", "images": "train2017"},
        "val": {"annotations": "annotations/captions_val2017.json", "images": "val2017"},
        **SMALL,
    }


@needs_coco_mini
def test_photographs_of_coco(tmp_path: Path) -> None:
    data = build_datasets({"coco_caption_2017": coco_mini(COCO_MINI)})["coco_caption_2017"]
    assert {split: len(rows) for split, rows in data.items()} == {"train": 80, "val": 79}
    assert sum(len(data[split].captions(row)) for split in data for row in range(len(data[split]))) == 795
    loader = TrainLoader([data["train"]], batch_size=20)
    batches = list(itertools.islice(loader.batches(0), 4))
    assert loader.bad_images == 0 and len({n for b in batches for n in b["image_id"].tolist()}) == 80
    assert all(0.2 < batch["image"].std() < 2.0 for batch in batches)


@needs_coco_mini
def test_photographs_with_a_missing_one_and_a_caption_file_that_is_not_utf8(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    text = (COCO_MINI / "annotations" / "captions_val2017.json").read_text(encoding="utf-8")
    content = json.loads(text)
    (root / "annotations" / "captions_val2017.json").write_text(text, encoding="utf-8")
    (root / "val2017").mkdir()
    for image in content["images"][1:]:
        (root / "val2017" / image["file_name"]).symlink_to(COCO_MINI / "val2017" / image["file_name"])
    section = {**coco_mini(root), "train": None}
    data = build_datasets({"coco": section})["coco"]["val"]
    loader = eval_loader(data, batch_size=32)
    assert sum(len(batch["index"]) for batch in loader) == 78 and loader.bad_images == 1
    broken = (
        text.replace("captions", "captions", 1).encode().replace(b'"caption": "A ', b'"caption": "\xc4 ', 1)
    )
    (root / "annotations" / "captions_val2017.json").write_bytes(broken)
    with pytest.raises(DataError, match=r"captions_val2017\.json, line \d+: not valid UTF-8 \(byte 0xc4\)"):
        build_datasets({"coco": section})

"""The embedded world: scenes, pictures and what is written to disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavis_lite.common.errors import ConfigError
from lavis_lite.worlds.shapes import writer
from lavis_lite.worlds.shapes.render import RGB, object_mask, render
from lavis_lite.worlds.shapes.scene import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    SceneObject,
    bucket,
    sample_scene,
)
from lavis_lite.worlds.shapes.writer import WorldSpec, write_world


def scenes(split: str = "train", count: int = 300, seed: int = 0) -> list[Scene]:
    return [sample_scene(seed=seed, split=split, index=index) for index in range(count)]


def test_scene_is_a_pure_function_of_its_arguments() -> None:
    assert scenes(count=20) == scenes(count=20)
    assert scenes(count=20) != scenes(count=20, seed=1)
    # A fixed value: another Python or another platform must draw the same world.
    assert sample_scene(seed=0, split="train", index=0).key == FIRST_KEY


FIRST_KEY = "black; large green cross 4; small orange triangle 6; large red star 8"


def test_splits_share_no_content_even_across_seeds() -> None:
    keys = {split: {s.key for seed in (0, 1) for s in scenes(split, 200, seed)} for split in SPLITS}
    assert not keys["train"] & keys["val"]
    assert not keys["train"] & keys["test"]
    assert not keys["val"] & keys["test"]
    assert {bucket(s) for s in scenes("test", 60)} == {2, 3}


def test_objects_are_inside_apart_and_well_inside_their_cells() -> None:
    for scene in scenes():
        assert len({item.cell for item in scene.objects}) == len(scene.objects)
        assert [item.cell for item in scene.objects] == sorted(item.cell for item in scene.objects)
        for number, item in enumerate(scene.objects):
            x, y, width, height = item.box
            assert min(x, y) >= 0 and max(x + width, y + height) <= 1
            assert (int(item.y * 3), int(item.x * 3)) == (item.row, item.column)
            for place in (item.x * 3 % 1, item.y * 3 % 1):
                assert 0.12 < place < 0.88
            for other in scene.objects[:number]:
                assert np.hypot(item.x - other.x, item.y - other.y) > item.radius + other.radius


def test_every_word_is_drawn_about_equally_often() -> None:
    items = [item for scene in scenes(count=1500) for item in scene.objects]
    for attribute, words in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
        counts = np.array([sum(getattr(item, attribute) == word for item in items) for word in words])
        assert counts.min() > 0.8 * counts.mean(), dict(zip(words, counts, strict=True))
    backgrounds = [scene.background for scene in scenes(count=1500)]
    assert min(backgrounds.count(word) for word in BACKGROUNDS) > 240


@pytest.mark.parametrize("size", [48, 64, 96])
def test_picture_shows_what_the_scene_says(size: int) -> None:
    for scene in scenes(count=40):
        pixels = np.asarray(render(scene, size=size)).astype(int)
        assert pixels.shape == (size, size, 3)
        mask = object_mask(scene, size=size)
        for number, item in enumerate(scene.objects, start=1):
            inside = np.argwhere(mask == number)
            # The inner pixels only: edges mix with the background.
            centre = np.array([item.y, item.x]) * size
            near = inside[np.argsort(np.abs(inside - centre).sum(1))]
            if item.shape != "ring":
                colour = pixels[near[:4, 0], near[:4, 1]].mean(0)
                assert nearest_word(colour, COLOURS) == item.colour
            x, y, width, height = (value * size for value in item.box)
            assert inside[:, 1].min() >= x - 1.5 and inside[:, 1].max() <= x + width + 1.5
            assert inside[:, 0].min() >= y - 1.5 and inside[:, 0].max() <= y + height + 1.5
        assert nearest_word(pixels[mask == 0].mean(0), BACKGROUNDS) == scene.background


def nearest_word(colour: np.ndarray, words: tuple[str, ...]) -> str:
    return min(words, key=lambda word: float(np.abs(colour - np.array(RGB[word])).sum()))


def test_shapes_differ_in_the_picture() -> None:
    def drawn(shape: str) -> np.ndarray:
        item = SceneObject(shape, "red", "large", 4, 0.5, 0.5, 0.18, 0.0)
        return object_mask(Scene("black", (item,), 0))

    masks = [drawn(shape) for shape in SHAPES]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            # Of about 400 pixels; 60 of these are a 4th of the smallest shape.
            assert (first != second).sum() > 60


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorldSpec:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    return WorldSpec(train=12, val=4, test=4)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_written_files_hold_together(spec: WorldSpec) -> None:
    root = write_world(spec)
    ids: set[int] = set()
    for split in SPLITS:
        content = {
            kind: json.loads((root / "annotations" / f"{kind}_{split}.json").read_text())
            for kind in ("captions", "instances", "questions", "answers")
        }
        images = {row["id"]: row for row in content["captions"]["images"]}
        assert len(images) == spec.size(split)  # type: ignore[arg-type]
        assert not ids & set(images)
        ids |= set(images)
        for row in images.values():
            with Image.open(root / "images" / split / row["file_name"]) as image:
                assert image.size == (row["width"], row["height"]) == (64, 64)
        per_image = [row["image_id"] for row in content["captions"]["annotations"]]
        assert sorted(per_image) == sorted([*images, *images])
        asked = {row["question_id"]: row["question"] for row in content["questions"]["questions"]}
        assert len(asked) == 4 * len(images) == len(content["answers"]["annotations"])
        for row in content["answers"]["annotations"]:
            assert row["question_id"] in asked and row["image_id"] in images
            assert len(row["answers"]) == (1 if split == "train" else 10)
        for row in content["instances"]["annotations"]:
            x, y, width, height = row["bbox"]
            assert x >= 0 and y >= 0 and x + width <= 64 and y + height <= 64
            assert row["attributes"]["cell"] in range(len(CELLS))


def test_same_bytes_every_time_and_in_any_number_of_processes(
    spec: WorldSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone = files(write_world(spec))
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(writer, "PARALLEL_FROM", 1)
    assert files(write_world(spec, processes=2)) == alone


def test_written_once_and_never_half(spec: WorldSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(writer, "_write_annotations", fail)
    with pytest.raises(OSError, match="disk full"):
        write_world(spec)
    assert not spec.folder.exists()
    assert list(spec.folder.parent.iterdir()) == []


def test_second_call_draws_nothing(spec: WorldSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_world(spec)
    monkeypatch.setattr(writer, "render", None)
    assert write_world(spec) == root


def test_two_processes_at_once(spec: WorldSpec) -> None:
    code = (
        "from lavis_lite.worlds.shapes.writer import WorldSpec, write_world;"
        "print(write_world(WorldSpec(train=12, val=4, test=4)))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    assert [p.name for p in spec.folder.parent.iterdir()] == [spec.folder.name]
    assert len(list((spec.folder / "images" / "train").iterdir())) == 12


def test_another_spec_has_another_folder_and_bad_numbers_are_refused() -> None:
    assert WorldSpec(seed=1).folder != WorldSpec(seed=2).folder
    with pytest.raises(ConfigError, match="captions_per_image must be from 1 to 4, got 5"):
        WorldSpec(captions_per_image=5)

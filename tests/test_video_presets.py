"""Clips with a model of a preset: its processor of pictures is that of their frames, and a run on them a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clip_helpers import own_clips, write_rows
from PIL import Image

from lavis_lite.common.config import load_config
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.model_recipe import model_recipe
from lavis_lite.datasets.clip_builders import VideoTextBuilder
from lavis_lite.generate import Place, answer_files, default_frames
from lavis_lite.runners.runner import Runner


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def project(tmp_path: Path, datasets: dict[str, Any]) -> Path:
    content = {
        "model": {"arch": "blip2_opt", "model_type": "shapes"},
        "datasets": datasets,
        "task": {"name": "vqa"},
    }
    path = tmp_path / "project.yaml"
    path.write_text(json.dumps(content))
    return path


PICTURES = {split: {"name": f"shapes_image_{split}", "image_size": 64} for split in ("train", "eval")}
OWN_CLIPS = {"train": {"annotations": "rows.jsonl"}}


@pytest.mark.parametrize(
    "section",
    [
        {"builder": "video_text", **OWN_CLIPS},
        {"builder": "video_vqa", **OWN_CLIPS},
        {"builder": "video_shards", "train": {"shards": "{0..3}.tar"}},
        {"builder": "video_vqa_shards", "train": {"shards": "{0..3}.tar"}},
    ],
    ids=lambda section: section["builder"],
)
def test_a_models_processor_of_pictures_becomes_that_of_frames(
    tmp_path: Path, section: dict[str, Any]
) -> None:
    found = load_config(project(tmp_path, {"own": section})).datasets["own"]
    assert found["vis_processor"] == {
        "train": {"name": "video", "sampling": "random", "frames": PICTURES["train"]},
        "eval": {"name": "video", "frames": PICTURES["eval"]},
    }
    texts = "blip_question" if "vqa" in section["builder"] else "blip_caption"
    assert found["text_processor"] == {split: {"name": texts} for split in ("train", "eval")}
    fewer = {**section, "vis_processor": {"train": {"num_frames": 3}}}
    found = load_config(project(tmp_path, {"own": fewer})).datasets["own"]["vis_processor"]["train"]
    assert found == {"name": "video", "sampling": "random", "num_frames": 3, "frames": PICTURES["train"]}


def test_clips_have_as_many_frames_as_the_model_has_embeddings(tmp_path: Path) -> None:
    def found(section: dict[str, Any], *options: str) -> Any:
        options = ("model.video.frame_embeddings=5", *options)
        return load_config(project(tmp_path, {"own": section}), options).datasets["own"].get("vis_processor")

    clips = {"builder": "video_vqa", **OWN_CLIPS}
    assert [found(clips)[split].get("num_frames") for split in ("train", "eval")] == [5, 5]
    assert found(clips)["eval"]["frames"] == PICTURES["eval"]
    assert "num_frames" not in found(clips, "model.video.frame_embeddings=0")["eval"]
    fewer = found({**clips, "vis_processor": {"train": {"num_frames": 3}}})
    assert (fewer["train"]["num_frames"], fewer["eval"]["num_frames"]) == (3, 5)
    with pytest.raises(
        ConfigError, match=r"datasets\.own\.vis_processor\.eval\.num_frames: .*=5 frames at most, got 6"
    ):
        found(clips, "datasets.own.vis_processor.eval.num_frames=6")
    # Without a model's preset the builder's own processor is what is completed.
    alone = {
        "builder": "video_text",
        **OWN_CLIPS,
        "vis_processor": {"eval": {"name": "video", "sampling": "headtail"}},
    }
    assert VideoTextBuilder.fit_frames(alone, 2, where="x")["vis_processor"] == {
        "train": {**VideoTextBuilder.default_vis["train"], "num_frames": 2},
        "eval": {**VideoTextBuilder.default_vis["eval"], "sampling": "headtail", "num_frames": 2},
    }
    assert found({"builder": "image_text", **OWN_CLIPS}) == PICTURES


@pytest.mark.parametrize("name", ["msrvtt_caption", "msrvtt_qa", "msvd_caption", "msvd_qa"])
def test_presets_of_clips_go_with_a_models_preset(tmp_path: Path, name: str) -> None:
    found = load_config(project(tmp_path, {name: {}})).datasets[name]
    assert found["vis_processor"]["train"]["frames"] == PICTURES["train"]


def test_questions_about_pictures_are_no_captions_either(tmp_path: Path) -> None:
    section = {"builder": "vqa", **OWN_CLIPS}
    found = load_config(project(tmp_path, {"own": section})).datasets["own"]
    assert found["vis_processor"] == PICTURES and found["text_processor"]["train"]["name"] == "blip_question"


@pytest.mark.slow
def test_ones_own_clips_train_a_model_of_a_preset_and_the_run_answers(tmp_path: Path) -> None:
    """No processor is configured; then the run's folder is used as a model, for clips and for pictures."""
    rows = own_clips(tmp_path)
    asked = [{"video": row["video"], "question": f"{n}?", "answer": "red"} for n, row in enumerate(rows)]
    write_rows(tmp_path / "rows.jsonl", asked)
    section = {
        "builder": "video_vqa",
        "root": str(tmp_path),
        "vis_processor": {"eval": {"num_frames": 3}},
        "train": {**OWN_CLIPS["train"], "images": "clips"},
    }
    short = [
        f"run.output_dir={tmp_path / 'run'}",
        "run.max_steps=1",
        "run.batch_size_train=2",
        "run.num_workers=0",
        "model.prompt='Question: {} Answer:'",
    ]
    assert Runner(load_config(project(tmp_path, {"own": section}), short)).train().finished
    image = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(image)
    assert default_frames(str(tmp_path / "run")) == 3 and default_frames("blip2_opt/video_shapes") == 4
    for paths, frames in (([str(tmp_path / "clips")], 3), ([str(image)], None)):
        place = Place(out=str(tmp_path / "said.jsonl"), num_frames=frames)
        assert answer_files(str(tmp_path / "run"), paths, ["what?"], place) == 0
        said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
        assert len(said) == (3 if frames else 1) and all(isinstance(row["answer"], str) for row in said)


def test_a_run_on_clips_without_a_models_preset_is_a_model_too(tmp_path: Path) -> None:
    """Its processors are the builder's own, or what a few keys made of them."""
    (tmp_path / "run").mkdir()
    for vis, frames in ((None, 8), ({"eval": {"num_frames": 3}}, 3)):
        section = {
            "builder": "video_text",
            "train": {"annotations": "a.json", "images": "b"},
            "vis_processor": vis,
        }
        content = {"model": {"arch": "blip2_opt"}, "datasets": {"own": section}}
        (tmp_path / "run" / "config.yaml").write_text(json.dumps(content))
        recipe = model_recipe(str(tmp_path / "run"))
        assert recipe.preprocess["vis_processor"]["eval"] == {"name": "blip_image_eval"}
        assert default_frames(str(tmp_path / "run")) == frames


def test_what_a_reference_says_of_clips_is_not_replaced(tmp_path: Path) -> None:
    same = "${datasets.one.vis_processor}"
    two = {name: {"builder": "video_text", **OWN_CLIPS} for name in ("one", "two")}
    two["two"]["vis_processor"] = same
    path = project(tmp_path, two)
    found = load_config(path, ["model.model_type=video_shapes"]).datasets
    assert found["two"]["vis_processor"] == found["one"]["vis_processor"]
    assert found["one"]["vis_processor"]["train"]["num_frames"] == 4

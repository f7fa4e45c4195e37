"""Datasets of clips: one's own files, those of MSR-VTT and MSVD as published, and clips that can't be read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_helpers import own_clips, save_clip, write_rows
from data_helpers import warnings_logged

from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.builders import build_dataset_from_preset, build_datasets, validate_datasets_config
from lavis_lite.datasets.image_text import has_picture_files
from lavis_lite.datasets.loader import TrainLoader, eval_loader

FRAMES = {"name": "blip_image_eval", "image_size": 8}
VIS = {
    "train": {"name": "video", "num_frames": 4, "sampling": "random", "frames": FRAMES},
    "eval": {"name": "video", "num_frames": 4, "frames": FRAMES},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(root: Path, split: str = "train", *, builder: str = "video_text", **section: Any) -> Any:
    entry = {"builder": builder, "root": str(root), "vis_processor": VIS, split: section}
    return build_datasets({"own": entry})["own"][split]


def test_clips_are_no_picture_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", own_clips(tmp_path, 1))
    data = build(tmp_path, annotations="rows.jsonl", images="clips")
    assert not has_picture_files(data)


# --- one's own ----------------------------------------------------------------------------------------------


def test_a_folder_of_clips_with_a_jsonl(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", own_clips(tmp_path))
    data = build(tmp_path, annotations="rows.jsonl", images="clips")
    row = data.load(1, seed=3)
    assert sorted(row) == ["image_id", "index", "text_input", "video"]
    assert row["video"].shape == (4, 3, 8, 8) and row["text_input"] in ("clip 1", "film 1")
    again = pickle.loads(pickle.dumps(data)).load(1, seed=3)
    assert torch.equal(again["video"], row["video"]) and again["text_input"] == row["text_input"]
    assert any(not torch.equal(data.load(1, seed=seed)["video"], row["video"]) for seed in range(5))
    batch = next(TrainLoader([data], batch_size=2, seed=0).batches())
    assert batch["video"].shape == (2, 4, 3, 8, 8) and "image" not in batch
    shown = data[1]
    assert shown["video"].endswith("clips/1.avi") and shown["image"].size == (64, 48)
    assert data.image(0).getpixel((0, 0)) != data.image(0).getpixel((63, 47))


def test_a_folder_of_clips_with_text_beside_them(tmp_path: Path) -> None:
    own_clips(tmp_path)
    with pytest.raises(DataError, match=r"clips: 3 clips and none with a \.txt file beside it"):
        build(tmp_path, images="clips")
    (tmp_path / "clips" / "0.txt").write_text("a dog\n\na hound\n")
    (tmp_path / "clips" / "2.txt").write_text("a cat")
    (tmp_path / "clips" / "2.jpg").write_bytes(b"a still")  # no row of its own
    data = build(tmp_path, images="clips")
    assert [data.captions(row) for row in range(len(data))] == [["a dog", "a hound"], [], ["a cat"]]
    assert data.load(0, seed=0)["video"].shape == (4, 3, 8, 8) and data.problems()[0] == 1
    (tmp_path / "clips" / "z.txt").write_text("a bird")
    save_clip(tmp_path / "clips" / "z.MP4")
    assert len(build(tmp_path, images="clips")) == 4
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: no clips; set datasets\.own\.train\.annotations"):
        build(tmp_path, images="none")


def test_names_are_lines_and_those_of_no_clip_are_told(tmp_path: Path) -> None:
    rows = [
        {"video": f"{name}.mp4", "caption": name}
        for name in ("my clip", "deep/b", "c", "d", "clip", "deep/e")
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    for row in rows:
        save_clip(tmp_path / "clips" / row["video"])
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfmy clip.mp4\r\n\nb.mp4\n d \ngone.mp4\ndeep/e\n")
    with warnings_logged() as messages:
        data = build(tmp_path, annotations="rows.jsonl", images="clips", names="list.txt")
    assert [data.captions(row) for row in range(len(data))] == [["my clip"], ["deep/b"], ["d"], ["deep/e"]]
    assert len(messages) == 1 and "1 of 5 names are of no clip" in messages[0] and "'gone.mp4'" in messages[0]
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.mp4\n")
    with pytest.raises(DataError, match=r"list\.txt, line 1: not valid UTF-8"):
        build(tmp_path, annotations="rows.jsonl", images="clips", names="list.txt")


def test_evaluation_shows_the_same_frames_whatever_the_seed(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", own_clips(tmp_path))
    data = build(tmp_path, "val", annotations="rows.jsonl", images="clips")
    assert torch.equal(data.load(2, seed=0)["video"], data.load(2, seed=9)["video"])


def test_questions_about_clips_from_a_csv(tmp_path: Path) -> None:
    own_clips(tmp_path)
    (tmp_path / "q.csv").write_text("clip,question,answer\n0.avi,Is it dark?,yes\n2.avi,How long?,8\n")
    data = build(tmp_path, builder="video_vqa", annotations="q.csv", images="clips", fields={"image": "clip"})
    batch = next(TrainLoader([data], batch_size=2, seed=0).batches())
    assert sorted(batch) == ["image_id", "index", "question_id", "text_input", "text_output", "video"]
    assert batch["video"].shape == (2, 4, 3, 8, 8) and set(batch["text_output"]) == {"yes", "8"}
    assert data.record(1).question.text == "How long?" and data.answered and data[1]["answers"] == ["8"]


def test_questions_name_clips_as_captions_do(tmp_path: Path) -> None:
    own_clips(tmp_path)
    (tmp_path / "q.csv").write_text("video_id,question,answer\n0,Is it?,yes\n2,How long?,8\n1,Why?,no\n")
    (tmp_path / "list.txt").write_text("2.avi\n1\n")
    asked = {"builder": "video_vqa", "annotations": "q.csv", "images": "clips"}
    data = build(tmp_path, **asked, names="list.txt", video_name="{video_id}.avi")
    assert [data.record(row).image for row in range(len(data))] == ["2.avi", "1.avi"]
    assert len(build(tmp_path, **asked, image_name="{image_id}.avi")) == 3
    with pytest.raises(
        ConfigError, match=r"train\.video_name and datasets\.own\.train\.image_name both name"
    ):
        build(tmp_path, **asked, image_name="{image_id}.avi", video_name="{video_id}.avi")
    with pytest.raises(DataError, match=r"train\.video_name: '\{clip\}' doesn't fit"):
        build(tmp_path, **asked, video_name="{clip}")
    with pytest.raises(
        DataError, match=r"set datasets\.own\.train\.video_name, such as 'video\{video_id\}\.mp4'"
    ):
        build(tmp_path, **asked)
    entry = {
        "builder": "video_vqa",
        "root": str(tmp_path),
        "video_name": "{video_id}.avi",
        "vis_processor": VIS,
    }
    whole = {**entry, "train": {"annotations": "q.csv", "images": "clips"}}
    assert len(build_datasets({"own": whole})["own"]["train"]) == 3


def test_broken_clips_are_counted_logged_once_and_replaced(tmp_path: Path) -> None:
    rows = own_clips(tmp_path, 8)
    (tmp_path / "clips" / "3.avi").write_bytes(b"RIFF" + bytes(500))
    (tmp_path / "clips" / "5.avi").unlink()
    save_clip(tmp_path / "clips" / "6.avi", frames=1)  # short, not broken
    write_rows(tmp_path / "rows.jsonl", rows)
    data = build(tmp_path, annotations="rows.jsonl", images="clips")
    with pytest.raises(UnreadableSample, match=r"3\.avi: not a clip that can be decoded"):
        data.load(3, seed=0)
    short = data.load(6, seed=0)["video"]
    assert all(torch.equal(short[0], frame) for frame in short[1:])
    loader = TrainLoader([data], batch_size=8, seed=0, max_bad_fraction=0.9)
    batches = loader.batches()
    with warnings_logged() as messages:
        seen = [next(batches)["index"].tolist() for _ in range(3)]
    assert all(len(rows) == 8 and not {3, 5} & set(rows) for rows in seen)
    assert loader.bad_images >= 6
    assert sum("3.avi: not a clip that can be decoded" in message for message in messages) == 1
    assert sum("5.avi: no such file" in message for message in messages) == 1
    with warnings_logged() as messages:
        (batch,) = eval_loader(data, batch_size=8, max_bad_fraction=0.9)
    assert batch["index"].tolist() == [0, 1, 2, 4, 6, 7] and len(messages) == 2


def test_too_many_broken_clips_stop_a_run(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", own_clips(tmp_path, 4))
    for row in (1, 2, 3):
        (tmp_path / "clips" / f"{row}.avi").write_bytes(b"nothing")
    data = build(tmp_path, annotations="rows.jsonl", images="clips")
    with pytest.raises(DataError, match=r"more than run\.max_bad_fraction=0\.01 allows.*avi"):
        for _, _ in zip(range(20), TrainLoader([data], batch_size=4, seed=0).batches(), strict=False):
            pass


def test_workers_read_the_same_clips(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", own_clips(tmp_path))
    data = build(tmp_path, annotations="rows.jsonl", images="clips")
    alone, helped = (
        next(TrainLoader([data], batch_size=3, seed=0, num_workers=workers).batches()) for workers in (0, 1)
    )
    assert torch.equal(alone["video"], helped["video"])


# --- as published -------------------------------------------------------------------------------------------


def msrvtt(path: Path) -> None:
    videos = [
        {"video_id": f"video{n}", "id": n, "split": split, "category": 1}
        for n, split in ((0, "train"), (1, "validate"), (2, "train"))
    ]
    sentences = [{"sen_id": k, "video_id": f"video{k % 3}", "caption": f" sentence {k} "} for k in range(7)]
    path.write_text(json.dumps({"info": {}, "videos": videos, "sentences": sentences}), encoding="utf-8")


def test_msrvtt_captions_preset(cache: Path) -> None:
    root = cache / "msrvtt_caption"
    for number in range(3):
        save_clip(root / "videos" / f"video{number}.mp4")
    msrvtt(root / "train_val_videodatainfo.json")
    data = build_dataset_from_preset("msrvtt_caption", {"test": None})
    assert sorted(data) == ["train", "val"] and len(data["train"]) == 2 and len(data["val"]) == 1
    assert data["train"].captions(0) == ["sentence 0", "sentence 3", "sentence 6"]
    assert data["val"].captions(0) == ["sentence 1", "sentence 4"]
    assert data["train"].record(1).image == "video2.mp4"
    assert data["train"].load(0, seed=0)["video"].shape == (8, 3, 224, 224)


def test_msvd_captions_preset(cache: Path) -> None:
    root = cache / "msvd_caption"
    names = ["-4wsuPCjDBc_5_15", "-7KMZQEsJW4_205_208", "0lh_UWF9ZP4_62_69"]
    for name in names:
        save_clip(root / "YouTubeClips" / f"{name}.avi")
    lines = [f"{name} a man does {k}" for k, name in enumerate(names * 2)]
    (root / "AllVideoDescriptions.txt").write_text("\n".join(["# comment", *lines]) + "\n")
    (root / "train_list.txt").write_text("\n".join(names[:2]))
    (root / "test_list.txt").write_text(names[2] + "\n")
    data = build_dataset_from_preset("msvd_caption", {"val": None})
    assert len(data["train"]) == 2 and len(data["test"]) == 1
    assert data["test"].captions(0) == ["a man does 2", "a man does 5"]
    assert data["test"].record(0).image == "0lh_UWF9ZP4_62_69.avi"


@pytest.mark.parametrize(
    ("preset", "clip"), [("msrvtt_qa", "videos/video7010.mp4"), ("msvd_qa", "YouTubeClips/vid7010.avi")]
)
def test_question_presets(cache: Path, preset: str, clip: str) -> None:
    root = cache / preset
    save_clip(root / clip)
    rows = [
        {
            "answer": "couch",
            "category_id": 14,
            "id": 5,
            "question": "what are three people on?",
            "video_id": 7010,
        },
        {"answer": "sit", "category_id": 14, "id": 6, "question": "what do people do?", "video_id": 7010},
    ]
    (root / "test_qa.json").write_text(json.dumps(rows))
    data = build_dataset_from_preset(preset, {"train": None, "val": None})["test"]
    assert [data.record(row).question.id for row in range(2)] == ["5", "6"]
    assert data[0]["answers"] == ["couch"] and data.image_path(1).endswith(clip)
    assert data.load(0, seed=0)["text_input"] == "what are three people on?"


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"train": {"format": "json"}},
            "set datasets.own.train.annotations to a file, datasets.own.train.images",
        ),
        (
            {"train": {"images": "clips", "format": "msvd"}},
            "datasets.own.train.format: 'msvd' is that of a file",
        ),
        ({"train": {"annotations": "a", "format": "msrvt"}}, "datasets.own.train.format: 'msrvt'"),
        (
            {"train": {"annotations": "a"}, "vis_processor": {"train": {"num_frame": 3}}},
            "unknown key 'datasets.own.vis_processor.train.num_frame'; did you mean 'num_frames'",
        ),
        (
            {"train": {"annotations": "a"}, "vis_processor": {"train": {"frames": {"image_size": "x"}}}},
            "datasets.own.vis_processor.train: frames.image_size",
        ),
    ],
)
def test_mistakes_name_the_key(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        validate_datasets_config({"own": {"builder": "video_text", **section}})


def test_files_that_are_not_msrvtts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"videos": []}')
    with pytest.raises(DataError, match=r"a\.json: no lists 'videos' and 'sentences'"):
        build(tmp_path, annotations="a.json", format="msrvtt")
    msrvtt(tmp_path / "b.json")
    with pytest.raises(DataError, match=r"datasets\.own\.train\.video_name: '\{clip\}\.mp4' can't name clip"):
        build(tmp_path, annotations="b.json", format="msrvtt", video_name="{clip}.mp4")
    with pytest.raises(DataError, match=r"no annotation file .*c\.txt; set datasets\.own\.train\.names"):
        build(tmp_path, annotations="b.json", format="msrvtt", names="c.txt")


def test_a_clip_without_captions_is_a_bad_row(tmp_path: Path) -> None:
    videos = [{"video_id": "video0"}, {"video_id": "video1"}]
    sentences = [{"video_id": "video1", "caption": "a dog"}]
    (tmp_path / "a.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    save_clip(tmp_path / "video1.mp4")
    data = build(tmp_path, annotations="a.json", format="msrvtt")
    with pytest.raises(UnreadableSample, match="clip video0 has no caption"):
        data.load(0, seed=0)
    assert data.load(1, seed=0)["text_input"] == "a dog"

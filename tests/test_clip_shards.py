"""Clips in tar shards: what datasets of their files give, read at random and as a stream."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_helpers import save_clip, write_rows
from mp4_clips import save_mp4
from shard_helpers import jpeg, write_shards

from lavis_lite.commands.shards import shards_main
from lavis_lite.common.errors import DataError
from lavis_lite.datasets.builders import build_datasets
from lavis_lite.datasets.clip_sources import CLIPS
from lavis_lite.datasets.loader import TrainLoader
from lavis_lite.datasets.shard_stream import ShardStream, StreamReader
from lavis_lite.datasets.shards import read_index
from lavis_lite.datasets.tar_members import sample_of, samples_of
from lavis_lite.processors.video import UnreadableClip, read_frames

FRAMES = {"name": "blip_image_eval", "image_size": 8}
VIS = {
    "train": {"name": "video", "num_frames": 3, "sampling": "random", "frames": FRAMES},
    "eval": {"name": "video", "num_frames": 3, "frames": FRAMES},
}
CLIP_NUMBER = 7


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))


def entry(builder: str, **train: Any) -> dict[str, Any]:
    return {"builder": builder, "vis_processor": VIS, "train": train}


def build(builder: str, **train: Any) -> Any:
    return build_datasets({"own": entry(builder, **train)})["own"]["train"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Seven captioned clips in files, the last an mp4."""
    rows = []
    for number in range(CLIP_NUMBER):
        name = f"{number}.avi" if number < CLIP_NUMBER - 1 else f"{number}.mp4"
        save = save_clip if name.endswith(".avi") else save_mp4
        save(tmp_path / "clips" / name, frames=5 + number)
        rows.append({"video": name, "caption": [f"clip {number}", f"film {number}"], "video_id": number})
    write_rows(tmp_path / "rows.jsonl", rows)
    return {"annotations": str(tmp_path / "rows.jsonl"), "images": str(tmp_path / "clips")}


def make(tmp_path: Path, section: dict[str, Any], out: str, *options: str) -> Path:
    source = tmp_path / f"{out}.yaml"
    source.write_text(json.dumps({"datasets": {"own": section}}))
    shards_main(["make", str(source), "--out", str(tmp_path / out), "--samples-per-shard", "3", *options])
    return tmp_path / out


def test_shards_give_what_their_files_would(files: dict[str, Any], tmp_path: Path) -> None:
    folder = make(tmp_path, entry("video_text", **files), "out", "--workers", "2")
    assert [len(read_index(shard, CLIPS) or []) for shard in sorted(folder.glob("*.tar"))] == [3, 3, 1]
    mine, theirs = build("video_shards", shards=f"{folder}/*.tar"), build("video_text", **files)
    assert len(mine) == len(theirs) == CLIP_NUMBER
    for row in range(CLIP_NUMBER):
        one, other = mine.load(row, seed=row), theirs.load(row, seed=row)
        assert torch.equal(one["video"], other["video"]) and one["video"].shape == (3, 3, 8, 8)
        assert one["text_input"] == other["text_input"] and one["image_id"] == other["image_id"]
        assert mine[row]["captions"] == theirs[row]["captions"]
        assert mine[row]["image"].tobytes() == theirs[row]["image"].tobytes()
    batch = next(TrainLoader([mine], batch_size=4, seed=0).batches())
    assert batch["video"].shape == (4, 3, 3, 8, 8) and "image" not in batch


def test_a_stream_gives_the_same_clips(files: dict[str, Any], tmp_path: Path) -> None:
    folder = make(tmp_path, entry("video_text", **files), "out")
    at_random = build("video_shards", shards=f"{folder}/*.tar")
    stream = build("video_shards", shards=f"pipe:cat {folder}/{{00000..00002}}.tar", samples=CLIP_NUMBER)
    assert isinstance(stream, ShardStream)
    taken = StreamReader(stream, seed=0, reader=0, readers=1).take(CLIP_NUMBER)
    assert not taken.failures
    seen = {text.split()[1]: clip for clip, text in ((s["video"], s["text_input"]) for s in taken.samples)}
    assert len(seen) == CLIP_NUMBER
    for row in range(CLIP_NUMBER):
        shades = {float(value) for value in at_random.load(row, seed=0)["video"].mean((1, 2, 3))}
        assert seen[str(row)].shape == (3, 3, 8, 8) and len(shades) > 1
    batch = stream.collate(taken.samples)
    assert batch["video"].shape == (CLIP_NUMBER, 3, 3, 8, 8) and "image" not in batch


def test_questions_go_in_and_come_out(files: dict[str, Any], tmp_path: Path) -> None:
    asked = [
        {"video": f"{n}.avi", "question": f"how bright is {n}?", "answer": ["red", "blue"], "question_id": n}
        for n in range(4)
    ]
    write_rows(tmp_path / "questions.jsonl", asked)
    section = entry("video_vqa", annotations=str(tmp_path / "questions.jsonl"), images=files["images"])
    folder = make(tmp_path, section, "asked")
    mine = build("video_vqa_shards", shards=f"{folder}/*.tar")
    theirs = build_datasets({"own": section})["own"]["train"]
    for row in range(4):
        one, other = mine.load(row, seed=1), theirs.load(row, seed=1)
        assert {**one, "video": 0} == {**other, "video": 0}
        assert torch.equal(one["video"], other["video"])


def web_sample(tmp_path: Path) -> Any:
    def make_one(number: int) -> dict[str, bytes]:
        clip = save_clip(tmp_path / "clips" / f"{number}.avi").read_bytes()
        return {
            "avi": clip,
            "txt": f"clip {number}".encode(),
            "jpg": jpeg(number),
            "json": b'{"fps": 24, "caption": ""}',
        }

    return make_one


def test_shards_as_download_tools_write_them_are_cut_anew(tmp_path: Path) -> None:
    """A clip, its text, what is known of it, and a still, which is neither the sample's clip nor lost."""
    pattern = write_shards(tmp_path / "web", 1, 4, make=web_sample(tmp_path))
    data = build("video_shards", shards=pattern)
    assert [data[row]["captions"] for row in range(4)] == [[f"clip {row}"] for row in range(4)]
    folder = make(tmp_path, entry("video_shards", shards=pattern), "out")
    first = next(iter(samples_of(folder / "00000.tar")))
    assert set(first.members) == {"avi", "txt", "jpg", "json"}
    assert sample_of(first.members["avi"], None).members.keys() == first.members.keys()
    pictures = build_datasets(
        {
            "own": {
                "builder": "shards",
                "vis_processor": {"train": FRAMES},
                "train": {"shards": f"{folder}/*.tar"},
            }
        }
    )["own"]["train"]
    assert pictures.load(0, seed=0)["image"].shape == (3, 8, 8)  # the stills, and not the clips' index


def test_shards_of_clips_are_none_of_pictures(
    files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path, entry("video_text", **files), "out")
    with pytest.raises(SystemExit):
        shards_main(["check", f"{folder}/*.tar"])
    assert "looked at with --clips" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"none of the samples .* no picture among its members \(avi, json\)"):
        build_datasets({"own": {"builder": "shards", "train": {"shards": f"{folder}/*.tar"}}})
    pattern = write_shards(tmp_path / "pictures", 1, 3)
    with pytest.raises(DataError, match=r"none of the samples .* no clip among its members \(jpg, json\)"):
        build("video_shards", shards=pattern)


def broken_sample(tmp_path: Path) -> Any:
    whole = web_sample(tmp_path)

    def make_one(number: int) -> dict[str, bytes]:
        return {**whole(number), **({"avi": b"no clip"} if number == 1 else {})}

    return make_one


@pytest.mark.parametrize("address", ["{}", "pipe:cat {}"])
def test_check_looks_into_clips(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = write_shards(tmp_path / "web", 1, 4, make=broken_sample(tmp_path))
    shards_main(["check", address.format(pattern), "--clips"])
    assert "1 of 1 shards are whole: 4 samples, 4 captions, 0 bad samples" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        shards_main(["check", address.format(pattern), "--clips", "--deep"])
    said = capsys.readouterr().out
    assert "000000001: not a clip that can be decoded" in said and "1 bad samples" in said


def test_a_broken_clip_is_counted_and_replaced(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path / "web", 1, 4, make=broken_sample(tmp_path))
    loader = TrainLoader([build("video_shards", shards=pattern)], batch_size=4, seed=0)
    assert next(loader.batches())["video"].shape == (4, 3, 3, 8, 8)
    stream = build("video_shards", shards=f"pipe:cat {pattern}", samples=4)
    taken = StreamReader(stream, seed=0, reader=0, readers=1).take(4)
    assert {reason for _, reason in taken.failures} == {"not a clip that can be decoded"}
    assert len(taken.samples) == 4


def test_what_is_in_a_file_is_a_clip_too(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip.avi")
    content = io.BytesIO(clip.read_bytes())
    for _ in range(2):  # and can be read again
        frames = read_frames(content, 4)
        assert [f.tobytes() for f in frames] == [f.tobytes() for f in read_frames(clip, 4)]
    for broken, reason in ((b"", "the file is empty"), (b"no clip", "not a clip that can be decoded")):
        with pytest.raises(UnreadableClip, match=f"a clip in memory: {reason}"):
            read_frames(io.BytesIO(broken), 4)

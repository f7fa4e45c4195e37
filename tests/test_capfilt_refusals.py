"""What CapFilt refuses, in one line each: wrong arguments, and a folder that holds another job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from capfilt_helpers import MODELS, capfilt, web_shards
from data_helpers import make_jsonl

from lavis_lite.capfilt.claims import Claims


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--shards {web}/{{0..9}}.tar", 1, "10 of 10 shards are not there, e.g. '{web}/0.tar'"),
        ("--images {web}/nowhere", 1, "--images: no folder '{web}/nowhere'"),
        ("--images {web}", 1, "{web}: no pictures; give --images another folder"),
        (
            "--images {web} --annotations {web}/a.json",
            1,
            "can't read {web}/a.json: No such file or directory",
        ),
        (
            "--images {web} --annotations {web}/a.csv",
            1,
            "words; say which one it is with --caption-field <field>",
        ),
        (
            "--images {web} --annotations {web}/b.csv",
            1,
            "give --annotations a file in which it has that name",
        ),
        ("--shards {web}/00000.tar --annotations a.json", 2, "--annotations goes with --images"),
        ("--shards {web}/00000.tar --shard-size 9", 2, "--shard-size goes with --images, not with --shards"),
        ("--shards {web}/00000.tar --shard-size 0", 2, "--shard-size goes with --images, not with --shards"),
        ("--images {web} --image jpg", 2, "--image goes with --shards, not with --images"),
        ("--images {web} --shard-size 0", 2, "--shard-size must be at least 1, got 0"),
        ("--shards {web}/00000.tar --keep 0", 2, "keep must be at least 1 (--keep)"),
        ("--shards {web}/00000.tar --top-p 1.5", 2, "top_p must be above 0 and at most 1 (--top-p)"),
        ("--shards {web}/00000.tar --captioner blip2", 2, "--captioner 'blip2': give NAME/TYPE[:CHECKPOINT]"),
        ("--shards {web}/00000.tar --preset papr", 2, "there is none of that name; did you mean 'paper'?"),
        ("--shards {web}/00000.tar --max-bad-fraction 0.1", 1, "1 of 3 pictures can't be read (1 in"),
        ("--shards {web}/00000.tar --rank-by clip", 2, "capfilt.rank_by"),
        ("--shards {web}/00000.tar --device gpu", 2, "--device: 'gpu' is not a device; use auto,"),
    ],
)
def test_mistakes_are_one_line(
    arguments: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web_shards(tmp_path / "web", 1, 3)
    (tmp_path / "web/a.csv").write_text("image,words\n0.jpg,text\n")
    (tmp_path / "web/b.csv").write_text("photo,caption\n0.jpg,text\n")
    words = arguments.format(web=tmp_path / "web").split()
    with pytest.raises(SystemExit) as ended:
        capfilt(*MODELS, "--out", str(tmp_path / "out"), *words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == code, error
    assert message.format(web=tmp_path / "web") in error and error.startswith("error: ")


def test_another_job_in_the_same_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--shards", web_shards(tmp_path / "web", 2, 3), *MODELS, "--out", str(tmp_path / "out")]
    capfilt(*arguments)
    for changed, said in (
        (["--keep", "1"], "keep was 2, now 1"),
        (["--shards", str(tmp_path / "web/00000.tar")], "the input is another"),
    ):
        with pytest.raises(SystemExit) as ended:
            capfilt(*arguments, *changed)
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_other_weights_or_annotations_under_the_same_name_are_another_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, weights = make_jsonl(tmp_path, 2), tmp_path / "model/model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"first")
    models = ["--captioner", f"hf:{weights.parent}", "--ranker", "fake/crc", "--out", str(tmp_path / "out")]
    images = ["--images", str(tmp_path / "images"), "--annotations", str(annotations)]
    capfilt(*models, *images)
    weights.write_bytes(b"other")
    with pytest.raises(SystemExit) as ended:
        capfilt(*models, *images)
    assert ended.value.code == 2 and "the captioner's weights are others" in capsys.readouterr().err
    weights.write_bytes(b"first")
    annotations.write_text(annotations.read_text().replace("caption 0", "words"))
    with pytest.raises(SystemExit) as ended:
        capfilt(*models, *images)
    assert ended.value.code == 2 and "the input is another" in capsys.readouterr().err


def test_of_two_jobs_that_begin_in_one_folder_the_second_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--shards", web_shards(tmp_path / "web", 1, 3), *MODELS, "--out", str(tmp_path / "out")]
    take, others = Claims.take, [["--keep", "1"]]

    def late(claims: Claims, name: str) -> Any:
        """Between the look for settings and the claim the other job writes its own."""
        if name == "settings" and others:
            capfilt(*arguments, *others.pop())
        return take(claims, name)

    monkeypatch.setattr(Claims, "take", late)
    with pytest.raises(SystemExit) as ended:
        capfilt(*arguments)
    assert ended.value.code == 2 and "keep was 1, now 2" in capsys.readouterr().err

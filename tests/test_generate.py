"""`lavis-lite generate` and `answer`: a line for every picture, in order, whatever is wrong with some of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_helpers import save_clip
from data_helpers import save_picture
from PIL import Image
from torch import Tensor, nn
from vqa_world import Found

from lavis_lite import generate
from lavis_lite.cli import main
from lavis_lite.processors.text import BlipCaption, BlipQuestion


class Echo(nn.Module):
    """Says how many pictures it saw at once, and the prompt it was given."""

    device = torch.device("cpu")

    def generate(self, samples: dict[str, Any], *, num_captions: int = 1, **settings: Any) -> list[str]:
        batch = len(samples.get("image", samples.get("video")))  # type: ignore[arg-type]
        return [
            f"{samples.get('prompt', '-')} {batch} {row}.{k}"
            for row in range(batch)
            for k in range(num_captions)
        ]

    def predict_answers(self, samples: dict[str, Any], **settings: Any) -> list[str]:
        names = (
            "inference_method",
            "answer_list",
            "num_ans_candidates",
            "prompt",
            "max_len",
            "length_penalty",
        )
        told = [settings[name] for name in names if settings.get(name)]
        return [f"{samples['text_input']} {row} {told}" for row in range(len(samples["image"]))]

    def predict_answers_with_scores(self, samples: dict[str, Any], **settings: Any) -> Found:
        texts = self.predict_answers(samples, **settings)
        return Found(texts, [1 / (2 + row) for row in range(len(texts))])


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def processor(image: Image.Image) -> Tensor:
        return torch.zeros(3, 4, 4)

    monkeypatch.setattr(
        generate, "load_model_and_preprocess", lambda *_: (Echo(), {"eval": processor}, {"eval": str})
    )
    for number in range(3):
        save_picture(tmp_path / "pictures" / f"{number}.png", number)
    (tmp_path / "pictures" / "1.png").write_bytes(b"no picture")
    (tmp_path / "pictures" / "notes.txt").write_text("not looked at")
    return tmp_path / "pictures"


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_broken_picture_has_its_line_and_the_exit_code_tells(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "texts.jsonl"
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", "a/b", "--image", str(pictures), "--prompt", "hi", "--out", str(out)])
    assert ended.value.code == 1 and "1 files could not be read" in capsys.readouterr().err
    first, broken, last = lines(out)
    assert (first["text"], last["text"]) == ("hi 2 0.0", "hi 2 1.0")
    assert broken["error"] == "not a picture" and broken["image"].endswith("1.png")


def test_clips_are_seen_by_their_frames(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_clip(tmp_path / "clips" / "0.avi")
    (tmp_path / "clips" / "1.mp4").write_bytes(b"no clip")
    save_clip(tmp_path / "clips" / "2.avi")
    command = ["generate", "--model", "blip2_opt/shapes", "--video", str(tmp_path / "clips")]
    shapes: list[tuple[int, ...]] = []
    said = Echo.generate

    def generate_and_note(self: Echo, samples: dict[str, Any], **settings: Any) -> list[str]:
        shapes.append(tuple(samples["video"].shape))
        return said(self, samples, **settings)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Echo, "generate", generate_and_note)
        main([*command, "--num-frames", "3"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert shapes == [(2, 3, 3, 4, 4)]
    assert [Path(row["video"]).name for row in rows] == ["0.avi", "1.mp4", "2.avi"]
    assert [row.get("text", row.get("error")) for row in rows] == [
        "- 2 0.0",
        "not a clip that can be decoded",
        "- 2 1.0",
    ]


def test_a_model_with_frame_embeddings_sees_as_many_frames() -> None:
    assert generate.default_frames("blip2_opt/shapes") == generate.FRAMES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "FRAMES", 7)
        assert generate.default_frames("blip2_opt/video_shapes") == 4


def test_several_texts_and_single_files(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(pictures / "2.png"), str(pictures / "0.png")]
    main(["generate", "--model", "a/b", "--image", *files, "--num-captions", "2", "--batch-size", "1"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [files[0], files[0], files[1], files[1]]
    assert [row["text"] for row in rows] == ["- 1 0.0", "- 1 0.1"] * 2


def test_every_question_is_asked_of_every_picture(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(pictures / "2.png"), str(pictures / "0.png")]
    command = ["answer", "--model", "a/b", "--image", *files, "--question", "what?", "how many?"]
    main([*command, "--prompt", "Q: {}"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == {
        "image": files[0],
        "question": "how many?",
        "answer": "how many? 0 ['Q: {}', 10, -1.0]",
    }
    assert [(row["image"], row["question"]) for row in rows] == [
        (file, question) for file in files for question in ("what?", "how many?")
    ]
    (tmp_path / "answers.txt").write_text("two\nthree\n")
    main([*command, "--answer-list", str(tmp_path / "answers.txt")])
    told = capsys.readouterr()
    ranked = json.loads(told.out.splitlines()[0])["answer"]
    assert ranked == "what? 0 ['rank', ['two', 'three'], 128, 10, -1.0]" and not told.err
    main([*command, "--answer-list", str(tmp_path / "answers.txt"), "--num-ans-candidates", "1"])
    told = capsys.readouterr()
    assert "['rank', ['two', 'three'], 1, 10, -1.0]" in told.out
    assert told.err.count("\n") == 1 and "of 2 answers the 1 whose first token is likeliest" in told.err
    main([*command, "--confidence"])
    assert [json.loads(line)["confidence"] for line in capsys.readouterr().out.splitlines()] == [
        *(1 / 2, 1 / 2),
        *(1 / 3, 1 / 3),
    ]


def test_the_file_is_looked_at_before_the_model_is_loaded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text("old\n")
    (tmp_path / "locked").mkdir()
    command = ["generate", "--model", "a/b", "--image", str(pictures / "0.png"), "--out"]
    fresh = tmp_path / "new" / "folder" / "x.jsonl"
    main([*command, str(fresh)])
    assert lines(fresh)[0]["text"] == "- 1 0.0"

    def mistake(out: Path, *options: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*command, str(out), *options])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1
        return error

    monkeypatch.setattr(generate, "load_model_and_preprocess", lambda *_: pytest.fail("loaded"))
    assert "is a folder; name a file in it" in mistake(tmp_path)
    assert "no folder" in mistake(old / "x.jsonl")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "may not be written to" in mistake(tmp_path / "locked" / "x.jsonl")
    for size in ("0", "-2"):
        assert f"--batch-size must be at least 1, got {size}" in mistake(old, "--batch-size", size)
    assert old.read_text() == "old\n"


def test_a_model_that_takes_no_prompt_or_no_question_says_so(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text("old\n")
    _, processors, _ = generate.load_model_and_preprocess("a/b")

    class Captioner(nn.Module):
        device, takes_prompt, generate = torch.device("cpu"), False, Echo.generate

    monkeypatch.setattr(generate, "load_model_and_preprocess", lambda *_: (Captioner(), processors, {}))
    for command, message in (
        (["generate", "--prompt", "a photo of"], "--prompt: model 'a/b' takes none"),
        (["answer", "--question", "what?"], "--model 'a/b': this model answers no questions"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--model", "a/b", "--image", str(pictures / "0.png"), "--out", str(old)])
        assert ended.value.code == 2 and message in capsys.readouterr().err
    assert old.read_text() == "old\n"
    main(["generate", "--model", "a/b", "--image", str(pictures / "0.png")])
    assert json.loads(capsys.readouterr().out)["text"] == "- 1 0.0"


def test_settings_of_sampling_are_told_where_nothing_is_sampled(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[dict[str, Any]] = []
    said = Echo.generate

    def generate_and_note(self: Echo, samples: dict[str, Any], **settings: Any) -> list[str]:
        told.append(settings)
        return said(self, samples, **settings)

    monkeypatch.setattr(Echo, "generate", generate_and_note)
    command = ["generate", "--model", "a/b", "--image", str(pictures / "0.png")]
    main(command)
    assert not capsys.readouterr().err and not {"top_p", "temperature"} & told[0].keys()
    main([*command, "--top-p", "0.5", "--temperature", "2"])
    assert capsys.readouterr().err.splitlines() == [
        "warning: --top-p has no effect without --sample",
        "warning: --temperature has no effect without --sample",
    ]
    main([*command, "--sample", "--top-p", "0.5"])
    assert not capsys.readouterr().err and told[-1]["top_p"] == 0.5


@pytest.mark.parametrize(
    ("own", "asked"),
    [
        ({"eval": BlipQuestion(max_words=3)}, "how many dogs,"),
        ({"eval": BlipCaption("a photo of ")}, "how many dogs, mr smith?"),
        ({}, "how many dogs, mr smith?"),
    ],
)
def test_questions_are_asked_as_in_training(
    own: dict[str, Any],
    asked: str,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, processors, _ = generate.load_model_and_preprocess("a/b")
    monkeypatch.setattr(generate, "load_model_and_preprocess", lambda *_: (Echo(), processors, own))
    given = "How many dogs, Mr. Smith?"
    main(["answer", "--model", "a/b", "--image", str(pictures / "0.png"), "--question", given])
    row = json.loads(capsys.readouterr().out)
    assert row["question"] == given and row["answer"] == f"{asked} 0 [10, -1.0]"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("generate --model blip2_t5 --image x.jpg", 2, "give a name and a type, e.g. blip2_t5/shapes"),
        ("generate --model a/b --image .", 1, "no picture in the folder"),
        (
            "answer --model a/b --image x.jpg --question q --answer-list nowhere.txt",
            1,
            "--answer-list: can't read nowhere.txt",
        ),
        (
            "answer --model a/b --image x.jpg --question q --num-ans-candidates 0",
            2,
            "--num-ans-candidates must be at least 1, got 0",
        ),
        ("answer --model blip2/shapes --image . --question q", 1, "no picture in the folder"),
    ],
)
def test_mistakes_are_one_line(
    arguments: str,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    error = capsys.readouterr().err
    assert ended.value.code == code and message in error and error.count("\n") == 1

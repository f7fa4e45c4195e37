"""`lavis-lite generate`: a line for every picture, in order, whatever is wrong with some of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import save_picture
from PIL import Image
from torch import Tensor, nn

from lavis_lite import generate
from lavis_lite.cli import main


class Echo(nn.Module):
    """Says how many pictures it saw at once, and the prompt it was given."""

    device = torch.device("cpu")

    def generate(self, samples: dict[str, Any], *, num_captions: int = 1, **settings: Any) -> list[str]:
        batch = len(samples["image"])
        return [
            f"{samples.get('prompt', '-')} {batch} {row}.{k}"
            for row in range(batch)
            for k in range(num_captions)
        ]


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
    assert ended.value.code == 1 and "1 pictures could not be read" in capsys.readouterr().err
    first, broken, last = lines(out)
    assert (first["text"], last["text"]) == ("hi 2 0.0", "hi 2 1.0")
    assert broken["error"] == "not a picture" and broken["image"].endswith("1.png")


def test_several_texts_and_single_files(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(pictures / "2.png"), str(pictures / "0.png")]
    main(["generate", "--model", "a/b", "--image", *files, "--num-captions", "2", "--batch-size", "1"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [files[0], files[0], files[1], files[1]]
    assert [row["text"] for row in rows] == ["- 1 0.0", "- 1 0.1"] * 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "blip2_t5", "--image", "x.jpg"], 2, "give a name and a type, e.g. blip2_t5/shapes"),
        (["--model", "a/b", "--image", "."], 1, "no picture in the folder"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["generate", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == code and message in error and error.count("\n") == 1

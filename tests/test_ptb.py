from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from data_helpers import COCO_MINI, needs_coco_mini

from lavis_lite.metrics.ptb import PUNCTUATION, words

# What Stanford's PTBTokenizer 3.4.1 made of these texts, without punctuation.
CASES = json.loads(Path(__file__).with_name("ptb_cases.json").read_text(encoding="utf-8"))
needs_java = pytest.mark.skipif(
    not (shutil.which("java") and find_spec("pycocoevalcap")), reason="needs Java and pycocoevalcap"
)


def stanford_words(captions: list[str], folder: Path) -> list[list[str]]:
    """The original's tokens of each caption, by the jar that pycocoevalcap brings."""
    (spec,) = find_spec("pycocoevalcap.tokenizer").submodule_search_locations  # type: ignore[union-attr]
    text = folder / "captions.txt"
    text.write_text("\n".join(caption.replace("\n", " ") for caption in captions), encoding="utf-8")
    command = ["java", "-cp", str(Path(spec) / "stanford-corenlp-3.4.1.jar")]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(text)]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True, timeout=120)
    lines = done.stdout.decode("utf-8").split("\n")[: len(captions)]
    assert len(lines) == len(captions)
    return [[word for word in line.split() if word not in PUNCTUATION] for line in lines]


@needs_java
@needs_coco_mini
def test_all_captions_of_coco_mini_have_the_originals_words(tmp_path: Path) -> None:
    captions = [
        annotation["caption"]
        for split in ("train", "val")
        for annotation in json.loads((COCO_MINI / f"annotations/captions_{split}2017.json").read_text())[
            "annotations"
        ]
    ]
    assert len(captions) == 795
    assert [list(words(caption)) for caption in captions] == stanford_words(captions, tmp_path)


@needs_java
def test_the_recorded_cases_are_the_originals(tmp_path: Path) -> None:
    found = stanford_words(list(CASES), tmp_path)
    assert {text: " ".join(own) for text, own in zip(CASES, found, strict=True)} == CASES


def test_the_recorded_cases() -> None:
    assert len(CASES) > 100
    assert {text: " ".join(words(text)) for text in CASES} == CASES


@pytest.mark.parametrize("text", ["", " ", "\n", ".", '"..." - !'[:-2], "😀"])
def test_texts_without_a_word(text: str) -> None:
    assert words(text) == ()


def test_a_line_break_is_a_space_and_accents_and_other_scripts_stay() -> None:
    assert words("A café\nnext to a naïve man") == ("a", "café", "next", "to", "a", "naïve", "man")
    assert words("Hund läuft — 日本語 हिन्दी") == ("hund", "läuft", "日本語", "हिन्दी")


def test_a_degenerate_caption_takes_no_time() -> None:
    assert len(words("dog " * 20_000)) == 20_000
    assert words("a" * 5_000) == ("a" * 5_000,)

"""The embedded world's captions, questions and tokenizer, each read back by a parser."""

from __future__ import annotations

import filecmp
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from lavis_lite.worlds.shapes.captions import STYLES, caption, captions, describe
from lavis_lite.worlds.shapes.parse import ceiling, consistent, parse
from lavis_lite.worlds.shapes.questions import TYPES, Question, answer, answers, questions
from lavis_lite.worlds.shapes.scene import Scene, SceneObject, sample_scene
from lavis_lite.worlds.shapes.vocabulary import FOLDER, vocabulary, write_tokenizer


def scenes(split: str = "train", count: int = 300) -> list[Scene]:
    return [sample_scene(seed=0, split=split, index=index) for index in range(count)]


TRIO = Scene(
    "navy",
    (
        SceneObject("ring", "orange", "large", 0, 0.2, 0.2, 0.17, 0.0),
        SceneObject("cross", "red", "small", 4, 0.5, 0.5, 0.12, 0.0),
        SceneObject("ring", "blue", "small", 8, 0.8, 0.8, 0.12, 0.0),
    ),
    1,
)


def test_captions_read_as_written_down_here() -> None:
    told = {style: caption(TRIO, style, random.Random(0)) for style in STYLES}
    assert (
        told["listing"] == "a large orange ring, a small red cross and a small blue ring on a navy background"
    )
    assert told["position"] == (
        "an orange ring at the top left, a red cross in the center and a blue ring at the bottom right"
    )
    assert (
        told["counting"] == "three shapes, one of them large: two rings in orange and blue and one red cross"
    )
    assert describe(TRIO) == (
        "there are three objects on a navy background: a large orange ring at the top left, "
        "a small red cross in the center and a small blue ring at the bottom right"
    )


@pytest.mark.parametrize("style", STYLES)
def test_every_statement_is_true_and_short_and_grammatical(style: str) -> None:
    lengths = []
    for number, scene in enumerate(scenes()):
        text = caption(scene, style, random.Random(number))
        assert consistent(parse(text), scene), (text, scene.key)
        for wrong in (" a orange", " an red", "  ", " ,"):
            assert wrong not in f" {text}"
        assert text[0] != "a" or not text.startswith("a orange")
        lengths.append(len(text.split()))
    assert 12 < sum(lengths) / len(lengths) < 20


def test_false_captions_are_noticed() -> None:
    swapped = {
        "a large orange ring, a small red cross and a small blue ring on a black background",
        "an orange ring at the top left, a red cross at the top and a blue ring at the bottom right",
        "three shapes, two of them large: two rings in orange and blue and one red cross",
        "a red cross is left of an orange ring and a red cross is above a blue ring",
        "an orange ring is below a red cross and left of a blue ring",
    }
    for text in swapped:
        assert not consistent(parse(text), TRIO), text


def test_two_captions_have_different_styles() -> None:
    for scene in scenes(count=50):
        first, second = captions(scene)
        assert first != second
    assert captions(TRIO) == captions(TRIO)
    assert len(set(captions(TRIO, count=4))) == 4


def test_captions_identify_their_pictures() -> None:
    # On 500 pictures it is 0.997; 200 keep this test short.
    gallery = scenes("test", 200)
    texts = [(number, text) for number, scene in enumerate(gallery) for text in captions(scene)]
    assert ceiling(texts, gallery) > 0.99


def asked(count: int = 800) -> list[tuple[Scene, Question]]:
    return [(scene, question) for scene in scenes(count=count) for question in questions(scene, count=10)]


def test_full_description_answers_every_question() -> None:
    for scene, question in asked(150):
        assert answer(question.text, describe(scene)) == question.answer, (question, scene.key)
        assert question.answer in answers()


def test_answers_are_balanced() -> None:
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in asked():
        by_type[question.type][question.answer] += 1
    assert set(by_type) == set(TYPES) and len(TYPES) == 11
    majority = {kind: max(counts.values()) / counts.total() for kind, counts in by_type.items()}
    assert max(majority.values()) < 0.58
    assert sum(majority.values()) / len(majority) < 0.34


def test_questions_are_of_different_types_and_reproducible() -> None:
    for scene in scenes(count=30):
        found = questions(scene)
        assert len({question.type for question in found}) == len(found) == 4
        assert found == questions(scene)


def test_tokenizer_covers_every_text() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.is_fast
    texts = [*answers(), *(f"a {word}" for word in ("photo", "picture", "image"))]
    for scene in scenes(count=200):
        texts += [*captions(scene, count=4), describe(scene)]
    texts += [question.text for _, question in asked(80)]
    encoded = tokenizer(texts)["input_ids"]
    unknown = [text for text, ids in zip(texts, encoded, strict=True) if tokenizer.unk_token_id in ids]
    assert not unknown, unknown[:3]
    assert encoded[0][0] == tokenizer.cls_token_id and encoded[0][-1] == tokenizer.sep_token_id
    assert (
        max(len(ids) for ids, text in zip(encoded, texts, strict=True) if not text.startswith("there ")) <= 32
    )
    assert (
        tokenizer.decode(tokenizer("An ORANGE ring")["input_ids"], skip_special_tokens=True)
        == "an orange ring"
    )


def test_tokenizer_files_are_those_the_function_writes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_tokenizer(tmp_path)
    names = sorted(path.name for path in FOLDER.iterdir())
    assert "tokenizer.json" in names
    assert vocabulary()[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert filecmp.cmp(tmp_path / "tokenizer.json", FOLDER / "tokenizer.json", shallow=False)

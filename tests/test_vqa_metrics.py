from __future__ import annotations

import sys

import pytest

from lavis_lite.common.errors import ConfigError
from lavis_lite.metrics.lemmas import lemmatise
from lavis_lite.metrics.vqa import accuracy, answer_type, means_by
from lavis_lite.metrics.vqa_text import normalise


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("The Two dogs", "2 dogs"),
        ("a an the", ""),
        ("An apple a day", "apple day"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("Yes.", "yes"),
        ("3.5.", "3.5"),
        ("u.s.a.", "usa"),
        (".5", ".5"),
        ("1,000", "1000"),
        ("1,000 red-blue", "1000 redblue"),
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("up - down", "up down"),
        ("yes/no", "yes no"),
        ("what?!", "what"),
        ("(left)", "left"),
        ("dont", "don't"),
        ("Dont know", "don't know"),
        ("its", "its"),
        ("well", "well"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("5 oclock", "5 o'clock"),
        ("5:30", "5:30"),
        ("john's", "john's"),
        ("$20", "$20"),
        (" two\n birds\t", "2 birds"),
        ("", ""),
    ],
)
def test_answers_are_cleaned_by_the_official_rules(raw: str, clean: str) -> None:
    assert normalise(raw) == clean


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # k of 10 agree: k leave-one-out subsets have k-1 that do, 10-k have k.
    [
        (0, 0.0),
        (1, 9 * (1 / 3) / 10),
        (2, (2 * 1 + 8 * 2) / 30),
        (3, (3 * 2 + 7 * 3) / 30),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_ten_answers_are_left_out_one_by_one(agreeing: int, expected: float) -> None:
    answers = ["red"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert accuracy("Red.", answers) == pytest.approx(expected)


def test_few_answers() -> None:
    assert accuracy("the cat", ["Cat"]) == 1 and accuracy("cats", ["cat"]) == 0
    assert accuracy("cat", ["cat", "cat"]) == pytest.approx(1 / 3)
    assert accuracy("cat", ["cat", "dog"]) == pytest.approx(1 / 6)
    assert accuracy("", ["the"]) == 1 and accuracy("", ["cat"]) == 0
    with pytest.raises(ValueError, match="without answers"):
        accuracy("cat", [])


def test_both_treatments_of_what_people_said() -> None:
    nine = ["none"] * 9 + ["0"]
    assert accuracy("none", nine) == 1
    assert accuracy("none", nine, truths="official") == pytest.approx(0.3)
    assert accuracy("two", ["2"] * 10) == 1 and accuracy("two", ["2"] * 10, truths="official") == 0
    assert accuracy("two", ["2"] * 9 + ["3"], truths="official") == 1
    assert accuracy("t shirt", ["t-shirt"] * 9 + ["shirt"], truths="official") == 1
    assert accuracy("Two", ["two"], truths="official") == 1
    # Cleaning decides by the answers as they stand, not by what is left of them.
    assert accuracy("yes", ["yes"] * 9 + ["yes."], truths="official") == 1


def test_dictionary_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lemmatise("Riding two horses") == "ride two horse"
    assert lemmatise("") == "" and lemmatise("left 12") == "left 12"
    assert accuracy(lemmatise("mice"), [lemmatise("mouse")]) == 1
    monkeypatch.setitem(sys.modules, "simplemma", None)
    with pytest.raises(ConfigError, match=r"pip install 'lavis-lite\[eval\]'"):
        lemmatise("mice")


def test_types_and_means() -> None:
    kinds = {
        "Yes": "yes/no",
        "no.": "yes/no",
        "two": "number",
        "3.5": "number",
        "1,000": "number",
        "red": "other",
    }
    assert {answer: answer_type(answer) for answer in kinds} == kinds
    found = means_by([("b", 1.0), ("a", 0.5), ("b", 0.0)])
    assert list(found.items()) == [("b", (0.5, 2)), ("a", (0.5, 1))]

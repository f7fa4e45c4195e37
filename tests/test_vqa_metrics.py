from __future__ import annotations

import itertools
import random
import sys

import pytest

from lavis_lite.common.errors import ConfigError
from lavis_lite.metrics.lemmas import lemmatise
from lavis_lite.metrics.vqa import Truths, accuracy, answer_type, means_by
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
        ("somethingd", "something'd"),
        ("somebody'd", "somebodyd"),
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
    def both(prediction: str, answers: list[str]) -> tuple[float, float]:
        official: tuple[Truths, Truths] = ("official", "official_later")
        first, later = (accuracy(prediction, answers, truths=truths) for truths in official)
        return first, later

    nine = ["none"] * 9 + ["0"]
    assert accuracy("none", nine) == 1 and both("none", nine) == (pytest.approx(0.3), 1)
    assert accuracy("two", ["2"] * 10) == 1 and both("two", ["2"] * 10) == (1, 0)
    assert both("Yes.", ["yes"] * 10) == (1, 0) and both("none", ["none"] * 10) == (0, 1)
    assert both("t-shirt", ["t-shirt"] * 10) == (0, 1), "who all agree keep their hyphen"
    assert both("two", ["2"] * 9 + ["3"]) == (1, 1)
    assert both("t shirt", ["t-shirt"] * 9 + ["shirt"]) == (1, 1)
    assert both("Two", ["two"]) == (1, 1)
    # Cleaning decides by the answers as they stand, not by what is left of them.
    assert both("yes", ["yes"] * 9 + ["yes."]) == (1, 1)


# --- the official script, slowly and once more ---------------------------------------------------------------

PIECES = [
    *("the", "A", "an", "Two", "none", "zero", "ten", "blue", "t-shirt", "yes", "No", "5"),
    *("dont", "cant", "isn't", "oclock", "somethingd", "somebody'd", "1,000", "3.5", ".5", "u.s.a."),
]
GLUE = ["", " ", " ", " ", ", ", ",", ".", ". ", "-", " - ", "/", "?", " ?!", "\n", "\t", "'", ":", "(", ") "]
REWRITTEN = {
    **{"none": "0", "zero": "0", "two": "2", "ten": "10"},
    **{"dont": "don't", "cant": "can't", "oclock": "o'clock"},
    **{"somethingd": "something'd", "somebody'd": "somebodyd"},
}


def by_hand_without_marks(text: str) -> str:
    grouped = any(
        text[at - 1].isdigit() and text[at] == "," and text[at + 1].isdigit()
        for at in range(1, len(text) - 1)
    )
    kept = []
    for mark in text:
        if mark not in ';/[]"{}()=+\\_-><@`,?!':
            kept.append(mark)
        elif not grouped and mark + " " not in text and " " + mark not in text:
            kept.append(" ")
    points = [
        at for at, mark in enumerate(kept) if mark == "." and not "".join(kept[at + 1 : at + 2]).isdigit()
    ]
    return "".join(mark for at, mark in enumerate(kept) if at not in points[:32])


def by_hand_cleaned(text: str) -> str:
    words = by_hand_without_marks(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    return " ".join(REWRITTEN.get(word, word) for word in words if word not in ("a", "an", "the"))


def by_hand(prediction: str, answers: list[str], *, later: bool) -> float:
    stripped = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if not later:
        said = by_hand_cleaned(prediction)
        given = answers if len(set(answers)) == 1 else [by_hand_without_marks(answer) for answer in answers]
    elif len(set(stripped)) == 1:
        said, given = prediction.replace("\n", " ").replace("\t", " ").strip(), stripped
    else:
        said, given = by_hand_cleaned(prediction), [by_hand_cleaned(answer) for answer in stripped]
    subsets = [given[:left_out] + given[left_out + 1 :] for left_out in range(len(given))]
    return sum(min(subset.count(said) / 3, 1) for subset in subsets) / len(subsets)


def test_official_accuracies_are_those_of_the_script() -> None:
    draw = random.Random(0)

    def text() -> str:
        parts = [(draw.choice(PIECES), draw.choice(GLUE)) for _ in range(draw.randint(1, 3))]
        return "".join(part for pair in parts for part in pair)

    scored: dict[str, list[float]] = {"official": [], "official_later": [], "normalised": []}
    for _ in range(5000):
        base = text()
        pool = [base, base.upper(), base.strip(), by_hand_cleaned(base), by_hand_without_marks(base), text()]
        size = draw.choice([2, 3, 10, 10])
        answers = [draw.choice(pool)] * size if draw.random() < 0.2 else draw.choices(pool, k=size)
        prediction = draw.choice(pool)
        for truths, found in scored.items():
            found.append(accuracy(prediction, answers, truths=truths))  # type: ignore[arg-type]
        assert scored["official"][-1] == pytest.approx(by_hand(prediction, answers, later=False))
        assert scored["official_later"][-1] == pytest.approx(by_hand(prediction, answers, later=True))
    pairs = list(itertools.combinations(scored.values(), 2))
    assert all(sum(a != b for a, b in zip(*pair, strict=True)) > 500 for pair in pairs), (
        "else nothing is shown"
    )
    assert all(sum(value > 0 for value in found) > 1000 for found in scored.values())


def test_dictionary_forms_of_cleaned_answers() -> None:
    for lemmatize, expected in ((False, 0), (True, 1), ("prediction", 1)):
        assert accuracy("The dogs, cats.", ["dog cat"], lemmatize=lemmatize) == expected  # type: ignore[arg-type]
    # OK-VQA: what people said is there in dictionary forms, a few of which are the dictionary's alone.
    people = ["race"] * 5 + ["better"] * 5
    assert accuracy("Racing.", people, truths="official", lemmatize="prediction") == 1
    assert accuracy("better", people, truths="official", lemmatize="prediction") == 0
    assert accuracy("better", people, truths="official", lemmatize=True) == 1
    assert accuracy("Racing", ["racing"] * 10, truths="official_later", lemmatize=True) == 1


def test_dictionary_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lemmatise("Riding two horses") == "ride two horse"
    assert lemmatise("") == "" and lemmatise("left 12") == "left 12"
    assert lemmatise("don't know") == "don't know", "not 'do know'"
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

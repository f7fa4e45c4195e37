"""VQAv2's and OK-VQA's two files: questions, and annotations with the answers to questions of the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lavis_lite.common.errors import DataError
from lavis_lite.datasets.readers import Place, load_json, numbered

EXAMPLES = 3  # numbers that a message names
ByNumber = dict[str, tuple[Place, Mapping[str, Any]]]


class Pair(NamedTuple):
    """A question and its annotation, None without a file of annotations, each with its place in its file."""

    place: Place
    question: Mapping[str, Any]
    told_at: Place
    told: Mapping[str, Any] | None


def read_pairs(questions: Path, annotations: Path | None, *, where: str) -> Iterator[Pair]:
    """The questions in their file's order.

    where: the YAML path of the split, for messages.
    Raises DataError, with the place, for files that aren't of this format or not of one split, and for a number that
    two questions or two annotations have.
    """
    asked = _by_number(questions, "questions")
    told = _by_number(annotations, "annotations") if annotations else {}
    if annotations:
        _check(questions, asked, annotations, told, where)
    for number, (place, question) in asked.items():
        yield Pair(place, question, *told.get(number, ("", None)))


def _by_number(path: Path, section: str) -> ByNumber:
    content = load_json(path, lines_too=False)
    rows = content.get(section) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{path}: no list '{section}', as VQAv2's files have it")
    found: ByNumber = {}
    for place, row in numbered(path, rows):
        place = f"{section}, {place}"
        if row.get("question_id") in (None, ""):
            raise DataError(f"{path}, {place}: no field 'question_id'")
        number = _number(row["question_id"])
        if number in found:
            raise DataError(
                f"{path}, {place}: question {number} is in {found[number][0]} already; take one of them out"
            )
        found[number] = place, row
    return found


def _number(value: Any) -> str:
    """What numbers are compared by: files made by other programs have 42 as "42" or 42.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _check(questions: Path, asked: ByNumber, annotations: Path, told: ByNumber, where: str) -> None:
    """DataError when the annotations aren't those of the questions."""
    remedy = f"set {where}.questions and {where}.annotations to the two files of one split"
    for what, numbers in (
        (f"questions of {questions} have no answers in {annotations}", asked.keys() - told.keys()),
        (f"annotations of {annotations} have no question in {questions}", told.keys() - asked.keys()),
    ):
        if numbers:
            shown = ", ".join(sorted(numbers)[:EXAMPLES])
            raise DataError(f"{len(numbers)} {what}, for example {shown}; {remedy}")
    for number, (place, question) in asked.items():
        told_at, annotation = told[number]
        pictures = [_number(row.get("image_id")) for row in (question, annotation)]
        if len(set(pictures)) > 1 and None not in (question.get("image_id"), annotation.get("image_id")):
            raise DataError(
                f"{annotations}, {told_at}: question {number} is about picture {pictures[1]}, but about "
                f"{pictures[0]} in {questions}, {place}; {remedy}"
            )

"""Questions about pictures with people's answers, from every supported format, as a stream of rows.

VQAv2's and OK-VQA's pairs of json files, GQA's objects by question number, and a row a question in json, jsonl, csv,
tsv and parquet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lavis_lite.common.errors import DataError
from lavis_lite.datasets.answer_cells import split_answers
from lavis_lite.datasets.question_pairs import read_pairs
from lavis_lite.datasets.readers import (
    STREAMS,
    Asked,
    Fielded,
    Place,
    Row,
    bad_text,
    is_selected,
    load_json,
    missing_field,
    numbered,
    path_format,
)
from lavis_lite.datasets.records import Source

FORMATS = ("auto", "vqa", "gqa", "json", *STREAMS)
# Names tried when no field is set, in this order.
USUAL_NAMES = {
    "image": ("image", "image_path", "file_name", "filename", "filepath", "path", "video", "video_path"),
    "question": ("question", "text_input"),
    "answer": ("answer", "answers", "text_output"),
    "question_id": ("question_id", "qid"),
    "image_id": ("image_id", "imageId", "video_id"),
    "answer_type": ("answer_type",),
    "question_type": ("question_type",),
}
GQA_IMAGE = "{image_id}.jpg"
CELLS = ("csv", "tsv")  # formats whose fields are text alone


@dataclass(frozen=True)
class QuestionFields:
    """The names that a file's fields have. None tries the usual ones, such as image, question, answer or answers,
    question_id, image_id, answer_type, question_type.

    answer: one text, or a list of those people gave, repeated as often as they gave it; a cell of csv and tsv may hold
    a JSON list. answer_separator: what parts the answers within a text, such as "|"; None: nothing does.
    question_id: by default the row's number. answer_type, question_type: what accuracies are reported by.
    """

    image: str | None = None
    question: str | None = None
    answer: str | None = None
    answer_separator: str | None = None
    question_id: str | None = None
    image_id: str | None = None
    answer_type: str | None = None
    question_type: str | None = None


@dataclass(frozen=True)
class QuestionSource(Source):
    """What a table of questions is made from.

    questions: of VQAv2's format, with the answers in `annotations`, or nowhere.
    image_name: a picture's path from its number, such as "COCO_val2014_{image_id:012}.jpg".
    pictures: a file of COCO's format whose `images` tell the path for a number.
    names: the names of the fields. needs_answers: of a split that is trained on: a question without an answer is a
    mistake there, rows that share a question's number are none. name_key: the configuration's key of `image_name`, and
    name_example: what it may be, for messages.
    """

    name_example: ClassVar[str] = "COCO_val2014_{image_id:012}.jpg"

    questions: Path | None = None
    image_name: str | None = None
    pictures: Path | None = None
    names: QuestionFields = field(default_factory=QuestionFields)
    needs_answers: bool = False
    name_key: str = "image_name"

    @property
    def path(self) -> Path:
        """The file with the questions."""
        return self.questions or self.annotations or self.images

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that decide the rows."""
        return tuple(path for path in (self.questions, self.annotations, self.pictures) if path)

    @property
    def has_cells(self) -> bool:
        """Whether the file's fields are text alone, as those of csv are."""
        return self.questions is None and _kind(self) in CELLS

    def unread(self) -> list[str]:
        """The fields of a row file's first row that nothing reads; none of VQAv2's and GQA's formats."""
        content = {} if self.questions is not None else _content(self)
        if isinstance(content, dict):
            return []
        _, first = next(content)
        read = {*_names(self, first).values(), *self.select}
        return [str(name) for name in first if name not in read]

    def rows(self) -> Iterator[Row]:
        """One row a question. Raises DataError with file, place and remedy."""
        named = Pictures(self)
        for entry in _entries(self):
            yield _row(self, entry, named)


class Entry(NamedTuple):
    """A question as its file has it; None where the file has nothing.

    told_at: file and place of the answers, where they aren't the question's own.
    """

    place: Place
    question_id: Any
    question: Any
    answers: Any
    image: Any
    image_id: Any
    answer_type: Any
    question_type: Any
    told_at: str | None = None


class Pictures:
    """Where a question's picture is: what its own row names, else by its number."""

    def __init__(self, source: QuestionSource) -> None:
        self.source = source
        self.by_id = _file_names(source.pictures) if source.pictures else {}

    def path(self, entry: Entry) -> str:
        """The picture's path; DataError when nothing tells it."""
        where, template = self.source.where, self.source.image_name
        about = f"{self.source.path}, {entry.place}: question {entry.question_id}"
        if isinstance(entry.image, str) and entry.image:
            return entry.image
        if entry.image_id is None or entry.image_id == "":
            raise DataError(f"{about} names no picture, neither by path nor by number; correct the file")
        if self.source.pictures:
            if str(entry.image_id) not in self.by_id:
                raise DataError(
                    f"{about} is about picture {entry.image_id}, which is not among the images of "
                    f"{self.source.pictures}; set {where}.pictures to the file of this split"
                )
            return self.by_id[str(entry.image_id)]
        if template is None:
            raise DataError(
                f"{about} is about picture {entry.image_id}, and nothing tells its path; set "
                f"{where}.{self.source.name_key}, such as '{self.source.name_example}', or "
                f"{where}.pictures to a COCO file with its `images`"
            )
        try:
            return template.format(image_id=entry.image_id, video_id=entry.image_id)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            number = "video_id" if "{video_id" in template else "image_id"
            raise DataError(
                f"{where}.{self.source.name_key}: '{template}' doesn't fit picture {entry.image_id!r} ({error}); "
                f"numbers take {{{number}:012}}, texts {{{number}}}"
            ) from error


def _file_names(path: Path) -> dict[str, str]:
    content = load_json(path, lines_too=False)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise DataError(f"{path}: no 'images', which tell a picture's path in COCO's files")
    rows = numbered(path, images)
    try:
        return {str(image["id"]): str(image["file_name"]) for _, image in rows}
    except KeyError as error:
        raise DataError(f"{path}: an entry of 'images' has no {error}") from error


def _entries(source: QuestionSource) -> Iterator[Entry]:
    """The questions of a file of any format."""
    if source.questions is not None:
        return _vqa(source, source.questions)
    content = _content(source)
    return _gqa(source, content) if isinstance(content, dict) else _mapped(source, content)


def _content(source: QuestionSource) -> Fielded | dict[str, Any]:
    """The rows of a file that has one a question, or GQA's questions by number."""
    path, kind = source.path, _kind(source)
    if kind in STREAMS:
        return STREAMS[kind](path)
    content = load_json(path, lines_too=source.format == "auto")
    if content is None:
        return STREAMS["jsonl"](path)
    if isinstance(content, list):
        return numbered(path, content)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        raise DataError(
            f"{path}: these are VQAv2's answers; set {source.where}.questions to the file with their questions"
        )
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise DataError(
            f"{path}: expected a list of rows, or GQA's questions by number; for VQAv2's two files set "
            f"{source.where}.questions and {source.where}.annotations"
        )
    return content


def _kind(source: QuestionSource) -> str:
    return path_format(source.path) if source.format == "auto" else source.format


# --- VQAv2 and OK-VQA ---------------------------------------------------------------------------------------


def _vqa(source: QuestionSource, path: Path) -> Iterator[Entry]:
    """Questions with the annotations of the same numbers; without an annotation file no answers."""
    for place, entry, told_at, told in read_pairs(path, source.annotations, where=source.where):
        if not is_selected(path, place, entry, source.select, source.where):
            continue
        found: Mapping[str, Any] = told or {}
        yield Entry(
            place,
            entry["question_id"],
            entry.get("question"),
            None if told is None else found.get("answers") or [],
            entry.get("image"),
            entry.get("image_id"),
            found.get("answer_type"),
            found.get("question_type"),
            None if told is None else f"{source.annotations}, {told_at}",
        )


# --- GQA ----------------------------------------------------------------------------------------------------


def _gqa(source: QuestionSource, content: Mapping[str, Any]) -> Iterator[Entry]:
    """Objects by question number: question, answer (absent in the test split), imageId, types."""
    for number, entry in content.items():
        place = f"question {number}"
        if not is_selected(source.path, place, entry, source.select, source.where):
            continue
        types = entry.get("types")
        yield Entry(
            place,
            number,
            entry.get("question"),
            entry.get("answer"),
            GQA_IMAGE.format(image_id=entry["imageId"])
            if source.image_name is None and entry.get("imageId")
            else None,
            entry.get("imageId"),
            None,
            types.get("structural") if isinstance(types, Mapping) else None,
        )


# --- a row a question ---------------------------------------------------------------------------------------


def _mapped(source: QuestionSource, rows: Fielded) -> Iterator[Entry]:
    names: dict[str, str] = {}
    places: dict[str, Place] = {}
    is_cell = source.has_cells
    for number, (place, record) in enumerate(rows):
        if not names:
            names = _names(source, record)
        if not is_selected(source.path, place, record, source.select, source.where):
            continue
        for role, name in names.items():
            if name not in record:
                raise DataError(missing_field(source.path, place, role, name, record, source.where))
        values = {role: record[name] for role, name in names.items()}
        own = values.get("question_id")
        own = number if own is None or own == "" else _plain(own)
        if "question_id" in names and not source.needs_answers:
            _check_new(source, own, place, places)
        answers = split_answers(
            values.get("answer"),
            source.names.answer_separator,
            is_cell=is_cell,
            about=f"{source.path}, {place}",
            where=source.where,
        )
        yield Entry(
            place,
            own,
            values.get("question"),
            [] if "answer" in names and answers is None else answers,
            values.get("image"),
            _plain(values.get("image_id")),
            values.get("answer_type"),
            values.get("question_type"),
        )


def _check_new(source: QuestionSource, number: Any, place: Place, places: dict[str, Place]) -> None:
    """DataError for a question's number that an earlier row has: no server takes two answers to one question."""
    first = places.setdefault(str(number), place)
    if first != place:
        raise DataError(
            f"{source.path}, {place}: question {number} is in {first} already; give each question one row, with all "
            "of its answers, and a number of its own"
        )


def _names(source: QuestionSource, record: Mapping[str, Any]) -> dict[str, str]:
    """The field of each role, decided by a file's first row."""
    names = {}
    for role, usual in USUAL_NAMES.items():
        declared: str | None = getattr(source.names, role)
        if declared is not None and declared not in record:
            raise DataError(missing_field(source.path, "", role, declared, record, source.where))
        name = declared or next((name for name in usual if name in record), None)
        if name is not None:
            names[role] = name
    for role, needed in (
        ("question", True),
        ("answer", source.needs_answers),
        ("image", "image_id" not in names),
    ):
        if needed and role not in names:
            name = USUAL_NAMES[role][0]
            raise DataError(missing_field(source.path, "", role, name, record, source.where))
    return names


def _plain(number: Any) -> Any:
    """A number written as text (all of a csv file is) as a number; anything else as it is."""
    return (
        int(number)
        if isinstance(number, str) and number.isdecimal() and str(int(number)) == number
        else number
    )


# --- a row of the table -------------------------------------------------------------------------------------


def _row(source: QuestionSource, entry: Entry, named: Pictures) -> Row:
    about = f"{source.path}, {entry.place}"
    if not isinstance(entry.question, str) or not entry.question.strip():
        raise DataError(f"{about}: question {entry.question_id} has no text")
    image = named.path(entry)
    answers = _answers(entry.answers, entry.told_at or about)
    if not any(answers) and (entry.answers is not None or source.needs_answers):
        raise DataError(
            f"{entry.told_at or about}: question {entry.question_id} has no answer; "
            + (
                "a training split needs answers: set "
                f"{source.where}.annotations to the file with them, or leave the split out"
                if entry.answers is None
                else "correct the file, or leave the row out"
            )
        )
    types = [_text(kind) for kind in (entry.answer_type, entry.question_type)]
    question = entry.question.strip()
    problem = None
    if any(bad_text(text) for text in (image, question, *answers)):
        problem = f"{about}: text with a lone surrogate (broken UTF-16)"
        image, question, *answers = (_clean(text) for text in (image, question, *answers))
    # A row that can't be used keeps its number: a file of results has to have an answer to it.
    asked = Asked(question, json.dumps(entry.question_id), answers, types[0], types[1])
    return Row(image, image_id=entry.image_id, problem=problem, question=asked)


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _answers(value: Any, about: str) -> list[str]:
    """What people answered; from one value or a list of values or of VQAv2's {"answer": ...}."""
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    values = [item.get("answer") if isinstance(item, Mapping) else item for item in values]
    if not all(isinstance(item, (str, int, float)) for item in values):
        raise DataError(f"{about}: the answer must be text or a list of texts, got {value!r:.80}")
    return [str(item).strip() for item in values]


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)

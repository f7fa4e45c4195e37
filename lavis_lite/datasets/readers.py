"""Annotation files of every supported format as a stream of rows.

jsonl, csv, tsv and parquet are read piece by piece; json files are read whole, and let go after the
conversion.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import DataError, closest

logger = logging.getLogger(__name__)

# Names tried when no field is set, in this order.
USUAL_NAMES = {
    "image": ("image", "image_path", "file_name", "filename", "filepath", "path", "video", "video_path"),
    "caption": ("caption", "captions", "text"),
    "image_id": ("image_id", "video_id"),
}
# (place in the file for messages, the row's fields)
Place = str
Fielded = Iterator[tuple[Place, Mapping[str, Any]]]


@dataclass(frozen=True)
class Asked:
    """A question about a picture.

    id: its number or name as JSON text, so that it is written again as it was read. answers: those people gave,
    each as often as it was given; none where the file tells none. answer_type, question_type: what scores are
    reported by; None where the file doesn't tell.
    """

    text: str
    id: str
    answers: list[str]
    answer_type: str | None = None
    question_type: str | None = None


@dataclass(frozen=True)
class Row:
    """One row of a file: `problem` says why it can't be used, None when it can. group: see `Fields`.

    question: what is asked of the picture; None for a picture with captions.
    """

    image: str
    captions: list[str] = field(default_factory=list)
    image_id: Any = None
    problem: str | None = None
    group: str | None = None
    question: Asked | None = None


@dataclass(frozen=True)
class Fields:
    """The names that a file's fields have for the picture's path, the caption or captions, and the picture's
    number.

    None tries the usual names: image, image_path, file_name, filename, filepath, path, video, video_path; caption,
    captions, text; image_id, video_id.

    group: a field by whose values an evaluation reports scores separately (NoCaps's `domain`); in COCO's and
    Karpathy's files one of a picture's entry. None: no groups.
    """

    image: str | None = None
    caption: str | None = None
    image_id: str | None = None
    group: str | None = None


def read_rows(
    path: Path, *, format: str, fields: Fields, select: Mapping[str, list[str]], where: str
) -> Iterator[Row]:
    """The rows of an annotation file.

    select: for a field, the values whose rows are taken. where: as of `Source`, for messages.
    Raises DataError with file, place and remedy.
    """
    kind = path_format(path) if format == "auto" else format
    if kind == "json":
        content = load_json(path, lines_too=format == "auto")
        if isinstance(content, dict):
            return _annotated(path, content, fields, select, where)
        if isinstance(content, list):
            return _mapped(path, numbered(path, content), fields, select, where)
        return _mapped(path, _jsonl(path), fields, select, where)
    if kind in ("coco", "karpathy"):
        content = load_json(path, lines_too=False)
        if isinstance(content, list) and kind == "karpathy":
            return _mapped(path, numbered(path, content), fields, select, where)
        return _annotated(path, content, fields, select, where)
    return _mapped(path, STREAMS[kind](path), fields, select, where)


def path_format(path: Path) -> str:
    """The format that a file's suffix tells; raises DataError for a suffix of none."""
    suffix = path.suffix.lower().lstrip(".")
    kind = {"ndjson": "jsonl", "pq": "parquet"}.get(suffix, suffix)
    if kind not in (*STREAMS, "json"):
        raise DataError(f"{path}: unknown suffix '.{suffix}'; name its format: json, {', '.join(STREAMS)}")
    return kind


def bad_text(text: str) -> bool:
    """Whether a string holds lone surrogates, which no encoding can write."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _mapped(
    path: Path, rows: Fielded, fields: Fields, select: Mapping[str, list[str]], where: str
) -> Iterator[Row]:
    names: dict[str, str] = {}
    for place, record in rows:
        if not names:
            names = _names(path, record, fields, where)
        if not is_selected(path, place, record, select, where):
            continue
        for role, name in names.items():
            if name not in record:
                raise DataError(missing_field(path, place, role, name, record, where))
        number = record[names["image_id"]] if "image_id" in names else None
        row = _row(path, place, record[names["image"]], record[names["caption"]], number)
        yield _grouped(row, path, place, record, fields, where)


def _names(path: Path, record: Mapping[str, Any], fields: Fields, where: str) -> dict[str, str]:
    """The field of each role, decided by a file's first row; without `image_id` where there is none."""
    found = {role: _field(path, record, fields, role, where) for role in USUAL_NAMES}
    return {role: name for role, name in found.items() if name is not None}


def _field(path: Path, record: Mapping[str, Any], fields: Fields, role: str, where: str) -> str | None:
    declared: str | None = getattr(fields, role)
    if declared is not None:
        if declared not in record:
            raise DataError(missing_field(path, "", role, declared, record, where))
        return declared
    usual = next((name for name in USUAL_NAMES[role] if name in record), None)
    if usual is None and role != "image_id":
        raise DataError(missing_field(path, "", role, USUAL_NAMES[role][0], record, where))
    return usual


def missing_field(
    path: Path, place: Place, role: str, name: str, record: Mapping[str, Any], where: str
) -> str:
    """What to tell a user whose row lacks the field `name` for a role."""
    there = [str(key) for key in record]
    hint = closest(name, there)
    if not where.startswith("--"):
        remedy = f"say which one it is with {where}.fields.{role}=<field>"
    elif role == "caption":
        remedy = "say which one it is with --caption-field <field>"
    else:
        remedy = f"give {where} a file in which it has that name"
    return (
        f"{path}{', ' + place if place else ''}: no field '{name}' for the {role}; "
        f"fields there: {', '.join(there)}" + (f"; {hint}" if hint else "") + f"; {remedy}"
    )


def is_selected(
    path: Path, place: Place, record: Mapping[str, Any], select: Mapping[str, list[str]], where: str
) -> bool:
    """Whether a row has one of the wanted values in each field of `select`; DataError without such a field."""
    for name, values in select.items():
        if name not in record:
            there = ", ".join(str(key) for key in record)
            raise DataError(
                f"{path}, {place}: no field '{name}', by which {where}.where selects rows; "
                f"fields there: {there}; {where}.where=null takes all rows"
            )
        if str(record[name]) not in values:
            return False
    return True


def _row(path: Path, place: Place, image: Any, captions: Any, image_id: Any) -> Row:
    """A row from the raw values of its fields; empty values make it a row with a problem, wrong types an
    error.
    """
    if image is None or image == "":
        return Row("", problem=f"{path}, {place}: no picture is named")
    if not isinstance(image, str):
        raise DataError(f"{path}, {place}: the picture's path is {type(image).__name__}, not text")
    captions = [] if captions is None else [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, (list, tuple)) or not all(isinstance(text, str) for text in captions):
        raise DataError(f"{path}, {place}: the caption must be text or a list of texts, got {captions!r:.80}")
    if bad_text(image) or any(bad_text(text) for text in captions):
        clean = image.encode("utf-8", "replace").decode()
        return Row(clean, problem=f"{path}, {place}: text with a lone surrogate (broken UTF-16)")
    texts = [text.strip() for text in captions if text.strip()]
    return Row(image, texts, image_id, None if texts else f"{path}, {place}: the caption is empty")


def _grouped(
    row: Row, path: Path, place: Place, record: Mapping[str, Any], fields: Fields, where: str
) -> Row:
    """The row with the group that the record is in, where a field for it is declared."""
    if fields.group is None:
        return row
    if fields.group not in record:
        raise DataError(missing_field(path, place, "group", fields.group, record, where))
    value = record[fields.group]
    return row if value is None or value == "" else replace(row, group=str(value))


# --- json ---------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A whole file's text, without the mark that some editors begin UTF-8 with; DataError for what isn't UTF-8."""
    return _decode(path, path.read_bytes())


def load_json(path: Path, *, lines_too: bool) -> Any:
    """A json file's content; None when it holds several values in a row (`lines_too`), as jsonl files do."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if lines_too and error.msg == "Extra data" and text.lstrip().startswith("{"):
            return None
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}, {place}: broken json: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{path}: broken json: nested too deeply") from error


def numbered(path: Path, rows: list[Any]) -> Fielded:
    """The rows of a list with their places; DataError for one that has no fields."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected an object with fields, got {type(row).__name__}")
        yield f"row {number}", row


def _annotated(
    path: Path, content: Any, fields: Fields, select: Mapping[str, list[str]], where: str
) -> Iterator[Row]:
    """COCO's captions (`images` and `annotations`), or Karpathy's files (`images` with `sentences`)."""
    images = content.get("images") if isinstance(content, dict) else None
    there = ", ".join(content) if isinstance(content, dict) else type(content).__name__
    if not isinstance(images, list):
        raise DataError(
            f"{path}: expected a list of rows, or COCO's 'images' and 'annotations'; got: {there}"
        )
    if "annotations" not in content:
        return _karpathy(path, images, fields, select, where)
    if not isinstance(content["annotations"], list):
        raise DataError(f"{path}: 'annotations' must be a list")
    return _coco(path, images, content["annotations"], fields, select, where)


def _coco(
    path: Path,
    images: list[Any],
    annotations: list[Any],
    fields: Fields,
    select: Mapping[str, list[str]],
    where: str,
) -> Iterator[Row]:
    """One row for each picture that has captions, in the order of `images`."""
    captions: dict[Any, list[str]] = {}
    for place, annotation in _within("annotations", numbered(path, annotations)):
        captions.setdefault(need_field(path, place, annotation, "image_id"), []).append(
            need_field(path, place, annotation, "caption")
        )
    left_out = 0
    for place, image in _within("images", numbered(path, images)):
        texts = captions.pop(need_field(path, place, image, "id"), None)
        left_out += texts is None
        if texts is not None and is_selected(path, place, image, select, where):
            row = _row(path, place, need_field(path, place, image, "file_name"), texts, image["id"])
            yield _grouped(row, path, place, image, fields, where)
    if left_out:
        logger.warning("%s: %d pictures have no caption and are left out", path, left_out)
    if captions:
        logger.warning("%s: %d image_ids of captions are not among its images", path, len(captions))


def _karpathy(
    path: Path, images: list[Any], fields: Fields, select: Mapping[str, list[str]], where: str
) -> Iterator[Row]:
    """Files such as dataset_coco.json and dataset_flickr30k.json: captions within each picture's entry."""
    for place, image in _within("images", numbered(path, images)):
        if not is_selected(path, place, image, select, where):
            continue
        name = need_field(path, place, image, "filename")
        sentences = need_field(path, place, image, "sentences")
        texts = [need_field(path, place, sentence, "raw") for sentence in sentences]
        folder = image.get("filepath")
        number = image.get("cocoid", image.get("imgid"))
        row = _row(path, place, f"{folder}/{name}" if folder else name, texts, number)
        yield _grouped(row, path, place, image, fields, where)


def _within(section: str, rows: Fielded) -> Fielded:
    return ((f"{section}, {place}", row) for place, row in rows)


def need_field(path: Path, place: Place, record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise DataError(
            f"{path}, {place}: no field '{name}'; fields there: {', '.join(record)}; "
            "this is not a captions file (COCO's are captions_train2017.json and the like)"
        )
    return record[name]


# --- line by line, piece by piece ---------------------------------------------------------------------------


def _decode(path: Path, data: bytes, line: int | None = None) -> str:
    try:
        return data.decode("utf-8-sig" if line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        number = line if line is not None else data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {number}: not valid UTF-8 (byte {data[error.start]:#04x}); "
            "convert the file, e.g. with `iconv -f latin1 -t utf-8`"
        ) from error


def _lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield _decode(path, line, number)


def _jsonl(path: Path) -> Fielded:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            place = f"line {number}, column {error.colno}"
            raise DataError(f"{path}, {place}: broken json: {error.msg}") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise DataError(f"{path}, line {number}: expected an object with fields, got {kind}")
        yield f"line {number}", row


def _csv(path: Path) -> Fielded:
    """Comma-separated with a header, quoted as spreadsheets do."""
    return _separated(path, csv.DictReader(_lines(path), strict=True))


def _tsv(path: Path) -> Fielded:
    """Tab-separated with a header; quotation marks are ordinary characters: captions have unpaired ones."""
    return _separated(path, csv.DictReader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE))


def _separated(path: Path, reader: csv.DictReader[str]) -> Fielded:
    csv.field_size_limit(1 << 24)
    try:
        for row in reader:
            if None in row:
                raise DataError(f"{path}, line {reader.line_num}: more values than the header has names")
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: {error}") from error


def _parquet(path: Path) -> Fielded:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            # Pictures may be stored in the same file: their bytes are not what is wanted here.
            columns = [column.name for column in file.schema_arrow if not _is_binary(column.type)]
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # OSError: a page that is cut short
        raise DataError(f"{path}, about row {number}: {' '.join(str(error).split())}") from error


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind))


STREAMS: dict[str, Callable[[Path], Fielded]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
}
FORMATS = ("auto", "coco", "karpathy", "json", *STREAMS)

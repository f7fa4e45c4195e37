"""Any annotation file as one Arrow table on disk, read through a memory map.

The table's pages belong to the system's cache: they are shared by all workers and don't count as anybody's
memory, however many rows there are. A file is converted once, row by row where its format allows, and again
when it changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa

from lavis_lite.common.errors import DataError
from lavis_lite.common.io import atomic_dir, cache_dir
from lavis_lite.datasets import folder, readers
from lavis_lite.datasets.readers import Asked, Fields, Row

logger = logging.getLogger(__name__)

# Raised when the table's layout or the meaning of a format changes, so that old tables are not read.
LAYOUT = 6
ROWS_PER_BATCH = 16384
QUESTION = pa.struct(
    [
        ("text", pa.string()),
        ("id", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("answer_type", pa.string()),
        ("question_type", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("image_id", pa.int64()),  # null where none is declared
        ("problem", pa.string()),  # null, or why the row can't be used
        ("group", pa.string()),  # null, or what an evaluation reports separately
        ("question", QUESTION),  # null, or what is asked of the picture
    ]
)


class Record(NamedTuple):
    """One row: a picture's path, relative to the image folder or absolute, and what is known of it."""

    image: str
    captions: list[str]
    image_id: int | None
    problem: str | None
    group: str | None = None
    question: Asked | None = None


@dataclass(frozen=True)
class Source:
    """What a table is made from.

    annotations: the file; None for a folder of pictures with .txt files beside them. images: the image
    folder. where: the YAML path of the split, or a command's option such as --annotations, for messages.
    group_by_image: join the rows of one picture. split_captions: a row for each caption. limit: rows. uncaptioned:
    pictures of a folder need no .txt file.

    kind: what the rows show.
    """

    kind: ClassVar[folder.Kind] = folder.PICTURES

    annotations: Path | None
    images: Path
    format: str = "auto"
    fields: Fields = field(default_factory=Fields)
    select: dict[str, list[str]] = field(default_factory=dict)
    group_by_image: bool = False
    split_captions: bool = False
    limit: int | None = None
    where: str = "datasets.custom.train"
    uncaptioned: bool = False

    @property
    def path(self) -> Path:
        """The annotation file, or the folder: what messages name."""
        return self.annotations or self.images

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the rows are read from; none for a folder."""
        return (self.annotations,) if self.annotations else ()

    def rows(self) -> Iterator[Row]:
        """The rows as they are read; see `readers.read_rows` and `folder.read_rows`."""
        if self.annotations is None:
            return folder.read_rows(
                self.images, where=self.where, uncaptioned=self.uncaptioned, kind=self.kind
            )
        return readers.read_rows(
            self.annotations, format=self.format, fields=self.fields, select=self.select, where=self.where
        )


class RecordTable:
    """Rows of a table by number. Pickles as its path alone. metadata: what `write_table` was told of it."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        table = reader.read_all()
        self.metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        self._columns = [table.column(name) for name in SCHEMA.names]

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, index: int) -> Record:
        image, captions, image_id, problem, group, asked = (c[index].as_py() for c in self._columns)
        return Record(image, captions or [], image_id, problem, group, asked and Asked(**asked))

    def problems(self) -> tuple[int, str | None]:
        """How many rows can't be used, which the table knows without a look at them, and the first one's reason."""
        column = self._columns[SCHEMA.get_field_index("problem")]
        known = (chunk for chunk in column.chunks if chunk.null_count < len(chunk))
        first = next((str(chunk.drop_null()[0]) for chunk in known), None)
        return len(column) - column.null_count, first

    def images(self) -> pa.ChunkedArray:
        """Every row's picture path, as `Record.image` has it."""
        return self._columns[0]

    def __reduce__(self) -> tuple[type[RecordTable], tuple[Path]]:
        return RecordTable, (self.path,)


def open_records(source: Source) -> RecordTable:
    """The table of `source`, converted now unless its cached table is up to date.

    Raises DataError: a file that is missing, not UTF-8, broken, or lacks a field, with the place and the
    remedy.
    """
    _check_readable(source)
    tables = cache_dir() / "tables"
    path = tables / f"{_key(source)}" / "table.arrow"
    try:
        tables.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            _convert(source, path.parent)
    except OSError as error:
        raise DataError(
            f"can't write the table of {source.path} below {tables}: {error.strerror or error}; "
            "set LAVIS_LITE_CACHE to a folder with room"
        ) from error
    return RecordTable(path)


def _check_readable(source: Source) -> None:
    for file in source.files:
        try:
            file.open("rb").close()
        except OSError as error:
            raise DataError(f"can't read {file}: {error.strerror} ({source.where})") from error


def _convert(source: Source, target: Path) -> None:
    rows = _rows(source)
    with atomic_dir(target) as temporary:
        count = write_table(rows, temporary / "table.arrow")
        if count == 0:
            chosen = f" with {source.where}.where={source.select}" if source.select else ""
            raise DataError(f"{source.path}: no rows{chosen} ({source.where})")
        about = {"rows": count, "layout": LAYOUT, **asdict(source)}
        (temporary / "about.json").write_text(json.dumps(about, default=str, indent=1), encoding="utf-8")
    logger.info("%s: %d rows, as a table in %s", source.path, count, target)


def write_table(rows: Iterable[Row], path: Path, *, metadata: dict[str, str] | None = None) -> int:
    """Write rows as an Arrow file, `ROWS_PER_BATCH` of them in memory at a time; returns how many."""
    count = 0
    iterator = iter(rows)
    schema = SCHEMA.with_metadata(metadata)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while batch := list(itertools.islice(iterator, ROWS_PER_BATCH)):
            writer.write_batch(_batch(batch))
            count += len(batch)
    return count


def _batch(rows: list[Row]) -> pa.RecordBatch:
    columns = [
        [row.image for row in rows],
        [row.captions for row in rows],
        [number_of(row.image_id) for row in rows],
        [row.problem for row in rows],
        [row.group for row in rows],
        [asdict(row.question) if row.question else None for row in rows],
    ]
    arrays = [pa.array(column, type=kind) for column, kind in zip(columns, SCHEMA.types, strict=True)]
    return pa.record_batch(arrays, schema=SCHEMA)


def number_of(image_id: Any) -> int | None:
    """A picture's number as int64: whole numbers as they are, anything else by 63 bits of its hash.

    None for an empty field and for NaN, which pandas writes for one: such rows are not one picture.
    """
    if image_id is None or image_id == "" or image_id != image_id:
        return None
    with contextlib.suppress(ValueError, OverflowError, TypeError):
        number = int(image_id)
        if (isinstance(image_id, int) or number == float(image_id)) and abs(number) < 1 << 63:
            return number
    digest = hashlib.blake2b(str(image_id).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _rows(source: Source) -> Iterator[Row]:
    rows = _grouped(source.rows()) if source.group_by_image else source.rows()
    rows = _split(rows) if source.split_captions else rows
    return itertools.islice(rows, source.limit) if source.limit is not None else rows


def _grouped(rows: Iterable[Row]) -> Iterator[Row]:
    """One row for each picture, by first appearance; for evaluation splits, which fit in memory."""
    grouped: dict[str, Row] = {}
    for row in rows:
        known = grouped.get(row.image)
        if known is None:
            grouped[row.image] = row
        elif row.captions:
            grouped[row.image] = replace(known, captions=[*known.captions, *row.captions], problem=None)
    yield from grouped.values()


def _split(rows: Iterable[Row]) -> Iterator[Row]:
    """One row for each caption; those of one row keep being of one picture."""
    for number, row in enumerate(rows):
        if len(row.captions) < 2:
            yield row
            continue
        # Pictures without a number count by their row; below zero these meet no declared one.
        known = -1 - number if number_of(row.image_id) is None else row.image_id
        for caption in row.captions:
            yield replace(row, captions=[caption], image_id=known)


def _key(source: Source) -> str:
    """Names the table: changes with the file's path, size and time, and with everything that decides its
    rows.
    """
    if not source.files:
        state: Any = folder.fingerprint(source.images, source.kind)
    else:
        states = [(str(file.resolve()), file.stat()) for file in source.files]
        state = [[name, status.st_size, status.st_mtime_ns] for name, status in states]
    decides = asdict(replace(source, where="", images=Path() if source.files else source.images))
    text = json.dumps([LAYOUT, str(source.path.resolve()), state, decides], default=str, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]

"""Where the pictures and the web's captions come from, in pieces that one process works on at a time."""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.datasets.readers import Fields, bad_text
from lavis_lite.datasets.records import RecordTable, Source, open_records
from lavis_lite.datasets.shard_rows import CAPTION_NAMES, PICTURES
from lavis_lite.datasets.shard_urls import is_local


@dataclass(frozen=True)
class Item:
    """A picture.

    key: names it, in the output too. content: its file; None when there is none. name: what messages call it.
    captions: the web's. about: what is known of it and goes on into the output. problem: why it can't be used.
    """

    key: str
    name: str
    content: bytes | None = None
    captions: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


class Piece(Protocol):
    """What one process reads from beginning to end.

    damage: after reading, why it broke off where it did; None when it was whole.
    """

    damage: str | None

    def __iter__(self) -> Iterator[Item]: ...


class Inputs(Protocol):
    """All there is to do. about: what tells these inputs from others."""

    about: dict[str, Any]

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What messages call a piece."""
        ...

    def open(self, number: int) -> Piece:
        """A piece, from its beginning; raises DataError, while it is read too, when it can't be read now."""
        ...


class ImageFolder:
    """Pictures of a folder with any annotation file; a piece is so many rows.

    annotations: None for .txt files beside the pictures. group_by_image: rows of one picture are one item.
    Raises DataError: see `open_records`.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path | None,
        *,
        shard_size: int,
        caption_field: str | None = None,
        group_by_image: bool = False,
    ) -> None:
        if not images.is_dir():
            raise DataError(f"--images: no folder '{images}'")
        if shard_size < 1:
            raise ConfigError(f"--shard-size must be at least 1, got {shard_size}")
        fields = Fields(caption=caption_field)
        where = "--annotations"
        self.records: RecordTable = open_records(
            Source(annotations, images, fields=fields, group_by_image=group_by_image, where=where)
        )
        self.images = images
        self.shard_size = shard_size
        self.about = {
            "images": str(images),
            "annotations": str(annotations) if annotations else None,
            "rows": len(self.records),
            "shard_size": shard_size,
        }

    def __len__(self) -> int:
        return -(-len(self.records) // self.shard_size)

    def name(self, number: int) -> str:
        """The rows of a piece."""
        rows = self._rows(number)
        return f"rows {rows[0]} to {rows[-1]} of {self.about['annotations'] or self.images}"

    def open(self, number: int) -> Piece:
        """See `Inputs`."""
        return _Rows(self, self._rows(number))

    def _rows(self, number: int) -> range:
        return range(number * self.shard_size, min((number + 1) * self.shard_size, len(self.records)))

    def item(self, row: int) -> Item:
        """A row; a picture that has no caption is none the worse for it."""
        record = self.records[row]
        key = f"{row:09d}"
        if not record.image:
            return Item(key, f"row {row}", problem=record.problem)
        path = self.images / record.image
        about: dict[str, Any] = {"image": record.image}
        if record.image_id is not None:
            about["image_id"] = record.image_id
        try:
            return Item(key, str(path), path.read_bytes(), record.captions, about)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            problem = "no such file" if missing else error.strerror or "can't be read"
            return Item(key, str(path), problem=problem)


class _Rows:
    damage: str | None = None

    def __init__(self, source: ImageFolder, rows: range) -> None:
        self.source = source
        self.rows = rows

    def __iter__(self) -> Iterator[Item]:
        return map(self.source.item, self.rows)


class TarShards:
    """Shards in webdataset's layout; a piece is one of them.

    pattern: paths, with {000..123} and several joined by ::, pipe: commands and http(s) addresses among them.
    caption_field: of the json member; by default captions, caption or text, and else the txt member, of which each
        line is one.
    """

    def __init__(self, pattern: str, *, caption_field: str | None = None) -> None:
        from webdataset.shardlists import expand_urls

        self.urls: list[str] = list(expand_urls(pattern))
        self.caption_field = caption_field
        if not self.urls:
            raise ConfigError(f"--shards '{pattern}' names no shard")
        missing = [url for url in self.urls if is_local(url) and not Path(url).is_file()]
        if missing:
            raise DataError(
                f"--shards '{pattern}': {len(missing)} of {len(self.urls)} shards are not there, e.g. '{missing[0]}'"
            )
        self.about = {"shards": self.urls}

    def __len__(self) -> int:
        return len(self.urls)

    def name(self, number: int) -> str:
        """The path or address of a shard."""
        return self.urls[number]

    def open(self, number: int) -> Piece:
        """See `Inputs`."""
        return _Tar(self.urls[number], self.caption_field)


class _Tar:
    """A local shard that breaks off is damaged for good, and what came before is used; a stream that does may be
    whole the next time, and nothing of it is."""

    def __init__(self, url: str, caption_field: str | None) -> None:
        self.url = url
        self.caption_field = caption_field
        self.damage: str | None = None

    def __iter__(self) -> Iterator[Item]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        local = is_local(self.url)
        try:
            with contextlib.closing(self._stream(local)) as stream:
                members = tar_file_expander([{"url": self.url, "stream": stream}])
                for sample in group_by_keys(members):
                    yield self._item(sample)
                while stream.read(1 << 16):  # a command whose end nobody reads would fail for that
                    pass
        except (tarfile.TarError, EOFError, ValueError) as error:
            reason = str(error.args[0]) if error.args else type(error).__name__
            if not local:
                raise DataError(f"{self.url}: the stream broke off: {reason}") from error
            self.damage = reason
        except OSError as error:
            raise DataError(f"{self.url}: can't be read: {error.strerror or error}") from error

    def _stream(self, local: bool) -> Any:
        if local:
            return open(self.url, "rb")
        from webdataset import gopen

        return gopen(self.url)

    def _item(self, sample: Mapping[str, Any]) -> Item:
        key = str(sample["__key__"])
        name = f"{self.url}, {key}"
        member = next((suffix for suffix in sample if suffix in PICTURES), None)
        if member is None:
            found = ", ".join(suffix for suffix in sample if not suffix.startswith("__"))
            return Item(key, name, problem=f"no picture among its members ({found})")
        try:
            return Item(key, name, sample[member], _captions(sample, self.caption_field))
        except ValueError as error:
            return Item(key, name, problem=str(error))


def _captions(sample: Mapping[str, Any], caption_field: str | None) -> list[str]:
    """The web's captions of a sample; none where nothing is said. ValueError when they can't be read."""
    if "json" in sample:
        try:
            about = json.loads(sample["json"])
        except ValueError as error:
            raise ValueError(f"its json member is broken: {error}") from error
        names = (caption_field,) if caption_field else CAPTION_NAMES
        found = next((about[name] for name in names if isinstance(about, dict) and about.get(name)), None)
        if found is not None:
            texts = [found] if isinstance(found, str) else found
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError("its caption is neither text nor a list of texts")
            return [text for text in texts if not bad_text(text)]
    if "txt" in sample:
        try:
            return sample["txt"].decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"its txt member is not UTF-8 (byte {error.start})") from error
    return []

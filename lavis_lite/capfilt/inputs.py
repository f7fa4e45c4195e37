"""Where the pictures and the web's captions come from, in pieces that one process works on at a time."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.readers import Fields
from lavis_lite.datasets.records import RecordTable, Source, open_records
from lavis_lite.datasets.shard_rows import SampleForm
from lavis_lite.datasets.shard_urls import expand, is_local, is_local_tar
from lavis_lite.datasets.tar_members import Sample, read_member, samples_of
from lavis_lite.datasets.tar_streams import BrokenStream, stream_samples, why


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

    annotations: None for .txt files beside the pictures, where there are any. group_by_image: rows of one picture are
        one item.
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
        where = "--annotations" if annotations else "--images"
        self.records: RecordTable = open_records(
            Source(
                annotations,
                images,
                fields=fields,
                group_by_image=group_by_image,
                where=where,
                uncaptioned=annotations is None,
            )
        )
        self.images = images
        self.shard_size = shard_size
        self.about = {
            "images": str(images),
            "annotations": str(annotations) if annotations else None,
            "rows": len(self.records),
            "table": self.records.path.parent.name,  # another when the annotations change
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
        known = {"image": record.image, "image_id": record.image_id, "group": record.group}
        about = {name: value for name, value in known.items() if value is not None}
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

    pattern: paths, with {000..123}, * and ~ and several joined by ::, pipe: commands and http(s) addresses among them.
    image: the extension of the picture's member; None: the first that is one of a picture.
    caption_field: of the json member; by default captions, caption or text, and else the txt member, of which each
        line is one.
    """

    def __init__(self, pattern: str, *, image: str | None = None, caption_field: str | None = None) -> None:
        self.urls = expand(pattern)
        self.form = SampleForm(image, fields=Fields(caption=caption_field))
        missing = [url for url in self.urls if is_local(url) and not Path(url).is_file()]
        if missing:
            raise DataError(
                f"--shards '{pattern}': {len(missing)} of {len(self.urls)} shards are not there, e.g. '{missing[0]}'"
            )
        self.about = {"shards": self.urls, "caption_field": caption_field}
        if image is not None:  # jobs of before there was a choice go on
            self.about["image"] = image

    def __len__(self) -> int:
        return len(self.urls)

    def name(self, number: int) -> str:
        """The path or address of a shard."""
        return self.urls[number]

    def open(self, number: int) -> Piece:
        """See `Inputs`."""
        url = self.urls[number]
        return _LocalTar(url, self.form) if is_local_tar(url) else _Stream(url, self.form)


class _LocalTar:
    """A tar file, read as the shard datasets read it; where it breaks off it is damaged for good, and what came before
    is used."""

    def __init__(self, path: str, form: SampleForm) -> None:
        self.path = path
        self.form = form
        self.damage: str | None = None

    def __iter__(self) -> Iterator[Item]:
        try:
            for sample in samples_of(Path(self.path)):
                yield self._item(sample)
        except UnreadableSample as error:
            _raise_if_disk(error, self.path)
            self.damage = error.reason
        except OSError as error:
            raise DataError(f"{self.path}: can't be read: {why(error)}") from error

    def _item(self, sample: Sample) -> Item:
        def read(extension: str) -> bytes:
            try:
                return read_member(sample.members[extension])
            except UnreadableSample as error:
                _raise_if_disk(error, self.path)
                raise

        return _item(self.path, sample.key, sample.members, read, self.form)


class _Stream:
    """What can only be read from its beginning to its end: an address, a command, a compressed tar.

    A compressed file that breaks off is damaged for good, and what came before is used; an address or a command that
    does may be whole the next time, and nothing of it is.
    """

    def __init__(self, url: str, form: SampleForm) -> None:
        self.url = url
        self.form = form
        self.damage: str | None = None

    def __iter__(self) -> Iterator[Item]:
        try:
            for key, members in stream_samples(self.url):
                yield _item(self.url, key, members, members.__getitem__, self.form)
        except BrokenStream as error:
            if not is_local(self.url):
                raise DataError(f"{self.url}: can't be read: {why(error)}") from error
            self.damage = why(error)
        except OSError as error:
            raise DataError(f"{self.url}: can't be read: {why(error)}") from error


def _item(
    shard: str, key: str, members: Mapping[str, Any], read: Callable[[str], bytes], form: SampleForm
) -> Item:
    """The picture of a sample; one without a caption is none the worse for it. read: as of `SampleForm.row`."""
    name = f"{shard}, {key}"
    picture = form.shown(members)
    if picture is None:
        wanted = f"no .{form.image}" if form.image else "no picture"
        return Item(key, name, problem=f"{wanted} among its members ({', '.join(members)})")
    try:
        captions, about = form.told(name, members, read)
        return Item(key, name, read(picture), captions, about)
    except UnreadableSample as error:
        return Item(key, name, problem=error.reason)


def _raise_if_disk(error: UnreadableSample, path: str) -> None:
    """Raise DataError where the disk was at fault, not what is on it: another time it may read."""
    cause = error.__cause__
    if isinstance(cause, OSError) and not isinstance(cause, tarfile.TarError):
        raise DataError(f"{path}: can't be read: {cause.strerror or cause}") from error

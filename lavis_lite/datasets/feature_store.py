"""Features of pictures' views on disk: files of some pictures each, written whole and read through a memory map.

N pictures, V views of each, P image tokens, C encoder width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lavis_lite.common.errors import DataError
from lavis_lite.common.io import atomic_file
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.order import CHOICE, seed_of
from lavis_lite.datasets.pictures import Pictures
from lavis_lite.image_features import DTYPES, FeaturePrecision, ImageFeatures

# What a killed build loses at most, and what a process holds in memory until it is written.
SHARD_BYTES = 64 * 2**20
# The one key of a file's metadata.
ABOUT = "about"
NOTHING = '{"pictures": null, "contents": null, "problems": {}}'


@dataclass(frozen=True)
class Layout:
    """What is stored of each picture: V views of P tokens of C numbers; and how many pictures share a file."""

    views: int
    tokens: int
    width: int
    precision: FeaturePrecision
    per_shard: int

    @classmethod
    def of(cls, views: int, tokens: int, width: int, precision: FeaturePrecision) -> Layout:
        """A layout whose files have about `SHARD_BYTES`."""
        one = cls(views, tokens, width, precision, per_shard=1).picture_bytes
        return cls(views, tokens, width, precision, per_shard=max(1, SHARD_BYTES // one))

    def shards(self, pictures: int) -> list[range]:
        """The numbers of the pictures in each file."""
        step = self.per_shard
        return [range(start, min(start + step, pictures)) for start in range(0, pictures, step)]

    @property
    def picture_bytes(self) -> int:
        """Bytes of one picture's views on disk."""
        scale = 4 if self.precision == "int8" else 0
        return self.views * self.tokens * (self.width * DTYPES[self.precision].itemsize + scale)


class FeatureStore:
    """The features of N pictures in a folder; pickles as these arguments, its files not open.

    states: for each file, the state of its pictures, see `Files`.
    """

    def __init__(self, folder: Path, layout: Layout, pictures: int, states: Sequence[str]) -> None:
        self.folder = folder
        self.layout = layout
        self.pictures = pictures
        self.states = list(states)
        self._open: dict[int, Shard] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, (self.folder, self.layout, self.pictures, self.states)

    def numbers(self, shard: int) -> range:
        """The pictures of a file."""
        start = shard * self.layout.per_shard
        return range(start, min(start + self.layout.per_shard, self.pictures))

    def path(self, shard: int) -> Path:
        """Where a file is, or is to be."""
        return self.folder / f"{shard:06d}.safetensors"

    def __str__(self) -> str:
        one = self.layout
        views = f"{one.views} view{'s' if one.views > 1 else ''}"
        return f"{self.pictures:,} pictures x {views} x {one.tokens} tokens x {one.width} in {one.precision}"

    def size(self, shards: Sequence[int] | None = None) -> int:
        """Bytes of all features, or those of some files, there or not."""
        shards = range(len(self.states)) if shards is None else shards
        return sum(len(self.numbers(shard)) for shard in shards) * self.layout.picture_bytes

    def missing(self) -> list[int]:
        """The files that are not there, not whole, or of pictures in another state."""
        return [shard for shard in range(len(self.states)) if not self._has(shard)]

    def _has(self, shard: int) -> bool:
        try:
            with safe_open(self.path(shard), framework="pt") as file:
                about = _about(file)
                shape = file.get_slice("values").get_shape()
        except (OSError, SafetensorError):
            return False
        layout = self.layout
        wanted = [len(self.numbers(shard)), layout.views, layout.tokens, layout.width]
        return about["pictures"] == self.states[shard] and list(shape) == wanted

    def contents(self, shard: int) -> str:
        """What was told of the pictures' contents when a file that is there was written."""
        with safe_open(self.path(shard), framework="pt") as file:
            return str(_about(file)["contents"])

    def write(self, shard: int, features: ImageFeatures, problems: Mapping[int, str], contents: str) -> None:
        """Write a file of features [n, V, P, C]; complete or not there, whatever happens meanwhile.

        problems: number of a picture without features -> why it has none. contents: `joined_contents` of the pictures.
        Raises OSError when the disk is full.
        """
        tensors = {"values": features.values}
        if features.scale is not None:
            tensors["scale"] = features.scale
        about = {"pictures": self.states[shard], "contents": contents, "problems": dict(problems)}
        content = save(tensors, metadata={ABOUT: json.dumps(about)})
        with atomic_file(self.path(shard)) as temporary:
            temporary.write_bytes(content)

    def read(self, number: int, view: int) -> ImageFeatures | str:
        """A view's features [P, C], which lie in the memory map; for a picture without features, why it has none.

        Raises DataError when its file is not there.
        """
        shard, place = divmod(number, self.layout.per_shard)
        if shard not in self._open:  # by its first reader: a worker opens what it reads
            self._open[shard] = _open_shard(self.path(shard), self.states[shard])
        return self._open[shard].read(number, place, view)


@dataclass(frozen=True)
class Shard:
    """An open file: values [n, V, P, C], scale [n, V, P, 1] of int8, reasons of pictures without features."""

    values: Tensor
    scale: Tensor | None
    problems: dict[int, str]

    def read(self, number: int, place: int, view: int) -> ImageFeatures | str:
        """See `FeatureStore.read`; place: of the picture in this file."""
        if number in self.problems:
            return self.problems[number]
        scale = None if self.scale is None else self.scale[place, view]
        return ImageFeatures(self.values[place, view], scale)


def _about(file: Any) -> dict[str, Any]:
    """What is said in an open file: the state of its pictures, and why some have no features."""
    # One key, since the library writes several in any order and equal features shall make equal files.
    about: dict[str, Any] = json.loads((file.metadata() or {}).get(ABOUT, NOTHING))
    return about


def _open_shard(path: Path, state: str) -> Shard:
    try:
        with safe_open(path, framework="pt") as file:
            about = _about(file)
            if about["pictures"] != state:
                raise OSError(
                    "it is of other pictures now: another run with this dataset's name has written it"
                )
            scale = file.get_tensor("scale") if "scale" in file.keys() else None  # noqa: SIM118  # no mapping
            values = file.get_tensor("values")
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"stored features can't be read: {path}: {error}; the same command again builds what is missing"
        ) from error
    return Shard(values, scale, {int(n): reason for n, reason in about["problems"].items()})


class StoredViews:
    """The images of a dataset's rows by number: one of a picture's stored views, drawn by the row's seed."""

    def __init__(self, pictures: Pictures, store: FeatureStore) -> None:
        self.pictures = pictures
        self.store = store

    def load(self, row: int, *, seed: int) -> ImageFeatures:
        """Features [P, C] of the view that the seed draws of the row's picture.

        Raises UnreadableSample where the picture couldn't be read.
        """
        number = self.pictures.of_row(row)
        found = self.store.read(number, self.view(seed))
        if isinstance(found, str):
            raise UnreadableSample(self.pictures.path(number), found)
        return found

    def view(self, seed: int) -> int:
        """The view that a row's seed draws; each is as likely as the others."""
        return seed_of(CHOICE, seed) % self.store.layout.views

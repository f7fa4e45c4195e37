"""The distinct pictures of a dataset by number, and fixed augmented views of each.

Several rows may show one picture (questions about it, its captions one by one); its features are stored once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lavis_lite.common.fingerprint import digest
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.image_text import ImageTextDataset, seeded
from lavis_lite.datasets.images import decode_image, read_bytes
from lavis_lite.datasets.order import VIEW, seed_of
from lavis_lite.datasets.tar_members import Address


class Files(NamedTuple):
    """Some pictures' files as they are now, in two texts.

    state: changes when a path below its folder, or a size, does. times: when a modification time does, which copies of
    the same files have of their own.
    """

    state: str
    times: str


class Pictures:
    """The N distinct pictures of a dataset, numbered by their first row in each part."""

    def __init__(self, dataset: ImageTextDataset) -> None:
        self.dataset = dataset
        self._names: list[pa.Array] = []
        numbers: list[NDArray[np.int64]] = []
        self._starts = [0]
        for part in dataset.parts:
            column = part.records.images()
            names = pc.unique(column)
            found = pc.index_in(column, value_set=names).to_numpy()
            numbers.append(found.astype(np.int64) + self._starts[-1])
            self._names.append(names)
            self._starts.append(self._starts[-1] + len(names))
        joined = np.concatenate(numbers) if numbers else np.zeros(0, np.int64)
        # Where every row has a picture of its own there is nothing to look up, nor to keep in memory.
        self._number = None if len(joined) == len(self) else joined

    def __len__(self) -> int:
        return self._starts[-1]

    def of_row(self, row: int) -> int:
        """The number of a row's picture."""
        return row if self._number is None else int(self._number[row])

    def path(self, number: int) -> str:
        """Where a picture is."""
        part, name = self._place(number)
        return os.path.join(self.dataset.parts[part].images, name)

    def read(self, number: int) -> bytes:
        """What is in a picture's file; raises UnreadableSample."""
        return read_bytes(self.path(number))

    def views(self, number: int, *, count: int, seed: int, file: bytes | None = None) -> Tensor:
        """Views 0..count-1 of a picture, float32[count, 3, H, W], as the dataset's image processor makes them.

        View v is a function of (seed, the dataset's name, the picture's path below its folder, v) alone. Raises
        UnreadableSample.

        file: what `read` gave, where it has been called.
        """
        part, name = self._place(number)
        picture = decode_image(io.BytesIO(self.read(number) if file is None else file), self.path(number))
        own = seed_of(VIEW, seed, *self.dataset.name.encode(), part, *name.encode("utf-8", "surrogatepass"))
        tensors = []
        for view in range(count):
            with seeded(seed_of(own, view)):
                tensors.append(self.dataset.vis_processor(picture))
        return torch.stack(tensors)

    def files(self, numbers: range) -> Files:
        """What these pictures' files are, without reading them."""
        found = [self._file(number) for number in numbers]
        states, times = [state for state, _ in found], [time for _, time in found]
        return Files(digest(json.dumps(states), 32), digest(json.dumps(times), 32))

    def _file(self, number: int) -> tuple[list[Any], int]:
        """(part, path below its folder, size) and modification time."""
        part, name = self._place(number)
        path = self.path(number)
        member = Address.parse(path)
        try:
            status = os.stat(member.tar if member else path)
        except (OSError, ValueError):  # missing, or no path at all: a row that can't be read either way
            return [part, name, None], 0
        return [part, name, member.size if member else status.st_size], status.st_mtime_ns

    def content(self, number: int) -> str | None:
        """A text that changes with any bit of a picture's file; None for one that can't be read."""
        try:
            return _content(self.read(number))
        except UnreadableSample:
            return None

    def _place(self, number: int) -> tuple[int, str]:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return part, self._names[part][number - self._starts[part]].as_py() or ""


def _content(file: bytes) -> str:
    return hashlib.sha256(file).hexdigest()[:32]


def joined_contents(contents: Iterable[str | None]) -> str:
    """One text for `Pictures.content` of several pictures in their order."""
    return digest(json.dumps(list(contents)), 32)


class Viewed(NamedTuple):
    """Some pictures' views: the numbers of those that could be read, their views float32[len(numbers) * V, 3, H, W]
    (None where none could), and (number, path, reason) of the others. contents: `Pictures.content` of all in the order
    they were asked for."""

    numbers: list[int]
    views: Tensor | None
    failures: list[tuple[int, str, str]]
    contents: list[str | None]


@dataclass(frozen=True)
class ViewReader(Dataset[Viewed]):
    """Reads the views of several pictures at once; what DataLoader's workers run."""

    pictures: Pictures
    count: int
    seed: int

    def __getitem__(self, numbers: Sequence[int]) -> Viewed:
        good, views, failures, contents = [], [], [], []
        for number in numbers:
            content = None
            try:
                file = self.pictures.read(number)
                content = _content(file)
                views.append(self.pictures.views(number, count=self.count, seed=self.seed, file=file))
                good.append(number)
            except UnreadableSample as error:
                failures.append((number, error.path, error.reason))
            contents.append(content)
        return Viewed(good, torch.cat(views) if views else None, failures, contents)

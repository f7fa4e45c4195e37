"""The one map-style dataset: rows of annotation tables, their pictures in folders, processors on top."""

from __future__ import annotations

import bisect
import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeGuard

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.folder import PICTURES, Kind
from lavis_lite.datasets.images import read_image
from lavis_lite.datasets.order import seed_of
from lavis_lite.datasets.records import Record, RecordTable
from lavis_lite.image_features import ImageFeatures, stack_images


@dataclass(frozen=True)
class Part:
    """One annotation table and the folder its relative picture paths start from."""

    records: RecordTable
    images: Path


class StoredImages(Protocol):
    """What a dataset may take its images from in place of picture files."""

    def load(self, row: int, *, seed: int) -> ImageFeatures:
        """Features [P, C] of a view of the row's picture, chosen by the seed; raises UnreadableSample."""
        ...


class ImageTextDataset:
    """Pictures with one or more captions each.

    Args:
        parts: tables whose rows follow each other.
        vis_processor: picture in RGB -> float32[3, H, W].
        text_processor: caption -> string.
        name: of the dataset. Picture numbers of datasets with different names never meet; those with the same
        name
            (its splits and parts) share the numbers their files declare.

    visual: the batch's key of what is seen. texts: what goes with it, captions or questions with answers. kind: of its
    files. `_see` and `_picture` are what a dataset of other files replaces.
    """

    visual: ClassVar[str] = "image"
    texts: ClassVar[str] = "captions"
    kind: ClassVar[Kind] = PICTURES

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        vis_processor: Callable[[Image.Image], Tensor],
        text_processor: Callable[[str], str],
        name: str = "image_text",
    ) -> None:
        self.parts = list(parts)
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.name = name
        self._ends = list(itertools.accumulate(len(part.records) for part in self.parts))
        self._salt = seed_of(*name.encode())
        self.stored: StoredImages | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row as a person looks at it: the unprocessed picture, its first caption, all captions, the
        number.

        Raises IndexError, or UnreadableSample. Training reads rows with `load`.
        """
        record, part = self._record(index)
        captions = self._raw_captions(record, part)
        return {
            "image": self._picture(self._path(record, part)),
            "text_input": captions[0],
            "captions": captions,
            "image_id": record.image_id,
        }

    def load(self, index: int, *, seed: int) -> dict[str, Any]:
        """One processed row: image float32[3, H, W] (or its features, see `with_features`), text_input, image_id,
        index.

        The caption drawn from the row's list and the augmentation depend on (index, seed) alone; torch's
        global generator is left as it was. Raises UnreadableSample.
        """
        record, part = self._record(index)
        with seeded(seed):
            texts = self._draw_texts(index, record, part)
            # Last, so that what else the seed decides doesn't depend on where the image comes from.
            if self.stored is not None:
                return {self.visual: self.stored.load(index % len(self), seed=seed), **texts}
            return {self.visual: self._see(self._path(record, part)), **texts}

    def _draw_texts(self, index: int, record: Record, part: int) -> dict[str, Any]:
        """A row without its image, drawn from torch's global generator; raises UnreadableSample."""
        captions = self._raw_captions(record, part)
        caption = captions[int(torch.randint(len(captions), ()))]
        return {
            "text_input": self.text_processor(caption),
            "image_id": self._image_id(index, record),
            "index": index,
        }

    def with_features(self, stored: StoredImages) -> Self:
        """The same rows whose `load` gives a frozen encoder's stored features in the place of pictures."""
        other = copy.copy(self)
        other.stored = stored
        return other

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """See `collate_images`; the images are named as `visual` says."""
        return collate_images(samples, visual=self.visual)

    def captions(self, index: int) -> list[str]:
        """All captions of a row, processed; empty for a row whose captions can't be read."""
        record, _ = self._record(index)
        return [self.text_processor(caption) for caption in record.captions]

    def record(self, index: int) -> Record:
        """A row as its annotation file has it: captions unprocessed, the number declared there, its group."""
        return self._record(index)[0]

    def image(self, index: int) -> Image.Image:
        """The row's picture in RGB, unprocessed; raises UnreadableSample."""
        return self._picture(self.image_path(index))

    def problems(self) -> tuple[int, str | None]:
        """How many rows can't be used, as far as their tables know, and why one of them can't."""
        found = [part.records.problems() for part in self.parts]
        return sum(count for count, _ in found), next((reason for _, reason in found if reason), None)

    def image_path(self, index: int) -> str:
        """Where the row's picture is."""
        return self._path(*self._record(index))

    def _picture(self, path: str) -> Image.Image:
        """What a person is shown of a file."""
        return read_image(path)

    def _see(self, path: str) -> Tensor:
        """What a model is shown of a file."""
        return self.vis_processor(read_image(path))

    def _record(self, index: int) -> tuple[Record, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of dataset '{self.name}', which has {len(self)}")
        index %= len(self)
        part = bisect.bisect_right(self._ends, index)
        start = self._ends[part - 1] if part else 0
        return self.parts[part].records[index - start], part

    def _raw_captions(self, record: Record, part: int) -> list[str]:
        if record.problem is not None or not record.captions:
            raise UnreadableSample(self._path(record, part), record.problem or "it has no caption")
        return record.captions

    def _path(self, record: Record, part: int) -> str:
        return os.path.join(self.parts[part].images, record.image)

    def _image_id(self, index: int, record: Record) -> int:
        return public_image_id(self._salt, index, record.image_id)


def has_picture_files(dataset: Any) -> TypeGuard[ImageTextDataset]:
    """Whether a dataset's rows are picture files (or members of local shards), and not clips, streams or made up."""
    return isinstance(dataset, ImageTextDataset) and dataset.visual == ImageTextDataset.visual


def public_image_id(salt: int, index: int, declared: int | None) -> int:
    """A picture's number in a batch: that of its file, or without one of its row, told apart by dataset."""
    # Hashed with the name, so that the numbers of datasets in a mix don't meet (63 bits, of 10 million pictures one
    # pair does with a chance of 5e-6). Without a declared number every row is a picture of its own.
    return seed_of(salt, int(declared is not None), index if declared is None else declared)


def collate_images(samples: list[dict[str, Any]], *, visual: str = "image") -> dict[str, Any]:
    """image float32[B, 3, H, W] or features, text_input (B strings), image_id int64[B], index int64[B]."""
    return {
        visual: stack_images([sample[visual] for sample in samples]),
        "text_input": [sample["text_input"] for sample in samples],
        "image_id": torch.tensor([sample["image_id"] for sample in samples], dtype=torch.int64),
        "index": torch.tensor([sample["index"] for sample in samples], dtype=torch.int64),
    }


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global CPU generator seeded within the block and put back after it."""
    state = torch.get_rng_state()
    try:
        # Not torch.manual_seed, which would also seed (and in a worker, touch) the accelerators.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(state)

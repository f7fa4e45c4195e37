"""Pictures by name through a model, batch by batch, into a journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lavis_lite.common.logging import ProgressDisplay, get_logger
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.images import read_image
from lavis_lite.search.encoding import Encoder
from lavis_lite.search.journal import Journal
from lavis_lite.search.sources import short_name

logger = get_logger(__name__)


class Prepared(NamedTuple):
    """A picture ready for the model float32[3, H, W], or the reason why there is none."""

    name: str
    image: Tensor | None
    problem: str


class Batch(NamedTuple):
    """The readable pictures of a batch, names and float32[B, 3, H, W], and {name: reason} of the others."""

    names: list[str]
    images: Tensor | None
    unreadable: dict[str, str]


class Pictures(Dataset[Prepared]):
    """Pictures by number, prepared for the model; one that can't be read has its reason instead."""

    def __init__(self, names: Sequence[str], processor: Callable[[Image.Image], Tensor]) -> None:
        self.names, self.processor = names, processor

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Prepared:
        name = self.names[index]
        try:
            return Prepared(name, self.processor(read_image(name)), "")
        except UnreadableSample as error:
            return Prepared(name, None, error.reason)


def batched(several: Sequence[Prepared]) -> Batch:
    """Prepared pictures as a batch."""
    read = [(one.name, one.image) for one in several if one.image is not None]
    images = torch.stack([image for _, image in read]) if read else None
    return Batch(
        [name for name, _ in read], images, {one.name: one.problem for one in several if one.image is None}
    )


def encode_pictures(
    encoder: Encoder, names: Sequence[str], journal: Journal, *, batch_size: int, num_workers: int
) -> float:
    """Encode the pictures that the journal doesn't have yet; images per second, 0 where there was nothing to do.

    A picture that can't be read is logged and noted in the journal.
    """
    known = {*journal.names, *journal.unreadable}
    left = [name for name in names if name not in known]
    if known:
        logger.info("going on: %d of %d pictures are done", len(names) - len(left), len(names))
    loader = DataLoader(
        Pictures(left, encoder.processor), batch_size, num_workers=num_workers, collate_fn=batched
    )
    done, started = len(names) - len(left), time.monotonic()
    with ProgressDisplay(len(names), done, unit="picture") as progress:
        for batch in loader:
            vectors = encoder.encode_images(batch.images).numpy() if batch.images is not None else np.empty(0)
            for name, reason in batch.unreadable.items():
                logger.warning("left out: %s: %s", short_name(name), reason)
            journal.append(batch.names, vectors, batch.unreadable)
            done += len(batch.names) + len(batch.unreadable)
            progress.advance(done)
            progress.show({"images_per_s": (done - len(names) + len(left)) / (time.monotonic() - started)})
    return len(left) / (time.monotonic() - started) if left else 0.0

"""Fills stores of features: every rank encodes the pictures of its own files, each written when it is whole."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lavis_lite.common.device import autocast
from lavis_lite.common.errors import DataError
from lavis_lite.common.logging import duration, get_logger
from lavis_lite.datasets.bad_rows import ReadCounter
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.feature_store import FeatureStore
from lavis_lite.datasets.loader import read_in_order
from lavis_lite.datasets.pictures import Pictures, Viewed, ViewReader, joined_contents
from lavis_lite.image_features import ImageFeatures
from lavis_lite.models.vision.tower import VisionTower
from lavis_lite.runners.feature_times import without_content

logger = get_logger(__name__)

# Seconds between two lines about how far a build is.
LINE_SECONDS = 10.0
# So many pictures are tried for the shape of an encoder's features.
TRIED_PICTURES = 64


@dataclass(frozen=True)
class Encoder:
    """A frozen image encoder as training calls it. batch_size: images at once."""

    tower: VisionTower
    device: torch.device
    precision: str
    batch_size: int

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32[B, P, C] on the CPU of images float32[B, 3, H, W]."""
        parts = []
        with torch.no_grad(), autocast(self.device, self.precision):
            for part in images.split(self.batch_size):
                parts.append(self.tower(part.to(self.device, non_blocking=True)).cpu())
        return torch.cat(parts)

    def shape(self, pictures: Pictures) -> tuple[int, int]:
        """P and C of a dataset's pictures; DataError when none of the first can be read."""
        for number in range(min(len(pictures), TRIED_PICTURES)):
            try:
                features = self(pictures.views(number, count=1, seed=0))
            except UnreadableSample as error:
                last = error
            else:
                return features.shape[1], features.shape[2]
        raise DataError(f"dataset '{pictures.dataset.name}': no picture could be read, for example {last}")


@dataclass(frozen=True)
class Build:
    """A store to be filled: with which pictures' views, and what messages call it."""

    label: str
    pictures: Pictures
    store: FeatureStore
    seed: int


class Progress:
    """A line now and then about how many of a rank's pictures are encoded."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self._began = self._told = time.monotonic()

    def advance(self, pictures: int) -> None:
        """Say that so many more are done."""
        self.done += pictures
        now = time.monotonic()
        if now - self._told < LINE_SECONDS and self.done < self.total:
            return
        self._told = now
        rate = self.done / max(now - self._began, 1e-9)
        left = f", {duration((self.total - self.done) / rate)} left" if self.done < self.total else ""
        logger.info(
            "features of %s: %d of %d pictures, %.0f a second%s",
            self.label,
            self.done,
            self.total,
            rate,
            left,
        )


def fill(
    build: Build, shards: Sequence[int], encoder: Encoder, *, num_workers: int, counter: ReadCounter
) -> dict[int, list[int]]:
    """Encode and write some of a store's files; returns for each the numbers of the pictures that couldn't be read.

    Raises DataError when too many pictures can't be read (see `ReadCounter`), or the precision can't hold the
    features; OSError when the disk is full. What is written stays.
    """
    store = build.store
    # As many pictures at once as make a batch of views.
    step = max(1, encoder.batch_size // store.layout.views)
    tasks = {
        shard: [list(numbers[first : first + step]) for first in range(0, len(numbers), step)]
        for shard in shards
        for numbers in [store.numbers(shard)]
    }
    reader = ViewReader(build.pictures, store.layout.views, build.seed)
    viewed = read_in_order(reader, [task for own in tasks.values() for task in own], num_workers=num_workers)
    progress = Progress(build.label, sum(len(store.numbers(shard)) for shard in shards))
    return {
        shard: _fill_one(build, shard, encoder, (next(viewed) for _ in own), counter, progress)
        for shard, own in tasks.items()
    }


def _fill_one(
    build: Build,
    shard: int,
    encoder: Encoder,
    viewed: Iterator[Viewed],
    counter: ReadCounter,
    progress: Progress,
) -> list[int]:
    store, layout = build.store, build.store.layout
    numbers = store.numbers(shard)
    shape = (len(numbers), layout.views, layout.tokens, layout.width)
    whole = ImageFeatures.rounded(torch.zeros(shape), layout.precision)
    problems: dict[int, str] = {}
    contents: list[str | None] = []
    for some in viewed:
        if some.views is not None:
            own = _rounded(encoder(some.views), build, some.numbers)
            places = torch.tensor(some.numbers) - numbers.start
            whole.values[places] = own.values.unflatten(0, (-1, layout.views))
            if whole.scale is not None and own.scale is not None:
                whole.scale[places] = own.scale.unflatten(0, (-1, layout.views))
        contents += some.contents
        problems.update({number: reason for number, _, reason in some.failures})
        failures = [(path, reason) for _, path, reason in some.failures]
        counter.count(len(some.numbers), failures)
        progress.advance(len(some.numbers) + len(failures))
    store.write(shard, whole, problems, joined_contents(contents))
    return without_content(numbers, contents)


def _rounded(features: Tensor, build: Build, numbers: Sequence[int]) -> ImageFeatures:
    layout = build.store.layout
    if features.shape[1:] != (layout.tokens, layout.width):
        raise DataError(
            f"the encoder made features {list(features.shape[1:])} of {build.pictures.path(numbers[0])} and "
            f"{[layout.tokens, layout.width]} of other pictures: stored features need images of one size"
        )
    stored = ImageFeatures.rounded(features, layout.precision)
    finite = stored.float().flatten(1).isfinite().all(1)
    if not finite.all():
        number = numbers[int(finite.logical_not().nonzero()[0]) // layout.views]
        raise DataError(
            f"the features of {build.pictures.path(number)} are not finite in {layout.precision} (largest "
            f"magnitude {features.abs().max():.3g}); set run.features.precision=bf16, or look at the encoder"
        )
    return stored

"""Shards that are only ever read from beginning to end: http(s), `pipe:` and what else webdataset opens.

A stream has no rows by number. Each of its readers (ranks x loader workers) reads shards of its own, so that within an
epoch nothing comes twice: the epoch's order of shards is a permutation by (seed, epoch), dealt out to the readers in
turn. A reader fills a block of `shuffle` samples, shuffles it by (seed, epoch, the place where it begins), hands it
out, and fills the next. So where a reader is can be said in four numbers (`Position`), from which it goes on exactly,
having read again at most the shard in which its block begins and that block.
"""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavis_lite.common import dist
from lavis_lite.common.errors import DataError
from lavis_lite.datasets.base import MAX_ATTEMPTS, UnreadableSample
from lavis_lite.datasets.image_text import collate_images, public_image_id, seeded
from lavis_lite.datasets.images import decode_image
from lavis_lite.datasets.order import AUGMENT, ORDER, REPLACE, hashed, permuted, seed_of
from lavis_lite.datasets.readers import Row
from lavis_lite.datasets.records import number_of
from lavis_lite.datasets.shard_rows import SampleForm
from lavis_lite.datasets.stream_places import Past, Position, left_of_epoch
from lavis_lite.datasets.tar_streams import BrokenStream, stream_samples, why

logger = logging.getLogger(__name__)

# Samples at the beginning of a shard that are read before a run starts.
PROBED = 8


class Raw(NamedTuple):
    """A sample as it was read. shard: its number in the stream, ordinal: among the reader's shards of this epoch."""

    shard: int
    ordinal: int
    number: int
    url: str
    key: str
    members: dict[str, bytes]


class Taken(NamedTuple):
    """Samples of a batch, (path, reason) of what failed, and where the reader is after them."""

    samples: list[dict[str, Any]]
    failures: list[tuple[str, str]]
    position: Position


class ShardStream:
    """Pictures with captions from shards that are read in a stream.

    Args:
        urls: of the shards.
        samples: about how many they hold: what an epoch, and a mix without ratios, is counted by.
        shuffle: samples of a block, which is held in memory undecoded. 1 doesn't shuffle within shards.
        form: what the members of a sample are.
        vis_processor, text_processor, name: as of `ImageTextDataset`.

    visual, texts: as of `ImageTextDataset`; `_see` is what a stream of other files replaces.
    """

    visual: ClassVar[str] = "image"
    texts: ClassVar[str] = "captions"

    def __init__(
        self,
        urls: Sequence[str],
        *,
        samples: int,
        shuffle: int,
        form: SampleForm,
        vis_processor: Callable[[Image.Image], Tensor],
        text_processor: Callable[[str], str],
        name: str,
    ) -> None:
        self.urls = list(urls)
        self.samples = samples
        self.shuffle = shuffle
        self.form = form
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.name = name
        self._salt = seed_of(*name.encode())

    def __len__(self) -> int:
        """About how many samples an epoch has."""
        return self.samples

    def check_readers(self, ranks: int, workers: int) -> None:
        """Raise DataError when there are fewer shards than readers."""
        readers = ranks * max(1, workers)
        if len(self.urls) < readers:
            raise DataError(
                f"dataset '{self.name}': {len(self.urls)} shards for {readers} readers ({ranks} ranks x "
                f"run.num_workers={workers}), and one reader reads a stream's shard: use fewer workers, or more and "
                "smaller shards"
            )

    def probe(self) -> None:
        """Read the beginnings of some shards, spread over all; a warning tells of samples that can't be used.

        Raises DataError when none can.
        """
        heads = sorted({0, len(self.urls) // 2, len(self.urls) - 1})
        failures: list[tuple[str, str]] = []
        good = sum(self._probe_one(number, failures) for number in heads)
        if not failures:
            return
        example = ": ".join(failures[0])
        if not good:
            raise DataError(
                f"dataset '{self.name}': no usable sample at the beginning of the shards looked at, for example "
                f"{example}"
            )
        if dist.is_main():
            logger.warning(
                "dataset '%s': %d of %d samples at the beginning of %d shards can't be used (%.0f%%), for example %s",
                *(self.name, len(failures), good + len(failures), len(heads)),
                *(100 * len(failures) / (good + len(failures)), example),
            )

    def _probe_one(self, number: int, failures: list[tuple[str, str]]) -> int:
        """How many of the first samples of a shard can be used; adds to `failures` what can't."""
        seen = good = 0
        before = len(failures)
        samples = self.raw([number], failures)
        for raw in itertools.islice(samples, PROBED):
            seen += 1
            try:
                self.load(raw, seed=0)
                good += 1
            except UnreadableSample as error:
                failures.append((error.path, error.reason))
        samples.close()
        if not seen and len(failures) == before:
            failures.append((self.urls[number], "it has no sample"))
        return good

    def shards_of(self, epoch: int, *, seed: int, reader: int, readers: int, past: Past = ()) -> list[int]:
        """The shards of one reader in an epoch, in its order; those of all readers are all shards, none twice.

        past: earlier readers, whose shards are not read again. Then there may be none for this one.
        """
        key = int(hashed(seed, ORDER, epoch)[0])
        order = permuted(np.arange(len(self.urls), dtype=np.int64), len(self.urls), key)
        return left_of_epoch(order.tolist(), epoch, past)[reader::readers]

    def is_remote(self, path: str) -> bool:
        """Whether what failed is a shard that an address or a command gives: unlike its samples it may come back."""
        return ("://" in path or path.startswith("pipe:")) and path in self.urls

    def raw(
        self, shards: Iterable[int], failures: list[tuple[str, str]], *, first: int = 0
    ) -> Generator[Raw, None, None]:
        """The undecoded samples of shards, one after the other; a broken shard is noted and left where it breaks.

        first: the ordinal that the first of them has.
        """
        for ordinal, shard in enumerate(shards, first):
            url = self.urls[shard]
            try:
                for number, sample in enumerate(stream_samples(url)):
                    yield Raw(shard, ordinal, number, url, *sample)
            except (BrokenStream, OSError) as error:
                failures.append((url, why(error)))

    def row(self, raw: Raw) -> Row:
        """What a sample's members tell, with its place (address and key) for a path."""
        place = f"{raw.url}, sample {raw.key}"
        return self.form.row(place, place, raw.members, raw.members.__getitem__)

    def load(self, raw: Raw, *, seed: int) -> dict[str, Any]:
        """One processed sample, as of `ImageTextDataset.load`; `index` counts shards in its upper 32 bits.

        Raises UnreadableSample.
        """
        row = self.row(raw)
        if row.problem is not None or not row.captions:
            raise UnreadableSample(row.image, (row.problem or "no caption").removeprefix(f"{row.image}: "))
        content = io.BytesIO(raw.members[self.form.shown(raw.members) or ""])
        index = (raw.shard << 32) + raw.number
        with seeded(seed):
            caption = row.captions[int(torch.randint(len(row.captions), ()))]
            return {
                self.visual: self._see(content, row.image),
                "text_input": self.text_processor(caption),
                "image_id": public_image_id(self._salt, index, number_of(row.image_id)),
                "index": index,
            }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch, as of `ImageTextDataset.collate`."""
        return collate_images(samples, visual=self.visual)

    def _see(self, content: io.BytesIO, place: str) -> Tensor:
        """What a model is shown of a member's content; raises UnreadableSample, which names the place."""
        return self.vis_processor(decode_image(content, place))


class StreamReader:
    """One of the readers that share a stream's shards, going through its own epoch after epoch.

    Args:
        seed: of the order of shards and samples, and of augmentation.
        reader, readers: which one it is, and how many share the stream.
        start: where one with the same seed and numbers was; goes on from there exactly.
        past: where other numbers of readers were before.
    """

    def __init__(
        self,
        stream: ShardStream,
        *,
        seed: int,
        reader: int,
        readers: int,
        start: Position | None = None,
        past: Past = (),
    ) -> None:
        self.stream = stream
        self.seed = seed
        self.reader = reader
        self.readers = readers
        self.position = start or Position()
        self.past = past
        self._failures: list[tuple[str, str]] = []
        self._draws = self._endless()

    def take(self, count: int) -> Taken:
        """The next samples; fewer than `count` when a whole epoch, two in part, or too many in a row can't be read."""
        samples: list[dict[str, Any]] = []
        for drawn in itertools.islice(self._draws, count):
            sample = None if drawn is None else self._load(*drawn)
            if sample is None:
                break
            samples.append(sample)
        failures = list(self._failures)
        self._failures.clear()
        return Taken(samples, failures, self.position)

    def _load(self, block: list[Raw], index: int) -> dict[str, Any] | None:
        """A sample of a block, or the one that replaces it; None when none was readable."""
        raw = block[index]
        key = (self.seed, self.position.epoch, raw.shard, raw.number)
        for attempt in range(MAX_ATTEMPTS):
            try:
                return self.stream.load(block[index], seed=seed_of(AUGMENT, *key, attempt))
            except UnreadableSample as error:
                self._failures.append((error.path, error.reason))
            index = seed_of(REPLACE, *key, attempt) % len(block)
        return None

    def _endless(self) -> Iterator[tuple[list[Raw], int] | None]:
        """(block, place in it) of each sample, in the order they are handed out; None where there are none to be had.

        That is a whole epoch, or two in a row: a few shards, such as what is left of one, may be bad by chance.
        """
        start, empty = self.position, 0
        while True:
            found = False
            for place, block in self._blocks(start):
                found = True
                taken = start.taken if place == start._replace(taken=0) else 0
                for number, index in enumerate(self._shuffled(place, len(block))[taken:], taken + 1):
                    self.position = place._replace(taken=number)
                    yield block, index
            # Where no shard is left of an epoch, that is no fault.
            empty = 0 if found else empty + bool(self._shards(start.epoch))
            if empty > 1 or (empty and self._is_whole(start)):
                self._note_empty(start.epoch)
                yield None
            start = Position(start.epoch + 1)

    def _is_whole(self, start: Position) -> bool:
        """Whether a place is before all of an epoch, of which earlier readers have left this one its full share."""
        share = self.stream.shards_of(start.epoch, seed=self.seed, reader=self.reader, readers=self.readers)
        return start == Position(start.epoch) and share == self._shards(start.epoch)

    def _note_empty(self, epoch: int) -> None:
        """An epoch without a sample has a reason, also where every shard is whole and has nothing in it."""
        if not self._failures:
            self._failures.append((self.stream.urls[self._shards(epoch)[0]], "it has no sample"))

    def _shards(self, epoch: int) -> list[int]:
        return self.stream.shards_of(
            epoch, seed=self.seed, reader=self.reader, readers=self.readers, past=self.past
        )

    def _blocks(self, start: Position) -> Iterator[tuple[Position, list[Raw]]]:
        """The blocks of an epoch from `start` on, each with the place where it begins."""
        raw = self.stream.raw(self._shards(start.epoch)[start.shard :], self._failures, first=start.shard)
        # By name and not by count: where that shard is gone by now, nothing of the next one is passed over.
        begin = (start.shard, start.sample)
        rest = itertools.dropwhile(lambda sample: (sample.ordinal, sample.number) < begin, raw)
        while block := list(itertools.islice(rest, self.stream.shuffle)):
            yield Position(start.epoch, block[0].ordinal, block[0].number), block

    def _shuffled(self, place: Position, length: int) -> list[int]:
        key = int(hashed(self.seed, ORDER, place.epoch, self.reader, place.shard, place.sample)[0])
        return [int(index) for index in permuted(np.arange(length, dtype=np.int64), length, key)]

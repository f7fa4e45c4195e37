"""Batches for training (endless, resumable at any batch) and for evaluation (every row once)."""

from __future__ import annotations

import atexit
import logging
import signal
import sys
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.datasets.bad_rows import ReadCounter, check_known
from lavis_lite.datasets.base import MAX_ATTEMPTS, Rows, UnreadableSample
from lavis_lite.datasets.order import AUGMENT, REPLACE, RowStream, mixed, seed_of
from lavis_lite.datasets.shard_stream import ShardStream, StreamReader
from lavis_lite.datasets.stream_places import Position, StreamStart, stream_start

logger = logging.getLogger(__name__)


class Task(NamedTuple):
    """One batch to be read: rows of one dataset, with the epoch each belongs to."""

    dataset: int
    epochs: list[int]
    rows: list[int]


class StreamTask(NamedTuple):
    """One batch that a reader takes from a stream, as it comes. reader: among those of all ranks."""

    dataset: int
    reader: int
    size: int


class Fetched(NamedTuple):
    """A batch (None when no row could be read), its number of rows, (path, reason) of each failed read.

    place: of a stream's reader after it, by the reader's key.
    """

    batch: dict[str, Any] | None
    size: int
    failures: list[tuple[str, str]]
    place: tuple[str, Position] | None = None


class TrainReader(Dataset[Fetched]):
    """Reads whole batches; an unreadable row is replaced by one that (seed, epoch, row, attempt) fix.

    readers: of each stream, over all ranks. starts: where they begin, by stream. Each process opens those it is asked
    for.
    """

    def __init__(
        self,
        datasets: Sequence[Rows | ShardStream],
        seed: int,
        readers: int = 1,
        starts: Mapping[str, StreamStart] | None = None,
    ) -> None:
        self.datasets = list(datasets)
        self.seed = seed
        self.readers = readers
        self.starts = starts or {}
        self._open: dict[str, StreamReader] = {}

    def __getitem__(self, task: Task | StreamTask) -> Fetched:
        dataset = self.datasets[task.dataset]
        if isinstance(task, StreamTask):
            return self._take(dataset, task)
        assert not isinstance(dataset, ShardStream)
        failures: list[tuple[str, str]] = []
        samples = []
        for epoch, row in zip(task.epochs, task.rows, strict=True):
            sample = self._load(dataset, (self.seed, task.dataset, epoch, row), failures)
            if sample is None:
                return Fetched(None, 0, failures)
            samples.append(sample)
        return Fetched(dataset.collate(samples), len(samples), failures)

    def _take(self, stream: Any, task: StreamTask) -> Fetched:
        start = self.starts.get(stream.name) or StreamStart(stream.name, self.readers)
        key = start.key(task.reader)
        if key not in self._open:
            self._open[key] = StreamReader(
                stream,
                seed=seed_of(self.seed, task.dataset),
                reader=task.reader,
                readers=self.readers,
                start=start.now.get(task.reader),
                past=start.past,
            )
        taken = self._open[key].take(task.size)
        if len(taken.samples) < task.size:
            return Fetched(None, 0, taken.failures)
        return Fetched(stream.collate(taken.samples), task.size, taken.failures, (key, taken.position))

    def _load(
        self, dataset: Rows, key: tuple[int, int, int, int], failures: list[tuple[str, str]]
    ) -> dict[str, Any] | None:
        row = key[-1]
        for attempt in range(MAX_ATTEMPTS):
            try:
                return dataset.load(row, seed=seed_of(AUGMENT, *key, attempt))
            except UnreadableSample as error:
                failures.append((error.path, error.reason))
            row = seed_of(REPLACE, *key, attempt) % len(dataset)
        return None


class EvalReader(Dataset[Fetched]):
    """Reads whole batches of given rows; unreadable ones are left out."""

    def __init__(self, dataset: Rows) -> None:
        if isinstance(dataset, ShardStream):
            raise ConfigError(
                f"dataset '{dataset.name}': a stream is for training; evaluation needs local .tar files"
            )
        self.dataset = dataset

    def __getitem__(self, task: Task) -> Fetched:
        samples, failures = [], []
        for row in task.rows:
            try:
                samples.append(self.dataset.load(row, seed=seed_of(AUGMENT, row)))
            except UnreadableSample as error:
                failures.append((error.path, error.reason))
        return Fetched(self.dataset.collate(samples) if samples else None, len(samples), failures)


class TrainLoader:
    """Training batches of one dataset or of a mix, each a pure function of (seed, its number, global batch
    size).

    Args:
        datasets: what to read; with several, each batch comes from one of them. A `ShardStream` has an order that
            depends on ranks and workers too, and readers with a place.
        ratios: how often each is drawn; None draws in proportion to their rows.
        batch_size: rows per process; the global batch is `world_size` times that, and rank r gets rows
            [r * batch_size, (r + 1) * batch_size) of it.
        num_workers: processes that read; the batches don't depend on it.
        max_bad_fraction: of unreadable rows, see `ReadCounter`.
        pin_memory: by default where there is a CUDA device.
        prefetch: batches each worker reads ahead.

    Raises ConfigError for an empty dataset or bad ratios, DataError when more rows than allowed are known to be
    unusable. See `RowStream` for how rows are ordered.
    """

    def __init__(
        self,
        datasets: Sequence[Rows | ShardStream],
        ratios: Sequence[float] | None = None,
        *,
        batch_size: int,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        max_bad_fraction: float = 0.01,
        pin_memory: bool | None = None,
        prefetch: int = 2,
    ) -> None:
        _check_sizes(datasets, rank, world_size)
        for dataset in datasets:
            if isinstance(dataset, ShardStream):
                dataset.check_readers(world_size, num_workers)
        self.seed = seed
        self.datasets = list(datasets)
        # Of each stream: this rank's are the numbers from the first on.
        self.own_readers = max(1, num_workers)
        self.first_reader = rank * self.own_readers
        self.readers = world_size * self.own_readers
        # Where this rank's readers are after the batches handed out: what `batches` goes on from.
        self.places: dict[str, Position] = {}
        self.weights = _weights(datasets, ratios)
        self.part = range(rank * batch_size, (rank + 1) * batch_size)
        global_batch = world_size * batch_size
        self.streams = [
            RowStream(len(dataset), global_batch=global_batch, seed=seed_of(seed, number))
            for number, dataset in enumerate(datasets)
        ]
        self.batches_per_epoch = sum(stream.batches_per_epoch for stream in self.streams)
        self.counter = ReadCounter(max_bad_fraction)
        check_known(datasets, self.weights, max_bad_fraction, told=rank == 0)
        # Seconds `batches` has waited for data; whoever reports it may set it back to 0.
        self.data_wait_s = 0.0
        self._options = _loader_options(num_workers, pin_memory, prefetch)
        for dataset in datasets:
            if len(dataset) < global_batch and rank == 0:
                logger.warning(
                    "dataset '%s' has %d rows, fewer than the global batch of %d: rows repeat within a batch",
                    dataset.name,
                    len(dataset),
                    global_batch,
                )

    @property
    def seen(self) -> int:
        """Rows this process has handed out."""
        return self.counter.good

    @property
    def bad_images(self) -> int:
        """Reads that failed in this process; a file that is met again in a later epoch counts again."""
        return self.counter.bad

    @property
    def has_streams(self) -> bool:
        """Whether a dataset is a stream, so that going on needs `places` besides the number of the batch."""
        return any(isinstance(dataset, ShardStream) for dataset in self.datasets)

    def batches(
        self, start_batch: int = 0, places: Mapping[str, Sequence[int]] | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """This rank's part of every global batch from number `start_batch` on, endlessly.

        places: those of all ranks' readers after the batches before, where a dataset is a stream.

        Raises DataError when too many rows can't be read. Closing the iterator ends its workers, and so does the
        end of the program.
        """
        starts = {
            dataset.name: stream_start(dataset.name, self.readers, places or {})
            for dataset in self.datasets
            if isinstance(dataset, ShardStream)
        }
        # Not those of other ranks, who know better where they are by the next checkpoint.
        own = range(self.first_reader, self.first_reader + self.own_readers)
        self.places = {key: place for start in starts.values() for key, place in start.kept(own).items()}
        stream = self._stream(start_batch, starts)
        # At the exit multiprocessing waits for workers, which here end when they are told to and not by SIGTERM.
        atexit.register(_close, weakref.ref(stream))
        return stream

    def _stream(
        self, start_batch: int, starts: Mapping[str, StreamStart]
    ) -> Generator[dict[str, Any], None, None]:
        streams = [one for one in self.datasets if isinstance(one, ShardStream)]
        reader = TrainReader(self.datasets, self.seed, self.readers, starts)
        fetched = iter(DataLoader(reader, sampler=_Stream(self._tasks(start_batch)), **self._options))
        while True:
            start = time.perf_counter()
            item: Fetched = next(fetched)
            self.data_wait_s += time.perf_counter() - start
            try:
                self.counter.count(item.size, item.failures)
                if item.batch is None:
                    self.counter.stop(*item.failures[-1])
            except DataError as error:
                error.passing = any(one.is_remote(path) for one in streams for path, _ in item.failures)
                raise
            assert item.batch is not None
            if item.place is not None:
                key, self.places[key] = item.place
            yield item.batch

    def _tasks(self, start_batch: int) -> Iterator[Task | StreamTask]:
        draws = mixed(self.weights, seed=self.seed, start=start_batch)
        for batch, (dataset, number) in enumerate(draws, start_batch):
            if isinstance(self.datasets[dataset], ShardStream):
                # DataLoader gives its workers tasks by turns, so that a reader stays with one of them.
                reader = self.first_reader + batch % self.own_readers
                yield StreamTask(dataset, reader, len(self.part))
            else:
                yield Task(dataset, *self.streams[dataset].rows(number, self.part))


class EvalLoader:
    """One pass over this rank's rows of a dataset: every row once over all ranks, none twice, none padded.

    Batches hold what the dataset's `collate` makes, `image` and `index` among it. Rows that can't be read are
    left out, logged once, and counted (`bad_images`).
    """

    def __init__(
        self,
        dataset: Rows,
        *,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad_fraction: float = 0.01,
        pin_memory: bool | None = None,
    ) -> None:
        rows = len(dataset)
        mine = range(rows * rank // world_size, rows * (rank + 1) // world_size)
        self._chunks = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
        self._reader = EvalReader(dataset)
        self._options = _loader_options(min(num_workers, len(self._chunks)), pin_memory, prefetch=2)
        self.name = dataset.name
        self._whole = world_size == 1
        self.counter = ReadCounter(max_bad_fraction, what="left out of the evaluation")

    @property
    def bad_images(self) -> int:
        """Rows of the current pass that could not be read so far."""
        return self.counter.bad

    def __len__(self) -> int:
        """The number of batches, unless whole batches are unreadable."""
        return len(self._chunks)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.counter.restart()
        tasks = [Task(0, [0] * len(chunk), list(chunk)) for chunk in self._chunks]
        for item in DataLoader(self._reader, sampler=tasks, **self._options):
            self.counter.count(item.size, item.failures)
            if item.batch is not None:
                yield item.batch
        # A rank whose few rows are all bad is no fault of the dataset; the other ranks have the rest.
        if self._whole and self._chunks and self.counter.good == 0:
            raise DataError(f"dataset '{self.name}': none of {self.counter.bad} rows could be read")


def eval_loader(
    dataset: Rows,
    *,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    max_bad_fraction: float = 0.01,
) -> EvalLoader:
    """Batches for evaluation; see `EvalLoader`."""
    return EvalLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        rank=rank,
        world_size=world_size,
        max_bad_fraction=max_bad_fraction,
    )


def read_in_order(reader: Dataset[Any], tasks: Iterable[Any], *, num_workers: int) -> Iterator[Any]:
    """What a reader makes of each task, read ahead by worker processes, in the tasks' order."""
    return iter(DataLoader(reader, sampler=tasks, **_loader_options(num_workers, None, prefetch=2)))


def _close(stream: weakref.ref[Generator[Any, None, None]]) -> None:
    generator = stream()
    if generator is not None:
        generator.close()


class _Stream(Iterable[Task | StreamTask]):
    """What DataLoader calls a sampler: here it hands out whole batches."""

    def __init__(self, tasks: Iterator[Task | StreamTask]) -> None:
        self._tasks = tasks

    def __iter__(self) -> Iterator[Task | StreamTask]:
        return self._tasks


def _loader_options(num_workers: int, pin_memory: bool | None, prefetch: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "batch_size": None,  # a task is a whole batch
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available() if pin_memory is None else pin_memory,
        # DataLoader draws its workers' seeds, which nothing here uses, from the global generator unless given
        # one.
        "generator": torch.Generator(),
    }
    if num_workers:
        options.update(prefetch_factor=prefetch, worker_init_fn=_init_worker)
        if sys.platform == "linux":
            # Newer Pythons start workers afresh: seconds and 200 MB each, and without a user's own `imports`.
            options["multiprocessing_context"] = "fork"
    return options


def _init_worker(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM go to the whole process group: the main process decides when workers
    # end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def _check_sizes(datasets: Sequence[Rows | ShardStream], rank: int, world_size: int) -> None:
    if not datasets:
        raise ConfigError("no dataset to train on: the config's `datasets` section has no train split")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}")
    for dataset in datasets:
        if len(dataset) == 0:
            raise DataError(f"dataset '{dataset.name}' has no rows to train on")


def _weights(datasets: Sequence[Rows | ShardStream], ratios: Sequence[float] | None) -> list[float]:
    if ratios is None:
        return [float(len(dataset)) for dataset in datasets]
    if len(ratios) != len(datasets):
        raise ConfigError(f"{len(ratios)} ratios for {len(datasets)} datasets: give one for each, or none")
    if any(ratio < 0 for ratio in ratios) or not sum(ratios) > 0:
        raise ConfigError(f"ratios {list(ratios)}: none may be negative and one must be above 0")
    return [float(ratio) for ratio in ratios]

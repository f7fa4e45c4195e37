"""Local tar shards as rows of the memory-mapped table: looked through once, then read at random.

A row's picture is the address of a member (`tar_members.Address`), which `read_image` reads like a path, so that
everything that holds for files (order, mixing, resuming, unreadable pictures) holds for shards.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from lavis_lite.common.device import available_cores
from lavis_lite.common.io import atomic_file
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.folder import PICTURES, Kind
from lavis_lite.datasets.readers import Row
from lavis_lite.datasets.records import LAYOUT, RecordTable, Source, write_table
from lavis_lite.datasets.shard_rows import SampleForm
from lavis_lite.datasets.tar_members import Sample, read_member, samples_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
# Processes that look through shards; disks rarely feed more.
MAX_PROCESSES = 8
# Fewer shards than this are looked through where one is.
FEW_SHARDS = 4
INDEX_SUFFIX = ".arrow"
# Of a shard's beginning and end, which its index is checked against. A tar's end is padded to 10 KiB.
END_BYTES = 1 << 15


@dataclass(frozen=True)
class ShardSource(Source):
    """What a table of local shards is made from.

    shards: the tar files. images: the folder that they have in common. pattern: what the user wrote, for messages.
    form: what the members of a sample are.
    """

    shards: tuple[Path, ...] = ()
    pattern: str = ""
    form: SampleForm = field(default_factory=SampleForm)

    @property
    def path(self) -> Path:
        """The shards as the user named them."""
        return Path(self.pattern)

    @property
    def files(self) -> tuple[Path, ...]:
        """The shards."""
        return self.shards

    def rows(self) -> Iterator[Row]:
        """One row a sample, in the order of the shards; one with a problem for a shard that is broken."""
        for shard, rows in zip(self.shards, rows_of_shards(self.shards, self.form), strict=True):
            folder = os.path.relpath(shard.parent, self.images)
            for row in rows:
                yield row if folder == "." else replace(row, image=os.path.join(folder, row.image))


def rows_of_shards(shards: Sequence[Path], form: SampleForm) -> Iterator[list[Row]]:
    """Each shard's rows, read from the index beside it or from its headers and texts; pictures relative to its folder.

    Where a shard breaks off, its last row has that as its problem, and a warning says so.
    """
    for shard, rows in zip(shards, in_processes(partial(rows_of_shard, form=form), shards), strict=True):
        if rows and rows[-1].image == shard.name:
            logger.warning("%s; %d samples before that are used", rows[-1].problem, len(rows) - 1)
        yield rows


def rows_of_shard(shard: Path, *, form: SampleForm) -> list[Row]:
    """The rows of one shard; see `rows_of_shards`."""
    indexed = read_index(shard, form.kind) if form == SampleForm(kind=form.kind) else None
    return scan_shard(shard, form) if indexed is None else indexed


def scan_shard(shard: Path, form: SampleForm) -> list[Row]:
    """The rows of one shard from its headers and texts; a shard that breaks off ends with a row of its own name."""
    rows = []
    try:
        for sample in samples_of(shard):
            rows.append(_row(shard, sample, form))
    except UnreadableSample as error:
        rows.append(Row(shard.name, problem=f"{error.path}: {error.reason}"))
    return rows


def _row(shard: Path, sample: Sample, form: SampleForm) -> Row:
    extension = form.shown(sample.members) or next(iter(sample.members))
    address = sample.members[extension]
    return form.row(
        str(address._replace(tar=shard.name)),
        f"{shard}, sample {sample.key}",
        sample.members,
        lambda extension: read_member(sample.members[extension]),
    )


def index_path(shard: Path) -> Path:
    """Where the index of a shard is: 00000.arrow beside 00000.tar."""
    return shard.with_suffix(INDEX_SUFFIX)


def write_index(shard: Path, kind: Kind = PICTURES) -> int:
    """Write the index of a complete shard beside it: its rows as a table; returns how many."""
    with atomic_file(index_path(shard)) as temporary:
        return write_table(scan_shard(shard, SampleForm(kind=kind)), temporary, metadata=_state(shard, kind))


def read_index(shard: Path, kind: Kind = PICTURES) -> list[Row] | None:
    """The rows that a shard's index has; None where there is none that belongs to this file and kind."""
    try:
        table = RecordTable(index_path(shard))
    except (OSError, pa.ArrowInvalid, KeyError):
        return None
    if table.metadata != _state(shard, kind):
        return None
    return [Row(*table[number]) for number in range(len(table))]


def _state(shard: Path, kind: Kind) -> dict[str, str]:
    """What tells an index from that of another shard or of other members.

    Of a shard its size and a hash of both ends, not its time, which copying changes.
    """
    size = shard.stat().st_size
    with shard.open("rb") as file:
        ends = file.read(END_BYTES)
        file.seek(max(0, size - END_BYTES))
        ends += file.read()
    return {
        "layout": str(LAYOUT),
        "kind": kind.name,
        "bytes": str(size),
        "ends": hashlib.blake2b(ends, digest_size=16).hexdigest(),
    }


def in_processes(function: Callable[[T], R], items: Sequence[T], processes: int | None = None) -> Iterator[R]:
    """`map`, over some processes where there are more than a few items; results in order, a bounded number ahead."""
    count = processes or min(MAX_PROCESSES, int(available_cores()), len(items) // FEW_SHARDS)
    if count < 2:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent) as pool:
        for start in range(0, len(items), 8 * count):
            yield from pool.map(function, itertools.islice(items, start, start + 8 * count))


def _end_with_parent() -> None:
    """Let this process end when the one that started it is killed: it would wait forever, and hold its locks."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

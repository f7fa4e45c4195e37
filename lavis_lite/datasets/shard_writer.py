"""Writes any map-style dataset as tar shards: in parallel, each atomically, so that a stopped run is taken up again."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.fingerprint import file_digest
from lavis_lite.common.io import atomic_file, atomic_write, remove_leftovers
from lavis_lite.common.locks import GRACE_SECONDS, held
from lavis_lite.common.logging import duration
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.folder import Kind
from lavis_lite.datasets.image_text import ImageTextDataset
from lavis_lite.datasets.images import read_bytes
from lavis_lite.datasets.order import ORDER, permuted, seed_of
from lavis_lite.datasets.shard_rows import read_json
from lavis_lite.datasets.shards import in_processes, read_index, write_index
from lavis_lite.datasets.tar_members import Address, read_member, sample_of, split_name

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
LINE_SECONDS = 10.0
# Of all shards in a folder, in the form of webdataset's wids library.
INDEX_FILE = "index.json"


@dataclass(frozen=True)
class Plan:
    """What is written.

    dataset, split: their names. rows: of the split. tables: what the rows are read from, a hash of each.
    samples_per_shard: rows of each shard. shuffle: seed of the rows' order; None keeps it.
    """

    dataset: str
    split: str
    rows: int
    tables: tuple[str, ...]
    samples_per_shard: int
    shuffle: int | None = None

    @property
    def shards(self) -> int:
        """How many shards there will be."""
        return -(-self.rows // self.samples_per_shard)

    def rows_of(self, shard: int) -> list[int]:
        """The rows in a shard, in its order."""
        start = shard * self.samples_per_shard
        places = np.arange(start, min(start + self.samples_per_shard, self.rows), dtype=np.int64)
        if self.shuffle is None:
            return [int(row) for row in places]
        return [int(row) for row in permuted(places, self.rows, seed_of(ORDER, self.shuffle))]

    def path(self, out: Path, shard: int) -> Path:
        """Where a shard is written."""
        return out / f"{shard:0{max(5, len(str(self.shards - 1)))}}.tar"


class Written(NamedTuple):
    """What became of a shard. failures: (path, reason) of pictures that can't be read, which are left out."""

    shard: str
    samples: int
    bytes: int
    md5: str
    failures: list[tuple[str, str]]


def plan_of(dataset: Any, *, split: str, samples_per_shard: int, shuffle: int | None) -> Plan:
    """The plan for writing a dataset.

    Raises ConfigError for a dataset whose pictures or clips are no files.
    """
    if not isinstance(dataset, ImageTextDataset):
        raise ConfigError(
            f"dataset '{dataset.name}' ({type(dataset).__name__}) has no files to write; shards are made of datasets "
            "of files and of local shards"
        )
    tables = tuple(part.records.path.parent.name for part in dataset.parts)
    return Plan(dataset.name, split, len(dataset), tables, samples_per_shard, shuffle)


def make_shards(dataset: ImageTextDataset, plan: Plan, out: Path, *, workers: int = 1) -> list[Written]:
    """Write the shards of a plan that aren't there yet, and then the folder's index.

    Pictures and clips are copied byte by byte; what is known of a row goes into its .json. The shards don't depend on
    `workers`.

    Raises ConfigError when the folder holds shards of another plan, DataError when a worker dies or another process
    writes there.
    """
    # Processors stay here: they aren't needed, and a user's own may not pickle.
    bare = ImageTextDataset(dataset.parts, vis_processor=_unused, text_processor=str, name=dataset.name)
    write = partial(_write, bare, dataset.kind, plan, out)
    with _alone(out):
        _claim(plan, out)
        try:
            paths = [plan.path(out, number) for number in range(plan.shards)]
            there = {path.name for path in paths if path.is_file()}
            shards = in_processes(write, range(plan.shards), workers)
            written = list(_told(shards, plan.shards, there))
        except BrokenProcessPool as error:
            raise DataError(
                "a worker was killed, perhaps for want of memory: what is complete stays, and the same command goes on"
            ) from error
        atomic_write(out / INDEX_FILE, json.dumps(_index(plan, written), indent=1) + "\n")
    return written


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Make the folder, and let no other process write shards there meanwhile; DataError while one does."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"--out: can't make the folder '{out}': a file has that name") from error
    with held(
        out / LOCK_FILE,
        what=f"makes shards in '{out}'",
        refused=lambda busy: DataError(f"{busy}: wait for it to end, or use another --out"),
        wait=GRACE_SECONDS,
    ):
        yield


def _told(shards: Iterable[Written], total: int, there: Set[str] = frozenset()) -> Iterator[Written]:
    """The shards as they come, with a line now and then of how far it is.

    there: names of those that an earlier run made. They are only hashed, and say nothing of how long others take.
    """
    began = last = time.monotonic()
    made = 0
    for done, shard in enumerate(shards, 1):
        yield shard
        now = time.monotonic()
        if shard.shard in there:
            began = began if made else now
        else:
            made += 1
        if now - last >= LINE_SECONDS and done < total:
            last = now
            to_make = total - len(there) - made
            left = f", {duration((now - began) / made * to_make)} left" if made else ""
            logger.info("%d of %d shards%s", done, total, left)


def _claim(plan: Plan, out: Path) -> None:
    """Note in the folder what is written into it; ConfigError when that is something else already."""
    known = read_folder_index(out)
    plan_now = json.loads(json.dumps(asdict(plan)))
    if known is not None and known.get("plan") != plan_now:
        raise ConfigError(
            f"'{out}' holds shards made with other settings ({known.get('plan') or 'unknown'}): use another --out"
        )
    if known is None and any(out.glob("*.tar")):
        raise ConfigError(f"'{out}' holds shards that this command didn't make: use another --out")
    remove_leftovers(out)
    if known is None:
        atomic_write(out / INDEX_FILE, json.dumps(_index(plan, []), indent=1) + "\n")


def read_folder_index(folder: Path) -> dict[str, Any] | None:
    """The index that `make_shards` left in a folder; None where there is none, DataError for a broken one."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: broken json: {error}") from error
    return content if isinstance(content, dict) else None


def _index(plan: Plan, written: Sequence[Written]) -> dict[str, Any]:
    shards = [
        {"url": one.shard, "nsamples": one.samples, "filesize": one.bytes, "md5sum": one.md5}
        for one in written
    ]
    return {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": f"{plan.dataset} {plan.split}",
        "shardlist": shards,
        "plan": asdict(plan),
    }


def _write(dataset: ImageTextDataset, kind: Kind, plan: Plan, out: Path, number: int) -> Written:
    """Write one shard and the index beside it, unless they are there."""
    shard = plan.path(out, number)
    failures: list[tuple[str, str]] = []
    if not shard.is_file():
        _write_tar(dataset, kind, plan.rows_of(number), shard, failures)
    rows = read_index(shard, kind)
    samples = write_index(shard, kind) if rows is None else len(rows)
    return Written(shard.name, samples, shard.stat().st_size, file_digest(shard, "md5"), failures)


def _write_tar(
    dataset: ImageTextDataset,
    kind: Kind,
    rows: Sequence[int],
    shard: Path,
    failures: list[tuple[str, str]],
) -> None:
    import webdataset as wds

    with (
        atomic_file(shard) as temporary,
        temporary.open("wb") as file,
        wds.TarWriter(file, encoder=False, compress=False, mtime=0) as writer,
    ):
        for row in rows:
            try:
                members = _members(dataset, kind, row)
            except UnreadableSample as error:
                failures.append((error.path, error.reason))
                continue
            writer.write({"__key__": f"{row:09}", **members})


def _members(dataset: ImageTextDataset, kind: Kind, row: int) -> dict[str, bytes]:
    """The members of a row's sample; UnreadableSample for a row without captions, question or a file's bytes."""
    record, path = dataset.record(row), dataset.image_path(row)
    if record.problem is not None or not (record.captions or record.question):
        raise UnreadableSample(path, record.problem or "it has no caption")
    about: dict[str, Any] = {"captions": record.captions} if record.captions else {}
    about.update(
        {key: getattr(record, key) for key in ("image_id", "group") if getattr(record, key) is not None}
    )
    if record.question is not None:
        asked = asdict(record.question)
        about.update(question=asked.pop("text"), question_id=json.loads(asked.pop("id")), **asked)
    others, told = _beside(dataset, kind, row)
    # What is written of the row first, and in the place of fields with these names.
    fields = {**about, **told, **about}
    return {**others, _extension(path, kind): read_bytes(path), "json": json.dumps(fields).encode()}


def _beside(dataset: ImageTextDataset, kind: Kind, row: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What a row of a shard has there beside its picture: other members, and the fields of its .json.

    Without others of its kind, one of which would be taken for the row's own. Nothing for a row of files.
    """
    address = Address.parse(dataset.image_path(row))
    if address is None:
        return {}, {}
    before = row - 1  # rows of one picture, a caption each, are neighbours
    while before > 0 and dataset.image_path(before) == str(address):
        before -= 1
    sample = sample_of(address, Address.parse(dataset.image_path(before)) if before >= 0 else None)
    others = {
        extension: read_member(member)
        for extension, member in sample.members.items()
        if member.offset != address.offset and f".{extension}" not in kind.suffixes
    }
    told = others.pop("json", None)
    return others, {} if told is None else read_json(told, str(address))


def _extension(path: str, kind: Kind) -> str:
    """A file's extension; what it is called that has none of its kind says nothing of its content."""
    address = Address.parse(path)
    named = split_name(address.name if address else path)
    suffix = Path(f"x.{named[1]}").suffix if named else ""
    return (suffix if suffix in kind.suffixes else kind.suffixes[0]).lstrip(".")


def _unused(image: Image.Image) -> Tensor:
    raise AssertionError("pictures are copied, not processed")

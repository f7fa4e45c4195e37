"""Looks whether shards are whole: the tars to their end, each sample's members, what their index says of them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lavis_lite.common.fingerprint import file_digest
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.clip_sources import CLIPS
from lavis_lite.datasets.clips import decode_clip
from lavis_lite.datasets.folder import Kind
from lavis_lite.datasets.images import decode_image, read_bytes
from lavis_lite.datasets.shard_rows import SampleForm
from lavis_lite.datasets.shard_writer import read_folder_index
from lavis_lite.datasets.shards import in_processes, read_index, scan_shard
from lavis_lite.datasets.tar_members import Address, split_name
from lavis_lite.datasets.tar_streams import BrokenStream, stream_samples, why


class Report(NamedTuple):
    """What was found in a shard. broken: why the tar is, None for a whole one. bad: of its samples, why each is."""

    shard: str
    samples: int
    captions: int
    broken: str | None
    bad: list[str]

    @property
    def good(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.broken is None and not self.bad


def check_shards(
    shards: Sequence[str], form: SampleForm, *, deep: bool = False, workers: int | None = None
) -> Iterator[Report]:
    """A report of each local shard, in order.

    deep: decode every picture, or a frame of every clip, and compare with the index's checksum.
    """
    return in_processes(partial(_check, form=form, deep=deep), [Path(shard) for shard in shards], workers)


def check_streams(
    urls: Sequence[str], form: SampleForm, *, deep: bool = False, workers: int | None = None
) -> Iterator[Report]:
    """The same of shards that are read from beginning to end: addresses, commands, compressed tars.

    There is nothing to compare them with.
    """
    return in_processes(partial(_check_stream, form=form, deep=deep), urls, workers)


def _check_stream(url: str, *, form: SampleForm, deep: bool) -> Report:
    keys: Counter[str] = Counter()
    bad: list[str] = []
    undecodable: list[str] = []
    captions, broken = 0, None
    try:
        for sample in stream_samples(url):
            place = f"sample {sample.key}"
            row = form.row(place, place, sample.members, sample.members.__getitem__)
            keys[sample.key] += 1
            captions += len(row.captions)
            if row.problem is not None:
                bad.append(row.problem)
            elif deep:
                content = sample.members[form.shown(sample.members) or ""]
                undecodable += _undecodable(content, place, form.kind)
    except (BrokenStream, OSError) as error:
        broken = why(error)
    return Report(url, keys.total(), captions, broken, bad + _repeated(keys) + undecodable)


def _undecodable(content: bytes, place: str, kind: Kind) -> list[str]:
    try:
        if kind == CLIPS:
            decode_clip(io.BytesIO(content), place, 1)
        else:
            decode_image(io.BytesIO(content), place)
    except UnreadableSample as error:
        return [str(error)]
    return []


def _check(shard: Path, *, form: SampleForm, deep: bool) -> Report:
    if not shard.is_file():
        return Report(str(shard), 0, 0, "no such file", [])
    rows = scan_shard(shard, form)
    ends = rows and rows[-1].image == shard.name
    broken = (
        str(rows.pop().problem).removeprefix(f"{shard}: ")
        if ends
        else _differs(shard, len(rows), form.kind, deep=deep)
    )
    bad = [str(row.problem).removeprefix(f"{shard}, ") for row in rows if row.problem is not None]
    bad += _repeated(Counter(_key(row.image) for row in rows))
    if deep:
        good = [row.image for row in rows if row.problem is None]
        bad += [found for image in good for found in _undecodable_member(shard, image, form.kind)]
    return Report(str(shard), len(rows), sum(len(row.captions) for row in rows), broken, bad)


def _differs(shard: Path, samples: int, kind: Kind, *, deep: bool) -> str | None:
    """How a whole shard differs from what the indexes beside it say; None where it doesn't, or there are none."""
    indexed = read_index(shard, kind)
    if indexed is not None and len(indexed) != samples:
        return f"it has {samples} samples, its index {len(indexed)}"
    content = read_folder_index(shard.parent) or {}
    entry = next((one for one in content.get("shardlist", []) if one.get("url") == shard.name), None)
    if entry is None:
        return None
    size = shard.stat().st_size
    if (entry["nsamples"], entry["filesize"]) != (samples, size):
        told = f"{entry['nsamples']} samples, {entry['filesize']} bytes"
        return f"it has {samples} samples, {size} bytes; index.json says {told}"
    if deep and file_digest(shard, "md5") != entry["md5sum"]:
        return "its checksum is not that of index.json"
    return None


def _repeated(keys: Counter[str]) -> list[str]:
    return [f"sample {key}: its key comes {count} times" for key, count in keys.items() if count > 1]


def _key(image: str) -> str:
    address = Address.parse(image)
    named = split_name(address.name) if address else None
    return named[0] if named else image


def _undecodable_member(shard: Path, image: str, kind: Kind) -> list[str]:
    place = f"sample {_key(image)}"
    try:
        content = read_bytes(str(shard.parent / image))
    except UnreadableSample as error:
        return [f"{place}: {error.reason}"]
    return _undecodable(content, place, kind)

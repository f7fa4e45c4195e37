"""Whether pictures are still those whose features are stored, when their files have other modification times.

Copies of the same files have times of their own. So these only save reading: where they are those at which the contents
were last seen, nothing is read; elsewhere the contents decide, and the times are noted beside the features. A picture
that couldn't be read is tried again each time: what passes, such as an error of the disk, leaves times as they were.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from safetensors import SafetensorError

from lavis_lite.common.io import atomic_write
from lavis_lite.common.logging import get_logger
from lavis_lite.datasets.feature_store import FeatureStore
from lavis_lite.datasets.pictures import Pictures, joined_contents

logger = get_logger(__name__)

# {file: [contents of its pictures, their times when they had these, the numbers of those that couldn't be read]}
TIMES = "times.json"
# Pictures that are read at once to compare their contents.
READERS = 8
LINE_SECONDS = 10.0


def changed_shards(
    store: FeatureStore, pictures: Pictures, shards: Sequence[int], times: Sequence[str]
) -> list[int]:
    """Those of a store's files, all there, whose pictures have other contents than those encoded.

    times: of every file's pictures now.
    """
    known = _known(store)
    unread = {
        shard: _unread(known.get(str(shard)), [store.contents(shard), times[shard]]) for shard in shards
    }
    changed = [shard for shard, numbers in unread.items() if numbers and _any_is_there(pictures, numbers)]
    unsure = [shard for shard, numbers in unread.items() if numbers is None]
    if not unsure:
        return changed
    count = sum(len(store.numbers(shard)) for shard in unsure)
    logger.info(
        "features in %s: %d pictures have other times, so that their contents are compared",
        store.folder,
        count,
    )
    same, told = {}, time.monotonic()
    for place, shard in enumerate(unsure):
        numbers = store.numbers(shard)
        contents = _contents(pictures, numbers)
        if joined_contents(contents) == store.contents(shard):
            same[shard] = without_content(numbers, contents)
        else:
            changed.append(shard)
        if time.monotonic() - told > LINE_SECONDS:
            told = time.monotonic()
            logger.info("features in %s: %d of %d files compared", store.folder, place + 1, len(unsure))
    note_times(store, same, times)
    return changed


def without_content(numbers: Iterable[int], contents: Iterable[str | None]) -> list[int]:
    """Of some pictures, with their `Pictures.content`, those that couldn't be read."""
    return [number for number, content in zip(numbers, contents, strict=True) if content is None]


def note_times(store: FeatureStore, unread: Mapping[int, Sequence[int]], times: Sequence[str]) -> None:
    """Write down the times at which the pictures of files that are there had the contents that were encoded.

    unread: for each of these files the numbers of the pictures that couldn't be read.
    """
    if not unread:
        return
    # Of a folder to be read only nothing is noted: then contents are compared every time.
    with contextlib.suppress(OSError, SafetensorError):
        added = {
            str(shard): [store.contents(shard), times[shard], list(numbers)]
            for shard, numbers in sorted(unread.items())
        }
        atomic_write(store.folder / TIMES, json.dumps({**_known(store), **added}) + "\n")


def _unread(noted: Any, now: list[str]) -> list[int] | None:
    """The pictures of a file that couldn't be read; None where something else was noted than is there now."""
    match noted:
        case [*before, list(numbers)] if before == now:
            return numbers
    return None


def _any_is_there(pictures: Pictures, numbers: Sequence[int]) -> bool:
    return any(content is not None for content in _contents(pictures, numbers))


def _contents(pictures: Pictures, numbers: Sequence[int]) -> list[str | None]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(pictures.content, numbers))


def _known(store: FeatureStore) -> dict[str, Any]:
    try:
        known = json.loads((store.folder / TIMES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}

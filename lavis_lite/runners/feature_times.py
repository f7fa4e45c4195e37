"""Whether pictures are still those whose features are stored, when their files have other modification times.

Copies of the same files have times of their own. So these only save reading: where they are those at which the contents
were last seen, nothing is read; elsewhere the contents decide, and the times are noted beside the features.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Sequence

from safetensors import SafetensorError

from lavis_lite.common.io import atomic_write
from lavis_lite.common.logging import get_logger
from lavis_lite.datasets.feature_store import FeatureStore
from lavis_lite.datasets.pictures import Pictures

logger = get_logger(__name__)

# {file: [contents of its pictures, their times when they had these]}
TIMES = "times.json"
LINE_SECONDS = 10.0


def changed_shards(
    store: FeatureStore,
    pictures: Pictures,
    shards: Sequence[int],
    times: Sequence[str],
    *,
    meanwhile: Callable[[], None],
) -> list[int]:
    """Those of a store's files, all there, whose pictures have other contents than those encoded.

    times: of every file's pictures now. meanwhile: called every few seconds of reading.
    """
    known = _known(store)
    unsure = [shard for shard in shards if known.get(str(shard)) != [store.contents(shard), times[shard]]]
    if not unsure:
        return []
    count = sum(len(store.numbers(shard)) for shard in unsure)
    logger.info(
        "features in %s: %d pictures have other times, so that their contents are compared",
        store.folder,
        count,
    )
    changed, told = [], time.monotonic()
    for place, shard in enumerate(unsure):
        if pictures.contents(store.numbers(shard)) != store.contents(shard):
            changed.append(shard)
        if time.monotonic() - told > LINE_SECONDS:
            told = time.monotonic()
            logger.info("features in %s: %d of %d files compared", store.folder, place + 1, len(unsure))
            meanwhile()
    note_times(store, set(unsure) - set(changed), times)
    return changed


def note_times(store: FeatureStore, shards: Collection[int], times: Sequence[str]) -> None:
    """Write down the times at which the pictures of files that are there had the contents that were encoded."""
    if not shards:
        return
    # Of a folder to be read only nothing is noted: then contents are compared every time.
    with contextlib.suppress(OSError, SafetensorError):
        added = {str(shard): [store.contents(shard), times[shard]] for shard in sorted(shards)}
        atomic_write(store.folder / TIMES, json.dumps({**_known(store), **added}) + "\n")


def _known(store: FeatureStore) -> dict[str, list[str]]:
    try:
        known = json.loads((store.folder / TIMES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}

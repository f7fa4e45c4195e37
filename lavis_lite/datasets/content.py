"""What a dataset holds, in a few words that a checkpoint keeps: its order means nothing for another set of samples."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from lavis_lite.datasets.image_text import ImageTextDataset
from lavis_lite.datasets.shard_stream import ShardStream

# Rows, spread over all, whose pictures' names are compared: the names of 100 million would take minutes.
COMPARED_ROWS = 4096


def content_of(dataset: Any) -> dict[str, Any]:
    """kind ("shards" of a stream, else "rows"), how many there are, and a digest of their names; as JSON has it.

    It stays the same when all files move to another folder together. Datasets that are made up have an empty digest.
    """
    if isinstance(dataset, ShardStream):
        start = os.path.commonprefix(dataset.urls).rpartition("/")[0]  # noqa: RUF071  # not all are paths
        names = [url.removeprefix(start) for url in dataset.urls]
        return {"kind": "shards", "count": len(dataset.urls), "digest": _digest(names)}
    names = _row_names(dataset) if isinstance(dataset, ImageTextDataset) else []
    return {"kind": "rows", "count": len(dataset), "digest": _digest(names)}


def _row_names(dataset: ImageTextDataset) -> list[str]:
    rows = np.unique(np.linspace(0, len(dataset) - 1, COMPARED_ROWS, dtype=np.int64))
    return [dataset.record(int(row)).image for row in rows]


def _digest(names: Sequence[str]) -> str:
    text = "\0".join(names).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest() if names else ""

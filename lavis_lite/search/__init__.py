"""Image search: an index over the projected query vectors of many images, searched with a text or a picture.

    encoder = load_encoder(ModelChoice("blip2/shapes", "output/pretrain_stage1"))
    build_index("photos", "IDX", encoder)
    Searcher.open("IDX").search("a red circle", top=10, rerank="sum")

docs/search.md tells what the scores are and what an index is made of.
"""

from __future__ import annotations

from lavis_lite.search.build import (
    BuildOptions,
    Summary,
    add_images,
    build_index,
    compact_index,
    delete_images,
)
from lavis_lite.search.encoding import Encoder, ModelChoice, load_encoder
from lavis_lite.search.opening import ImageIndex, check_index, open_index
from lavis_lite.search.searcher import Hit, Searcher

__all__ = [
    "BuildOptions",
    "Encoder",
    "Hit",
    "ImageIndex",
    "ModelChoice",
    "Searcher",
    "Summary",
    "add_images",
    "build_index",
    "check_index",
    "compact_index",
    "delete_images",
    "load_encoder",
    "open_index",
]

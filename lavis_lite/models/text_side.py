"""The Q-Former's text side: what only text passes through, which stage 1 trains and stage 2 does without."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lavis_lite.common.checkpoint import resolve_checkpoint
from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.logging import get_logger
from lavis_lite.models.base import BaseModel
from lavis_lite.models.convert.formats import open_checkpoint
from lavis_lite.models.strict import load_strictly

logger = get_logger(__name__)

TEXT_SIDE = (
    r"^Qformer\.bert\.embeddings\.(word|position)_embeddings\.",
    r"^Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.",
)
_ALL_BUT_TEXT_SIDE = r"^(?!" + "|".join(pattern.removeprefix("^") for pattern in TEXT_SIDE) + ")"


def in_text_side(name: str) -> bool:
    """Whether a parameter is of the text side."""
    return any(re.search(pattern, name) for pattern in TEXT_SIDE)


def has_text_side(names: Iterable[str]) -> bool:
    """Whether any of a checkpoint's names is of the text side."""
    return any(in_text_side(name) for name in names)


def load_text_side(model: BaseModel, source: str | Path) -> None:
    """Give a model the text side of a stage-1 checkpoint, and nothing else of it; strict.

    Raises CheckpointError when it can't be read, has no text side, or one of another shape.
    """
    file = resolve_checkpoint(source)
    tensors = open_checkpoint(file).tensors
    kept = {name: tensors[name] for name in tensors if in_text_side(name)}
    if not kept:
        raise CheckpointError(
            f"model.qformer_text_from: the Q-Former of '{file}' reads no text; name a stage-1 run or checkpoint"
        )
    load_strictly(model, kept, source=f"the text side of '{file}'", optional=(_ALL_BUT_TEXT_SIDE,))
    logger.info("the Q-Former's text side from %s: %d tensors", file, len(kept))

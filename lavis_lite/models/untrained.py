"""Says of a model that is to be used which of its trained parts nothing has trained."""

from __future__ import annotations

from lavis_lite.common.logging import get_logger
from lavis_lite.models.base import BaseModel

logger = get_logger(__name__)


def warn_of_untrained(model: BaseModel) -> None:
    """One warning where parts that training is to make are still at random; see `BaseModel.untrained`."""
    parts = list(dict.fromkeys(name.split(".")[0] for name in model.untrained()))
    if not parts:
        return
    remedy = model.untrained_remedies.get(parts[0]) if len(parts) == 1 else None
    logger.warning(
        "no trained weights for %s of this %s: its results mean nothing; %s",
        *(", ".join(parts), type(model).__name__),
        remedy or "give a run, or a checkpoint (--checkpoint, run.checkpoint, in Python checkpoint=)",
    )

"""A run doesn't continue unawares on other data than before: the place in their order that it was at means nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lavis_lite.common import dist
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.logging import get_logger
from lavis_lite.datasets.content import content_of
from lavis_lite.datasets.stream_places import begin_epoch_again
from lavis_lite.runners.state import TrainState

logger = get_logger(__name__)


def note_data(state: TrainState, datasets: Sequence[Any], *, allowed: bool) -> None:
    """Keep in the state what the datasets hold, for the next time; compare with what they held at its checkpoint.

    allowed: `run.allow_changed_data`: a stream that changed begins its epoch again, one that was read at random before
    its first one; other datasets go on at the same place of another order. Each is a warning. A checkpoint of an older
    version has nothing to compare with.

    Raises ConfigError for a dataset that changed, unless that is allowed.
    """
    now = {dataset.name: content_of(dataset) for dataset in datasets}
    for name, held in now.items():
        before = state.data.get(name, held)
        if held == before:
            continue
        change = _change(before, held)
        if not allowed:
            raise ConfigError(
                f"datasets.{name}: {change}, so that some samples would come twice in this epoch and others not at "
                "all: bring back what was there, or set run.allow_changed_data=true to go on all the same"
            )
        begins = _begin_epoch(state, name, before["kind"], held["kind"])
        if dist.is_main():
            logger.warning("datasets.%s: %s; %s", name, change, begins)
    state.data = now


def _change(before: dict[str, Any], now: dict[str, Any]) -> str:
    other = "other " if (before["kind"], before["count"]) == (now["kind"], now["count"]) else ""
    return (
        f"the run was trained on {before['count']:,} {before['kind']} up to its checkpoint and now there are "
        f"{now['count']:,} {other}{now['kind']}"
    )


def _begin_epoch(state: TrainState, name: str, before: str, now: str) -> str:
    """Let a stream's readers begin the earliest epoch that one of them was in; where a dataset goes on, in words."""
    if now == "rows":
        return "some samples come twice in this epoch and others not at all"
    again = begin_epoch_again(name, state.stream_places) if before == now else None
    if again is None:
        return "a stream now, it begins with its first epoch"
    epoch, state.stream_places = again
    return f"its epoch {epoch} begins again"

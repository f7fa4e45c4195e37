"""What a model says of a split's rows: which rows, the texts from all ranks, the file they go to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lavis_lite.common import dist
from lavis_lite.common.io import atomic_write
from lavis_lite.datasets.loader import eval_loader
from lavis_lite.samples import visual_key
from lavis_lite.tasks.heldout import ChosenRows

T = TypeVar("T")


def evenly(places: Sequence[T], number: int) -> list[T]:
    """At most `number` of the places, at even distances."""
    take = min(number, len(places))
    return [places[len(places) * step // take] for step in range(take)]


def predict_rows(
    dataset: Any,
    rows: Sequence[int],
    loader_args: Any,
    say: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Sequence[T]],
    keep: Callable[[Sequence[tuple[int, T]]], None],
) -> dict[int, T]:
    """What is said of each row whose picture can be read, in the rows' order; the same on every rank.

    The rows are shared out over the ranks.

    Args:
        loader_args: `EvalArgs`. say: one text, or something with one, a row, given {"image": float[B, 3, H, W]} or
            {"video": float[B, F, 3, H, W]} on the device, and the batch. keep: is given the rows and what was said of
            them, each batch at once.
    """
    loader = eval_loader(
        ChosenRows(dataset, rows, seed=0),
        batch_size=loader_args.batch_size,
        num_workers=loader_args.num_workers,
        rank=dist.rank(),
        world_size=dist.world_size(),
        max_bad_fraction=loader_args.max_bad_fraction,
    )
    mine: list[tuple[int, T]] = []
    for batch in loader:
        key = visual_key(batch)
        visual = {key: batch[key].to(loader_args.device, non_blocking=True)}
        with loader_args.autocast():
            texts = say(visual, batch)
        said = list(zip(batch["index"].tolist(), texts, strict=True))
        keep(said)
        mine += said
    return dict(sorted(pair for part in dist.gather_objects(mine) for pair in part))


def write_list(path: Path, content: Sequence[Mapping[str, Any]]) -> None:
    """Write objects as json, one a line or more, for people to read."""
    atomic_write(path, json.dumps(content, ensure_ascii=False, indent=0) + "\n")

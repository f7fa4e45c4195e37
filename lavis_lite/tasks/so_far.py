"""Predictions in a file while they are made: what is left of an evaluation that doesn't come to its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavis_lite.common import dist
from lavis_lite.common.logging import get_logger

logger = get_logger(__name__)


class SoFar:
    """One rank's predictions, a line of json each; every batch is on its way to the disk before the next one begins.

    path: None for nowhere. A file of that name from before is written anew.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.count = 0
        if path is not None:
            self._try(lambda file: file.unlink(missing_ok=True))

    def add(self, predictions: Iterable[Mapping[str, Any]]) -> None:
        """Append what was predicted. A disk that takes no more is told once, and doesn't end the evaluation."""
        if self.path is not None:
            lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in predictions]
            self._try(lambda file: _append(file, lines))
            self.count += len(lines)

    def _try(self, change: Callable[[Path], None]) -> None:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            change(self.path)
        except OSError as error:
            logger.warning("predictions are not kept while they are made: %s", error)
            self.path = None


@contextmanager
def keeping_predictions(loader_args: Any) -> Iterator[SoFar]:
    """For a block that makes predictions and writes all of them together in the end.

    The ranks' own files, `predictions_<label>.part<rank>.jsonl` in the evaluation's folder, are there until the block
    is over on all ranks; after an error or a signal they stay, and a line in the log names this rank's.

    loader_args: `EvalArgs`.
    """
    folder, start = loader_args.folder, f"predictions_{loader_args.label}.part"
    so_far = SoFar(folder / f"{start}{dist.rank()}.jsonl" if folder else None)
    try:
        yield so_far
    except BaseException:
        if so_far.path is not None and so_far.count:
            logger.warning("the %d predictions made so far are in %s", so_far.count, so_far.path)
        raise
    dist.barrier()
    if dist.is_main() and folder is not None:
        for file in folder.glob(f"{start}*.jsonl"):
            file.unlink(missing_ok=True)


def _append(file: Path, lines: Iterable[str]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(lines)

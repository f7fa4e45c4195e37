"""Small pictures and annotation files that the data tests share."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lavis_lite.datasets.base import UnreadableSample

COCO_MINI = Path(
    os.environ.get(
        "LAVIS_LITE_COCO_MINI", Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini"
    )
)
needs_coco_mini = pytest.mark.skipif(
    not COCO_MINI.is_dir(), reason=f"no photographs at {COCO_MINI} (set LAVIS_LITE_COCO_MINI)"
)


def save_picture(path: Path, number: int = 0, size: tuple[int, int] = (40, 30)) -> None:
    """A picture whose colour tells its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, ((number * 37) % 256, (number * 11) % 256, 90)).save(path)


def make_jsonl(folder: Path, rows: int, *, captions: int = 2, **extra: Any) -> Path:
    """`rows` pictures in folder/images and folder/rows.jsonl, row i with captions "row i caption k"."""
    lines = []
    for row in range(rows):
        save_picture(folder / "images" / f"{row}.jpg", row)
        texts = [f"row {row} caption {k}" for k in range(captions)]
        lines.append(json.dumps({"image": f"{row}.jpg", "caption": texts, **extra}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@contextmanager
def warnings_logged(level: int = logging.WARNING) -> Iterator[list[str]]:
    """The messages the package logs as warnings (or `level`) or worse, whoever configured its logger before."""
    messages: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lavis_lite").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("lavis_lite").removeHandler(handler)


class NumberDataset:
    """A dataset of numbers with a few unreadable rows, to watch what a loader does without any files."""

    def __init__(self, rows: int, *, bad: Sequence[int] = (), name: str = "numbers") -> None:
        self.rows = rows
        self.bad = set(bad)
        self.name = name

    def __len__(self) -> int:
        return self.rows

    def load(self, index: int, *, seed: int) -> dict[str, Any]:
        if index in self.bad:
            raise UnreadableSample(f"/pictures/{self.name}/{index}.jpg", "no such file")
        return {"index": index, "seed": seed % 1_000_003}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "name": self.name,
            "index": torch.tensor([sample["index"] for sample in samples]),
            "seed": torch.tensor([sample["seed"] for sample in samples]),
        }

    def captions(self, index: int) -> list[str]:
        return [str(index)]

    def image(self, index: int) -> Image.Image:
        raise UnreadableSample(f"{index}", "numbers have no pictures")

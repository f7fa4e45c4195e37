"""Small clips that tests write themselves, and rows about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lavis_lite.worlds.shapes.avi import avi, jpeg

STEP = 20  # by so much of 255 a frame is brighter than the one before


def save_clip(path: Path, *, frames: int = 10, size: tuple[int, int] = (32, 24)) -> Path:
    """A clip of at most 12 frames whose brightness tells their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.new("RGB", size, (STEP * number + 10,) * 3) for number in range(frames)]
    path.write_bytes(avi([jpeg(picture) for picture in pictures], size=size))
    return path


def frame_values(frames: Sequence[Image.Image]) -> list[int]:
    """The numbers of such frames."""
    return [round((float(np.asarray(frame).mean()) - 10) / STEP) for frame in frames]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def own_clips(root: Path, number: int = 3) -> list[dict[str, Any]]:
    """`number` clips in root/clips, and a row of each."""
    for row in range(number):
        save_clip(root / "clips" / f"{row}.avi", frames=6 + row)
    return [{"video": f"{row}.avi", "caption": [f"clip {row}", f"film {row}"]} for row in range(number)]

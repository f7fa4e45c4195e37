"""Shards that the tests write: pictures whose colour tells their number, captions that tell it too."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image


def jpeg(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture whose colour tells its number."""
    file = io.BytesIO()
    Image.new("RGB", size, ((number * 37) % 256, (number * 11) % 256, 90)).save(file, "JPEG")
    return file.getvalue()


def sample(number: int) -> dict[str, bytes]:
    """CapFilt's layout: a picture and a .json with two captions."""
    about = {"captions": [f"row {number} caption {k}" for k in range(2)]}
    return {"jpg": jpeg(number), "json": json.dumps(about).encode()}


def write_shards(
    folder: Path, shards: int, samples: int, *, make: Callable[[int], dict[str, Any]] = sample
) -> str:
    """`shards` tars of `samples` samples each, numbered through; returns their pattern in braces."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with wds.TarWriter(str(folder / f"{shard:05}.tar"), encoder=False, mtime=0) as writer:
            for number in range(shard * samples, (shard + 1) * samples):
                writer.write({"__key__": f"{number:09}", **make(number)})
    return f"{folder}/{{00000..{shards - 1:05}}}.tar"


def section(pattern: str, **train: Any) -> dict[str, Any]:
    """A `datasets` entry that reads shards at 32 px, without augmentation of colours."""
    return {
        "builder": "shards",
        "train": {"shards": pattern, **train},
        "vis_processor": {"train": {"name": "blip_image_train", "image_size": 32}},
    }


def number_in(caption: str) -> int:
    """The number that a caption tells."""
    return int(caption.split()[1])

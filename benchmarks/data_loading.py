"""How fast the training loader is, against nothing but decoding the same JPEG files with Pillow.

    python benchmarks/data_loading.py [--images FOLDER] [--workers 0 2] [--json result.json]

Without a folder it makes photograph-like files (640x480, quality 85, about 100 kB). Rates are images per
second of wall time; the parts are processor time of one process, so that a busy machine doesn't blur them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import lavis_lite  # declares the processors' names
from lavis_lite.datasets.builders import build_datasets
from lavis_lite.datasets.image_text import ImageTextDataset
from lavis_lite.datasets.images import SUFFIXES, read_image
from lavis_lite.datasets.loader import TrainLoader


def make_photographs(folder: Path, count: int) -> None:
    """Soft shapes with grain: about the size and decoding time of COCO's photographs."""
    rng = np.random.default_rng(0)
    for number in range(count):
        blocks = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        coarse = blocks.resize((640, 480), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 9, (480, 640, 3))
        pixels = np.clip(np.asarray(coarse, np.float32) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=85)


def make_dataset(images: Path, work: Path, image_size: int) -> ImageTextDataset:
    """The files of a folder with five captions each, through the builder like any user's data."""
    names = sorted(path.name for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
    captions = [f"a photograph of something, seen from side {side}" for side in range(5)]
    lines = [json.dumps({"image": name, "caption": captions}) for name in names]
    (work / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    section = {
        "train": {"annotations": str(work / "rows.jsonl"), "images": str(images)},
        "vis_processor": {"train": {"name": "blip2_image_train", "image_size": image_size}},
    }
    built = build_datasets({"benchmark": section})["benchmark"]["train"]
    assert isinstance(built, ImageTextDataset)
    return built


def milliseconds(action: Callable[[int], Any], count: int) -> float:
    """Processor time of one call."""
    action(0)
    start = time.process_time()
    for number in range(count):
        action(number)
    return 1000 * (time.process_time() - start) / count


def decode_rate(data: ImageTextDataset, seconds: float) -> float:
    """Images per second of `Image.open(path).convert("RGB")` in this process."""
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        with Image.open(data.image_path(done % len(data))) as image:
            image.convert("RGB")
        done += 1
    return done / (time.perf_counter() - start)


def loader_rate(data: ImageTextDataset, workers: int, batch_size: int, seconds: float) -> tuple[float, float]:
    """Images per second of the loader, after its first batches, and the seconds until the first."""
    loader = TrainLoader([data], batch_size=batch_size, num_workers=workers)
    start = time.perf_counter()
    batches = loader.batches()
    next(batches)
    first = time.perf_counter() - start
    for _ in itertools.islice(batches, 2 * workers):  # what was read ahead while starting
        pass
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += len(next(batches)["index"])
    return done / (time.perf_counter() - start), first


def measure(data: ImageTextDataset, arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers; the loader and the bare decoder take turns."""
    rows, count = len(data), min(len(data), 100)
    samples = [data.load(row % rows, seed=row) for row in range(arguments.batch_size)]
    decode = milliseconds(lambda row: read_image(data.image_path(row % rows)), count)
    both = milliseconds(lambda row: data.vis_processor(read_image(data.image_path(row % rows))), count)
    load = milliseconds(lambda row: data.load(row % rows, seed=row), count)
    parts = {
        "decode": decode,
        "crop, resize, normalise": both - decode,
        "row, caption, seeds": max(0.0, load - both),
        "collate": milliseconds(lambda _: data.collate(samples), 5) / len(samples),
    }
    rates: dict[str, list[float]] = {"bare decode, 1 process": []}
    first: dict[str, float] = {}
    for _ in range(arguments.repeats):
        rates["bare decode, 1 process"].append(decode_rate(data, arguments.seconds))
        for workers in arguments.workers:
            name = f"loader, {workers} workers"
            rate, first[name] = loader_rate(data, workers, arguments.batch_size, arguments.seconds)
            rates.setdefault(name, []).append(rate)
    return {
        "images_per_s": {name: float(np.median(values)) for name, values in rates.items()},
        "first_batch_s": first,
        "ms_per_image": parts,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "image_size": arguments.image_size,
        "batch_size": arguments.batch_size,
        "files": rows,
        "mean_file_kb": float(
            np.mean([os.path.getsize(data.image_path(row)) for row in range(count)]) / 1024
        ),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    total = sum(result["ms_per_image"].values())
    lines = [f"{'part':<28}{'ms/image':>10}{'share':>8}"]
    lines += [f"{name:<28}{ms:>10.2f}{ms / total:>8.0%}" for name, ms in result["ms_per_image"].items()]
    lines.append(f"\n{'':<28}{'images/s':>10}")
    lines += [f"{name:<28}{rate:>10.0f}" for name, rate in result["images_per_s"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of pictures; made when absent")
    parser.add_argument("--count", type=int, default=64, help="pictures to make")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        os.environ["LAVIS_LITE_CACHE"] = str(Path(work, "cache"))
        images = arguments.images or Path(work, "images")
        if arguments.images is None:
            images.mkdir()
            make_photographs(images, arguments.count)
        result = measure(make_dataset(images.resolve(), Path(work), arguments.image_size), arguments)
    result["version"] = lavis_lite.__version__
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""How fast tar shards are read, against plain files and against bare JPEG decoding, which is the limit.

    python benchmarks/shards.py [--images FOLDER] [--workers 1 2] [--json result.json]

The same pictures and captions as files, as shards read at random, as shards read in a stream, and as such a stream
from a server on this machine (`http`), through the training loader; the sides take turns. Rates are images per second
of wall time; the parts are processor time of one process. The files are in the system's cache: what a disk adds is
not measured, and neither is a network's distance. Without a folder photograph-like files are made.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from data_loading import decode_rate, loader_rate, make_dataset, make_photographs, milliseconds
from timing import show, surroundings

from lavis_lite.datasets.builders import build_datasets
from lavis_lite.datasets.image_text import ImageTextDataset
from lavis_lite.datasets.images import decode_image, read_bytes
from lavis_lite.datasets.order import AUGMENT, seed_of
from lavis_lite.datasets.shard_writer import make_shards, plan_of


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a folder's files are served meanwhile, by a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "http.server",
        str(port),
        "--bind",
        "127.0.0.1",
        "--directory",
        str(folder),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def make_sides(
    files: ImageTextDataset, shards: Path, number: int, address: str, image_size: int
) -> dict[str, Any]:
    """The dataset of files, and the same as shards in all ways of reading them."""
    plan = plan_of(files, split="train", samples_per_shard=-(-len(files) // number), shuffle=0)
    make_shards(files, plan, shards)
    train = {"shards": f"{shards}/*.tar"}
    stream = {"stream": True, "samples": len(files), "shuffle": max(1, len(files) // number)}
    remote = {"shards": f"{address}/{{00000..{plan.shards - 1:05}}}.tar"}
    processor = {"train": {"name": "blip2_image_train", "image_size": image_size}}
    common = {"builder": "shards", "vis_processor": processor}
    built = build_datasets(
        {
            "shards": {**common, "train": train},
            "stream": {**common, "train": {**train, **stream}},
            "http": {**common, "train": {**stream, **remote}},
        }
    )
    return {"files": files, **{name: splits["train"] for name, splits in built.items()}}


def parts_of(sides: dict[str, Any], count: int) -> dict[str, float]:
    """Milliseconds of processor time that each part of reading an image takes, in one process."""
    files, shards, stream = sides["files"], sides["shards"], sides["stream"]
    contents = [read_bytes(files.image_path(row)) for row in range(count)]
    pictures = [decode_image(io.BytesIO(content), "") for content in contents[:8]]
    raw = itertools.cycle(range(len(stream.urls)))
    samples = stream.raw(raw, [])
    return {
        "read a file": milliseconds(lambda row: read_bytes(files.image_path(row)), count),
        "read a member": milliseconds(lambda row: read_bytes(shards.image_path(row)), count),
        "next of a stream": milliseconds(lambda row: next(samples), count),
        "decode": milliseconds(lambda row: decode_image(io.BytesIO(contents[row]), ""), count),
        "crop, resize, normalise": milliseconds(lambda row: files.vis_processor(pictures[row % 8]), count),
        "whole row, file": milliseconds(lambda row: files.load(row, seed=seed_of(AUGMENT, row)), count),
        "whole row, member": milliseconds(lambda row: shards.load(row, seed=seed_of(AUGMENT, row)), count),
    }


def rates_of(sides: dict[str, Any], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Images per second and worker of each side, and its share of bare decoding in the same round."""
    measured: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        bare = decode_rate(sides["files"], arguments.seconds)
        measured.setdefault("bare decode, 1 process", []).append(bare)
        for workers, (name, data) in itertools.product(arguments.workers, sides.items()):
            rate, _first = loader_rate(data, workers, arguments.batch_size, arguments.seconds)
            key = f"{name}, {workers} workers"
            measured.setdefault(key, []).append(rate / workers)
            shares.setdefault(key, []).append(rate / workers / bare)
    return {
        name: {
            "images_per_s_per_worker": statistics.median(values),
            "range": [min(values), max(values)],
            "of_bare_decode": statistics.median(shares[name]) if name in shares else 1.0,
        }
        for name, values in measured.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of pictures; made when absent")
    parser.add_argument("--count", type=int, default=256, help="pictures to make")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["LAVIS_LITE_CACHE"] = str(work / "cache")
        images = arguments.images or work / "images"
        if arguments.images is None:
            images.mkdir()
            make_photographs(images, arguments.count)
        files = make_dataset(images.resolve(), work, arguments.image_size)
        shards = work / "shards"
        shards.mkdir()
        with served(shards) as address:
            sides = make_sides(files, shards, arguments.shards, address, arguments.image_size)
            count = min(len(files), 100)
            result = {"ms_per_image": parts_of(sides, count), "rates": rates_of(sides, arguments)}
        size = sum(os.path.getsize(files.image_path(row)) for row in range(count)) / count / 1024
    show(
        {**result, "mean_file_kb": size, "image_size": arguments.image_size, **surroundings()}, arguments.json
    )


if __name__ == "__main__":
    main()

"""Stage 1 with stored features (`run.cache_features`) against stage 1 that encodes pictures at every step.

    python benchmarks/cached_features.py --pictures 2000 --precisions bf16 int8 --json result.json

Whole training steps of the embedded world's stage 1, data loading and optimiser included, alternate in one process,
so that both sides see the same machine; they share one model. Beside the ratio of times: what storing takes, in
seconds and bytes, and how far rounding takes the features from what the encoder made. `--options` changes the
configuration, for example to another encoder.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import show, surroundings, time_alternately

from lavis_lite.common.config import Config, load_config
from lavis_lite.common.device import autocast
from lavis_lite.datasets.feature_store import FeatureStore
from lavis_lite.image_features import ImageFeatures
from lavis_lite.runners.features import prepare, with_features
from lavis_lite.runners.resume import StartPoint
from lavis_lite.runners.setup import Parts, build_loader, build_parts, encoder_of, to_device

PROJECT = Path(__file__).resolve().parents[1] / "projects" / "blip2" / "pretrain_stage1.yaml"


def configured(arguments: argparse.Namespace, folder: Path, precision: str) -> Config:
    """The embedded world's stage 1, its features stored in a folder."""
    return load_config(
        PROJECT,
        [
            f"datasets.shapes_caption.train={arguments.pictures}",
            "datasets.shapes_caption.val=0",
            "datasets.shapes_caption.test=0",
            f"run.batch_size_train={arguments.batch_size}",
            f"run.num_workers={arguments.workers}",
            "run.num_threads=1",
            f"run.features.folder={folder}",
            f"run.features.views={arguments.views}",
            f"run.features.precision={precision}",
            "run.features.max_bytes=100GB",
            *arguments.options,
        ],
    )


def train_steps(parts: Parts, batches: Iterator[Mapping[str, Any]], steps: int) -> None:
    """Whole training steps as the runner takes them."""
    for _ in range(steps):
        samples = to_device(next(batches), parts.device)
        with autocast(parts.device, parts.precision):
            loss = parts.model(samples)["loss"]
        loss.backward()
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)


def rounding_error(parts: Parts, store: FeatureStore, pictures: Any, seed: int) -> float:
    """How far stored features are from the encoder's, relative to their size: the mean over some pictures."""
    encoder, errors = encoder_of(parts), []
    for number in range(0, min(len(pictures), 32)):
        made, stored = encoder(pictures.views(number, count=1, seed=seed))[0], store.read(number, 0)
        assert isinstance(stored, ImageFeatures)
        errors.append(float((stored.float() - made).norm() / made.norm()))
    return sum(errors) / len(errors)


def compare(parts: Parts, cfg: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """One precision: what storing takes, and the two sides' steps by turns."""
    start, cpu_start = time.perf_counter(), time.process_time()
    ((one, store),) = prepare(cfg, parts.datasets, encoder_of(parts))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    loaders = {
        "encoded": build_loader(cfg, parts.datasets),
        "stored": build_loader(cfg, with_features(cfg, parts.datasets, encoder_of(parts))),
    }
    batches = {name: loader.batches() for name, loader in loaders.items()}
    for own in batches.values():
        train_steps(parts, own, 2)
    sides = {name: partial(train_steps, parts, own, arguments.steps) for name, own in batches.items()}
    timed = time_alternately(sides, arguments.rounds)
    images = arguments.steps * arguments.batch_size
    return {
        "precision": store.layout.precision,
        "images_per_s": {name: images / value for name, value in timed["seconds"].items()},
        "images_per_cpu_s": {name: images / value for name, value in timed["cpu_seconds"].items()},
        **{key: timed[key] for key in ("ratio", "ratio_range", "ratio_cpu_time")},
        "store_seconds": seconds,
        "store_cpu_seconds": cpu_seconds,
        "bytes_on_disk": sum(file.stat().st_size for file in store.folder.iterdir()),
        "bytes_per_picture": store.layout.picture_bytes,
        "rounding_error": rounding_error(parts, store, one.pictures, cfg.run.features.seed),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp16", "int8"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4, help="of each side in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--options", nargs="+", default=[], help="key=value laid over the configuration")
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        configs = [configured(arguments, Path(folder), precision) for precision in arguments.precisions]
        parts = build_parts(configs[0], StartPoint())
        parts.model.train()
        cases = [compare(parts, cfg, arguments) for cfg in configs]
    own = {
        key: getattr(arguments, key)
        for key in ("pictures", "views", "batch_size", "workers", "steps", "rounds")
    }
    result = {
        "cases": cases,
        "run_precision": parts.precision,
        **own,
        "options": arguments.options,
        **surroundings(),
    }
    show(result, arguments.json)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

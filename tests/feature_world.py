"""A run with stored features in small: jpeg files, an encoder of one layer, files of few pictures each.

A configuration names this file in `imports`; then $FEATURE_SHARD_BYTES sets the size of a file, $FEATURE_SECONDS makes
encoding slow, and $FEATURE_ROUNDED rounds what is encoded as bf16 files do.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from lavis_lite.common.config import Config, import_file, load_config
from lavis_lite.datasets import feature_store
from lavis_lite.models.vision.tower import VisionTower
from lavis_lite.runners import features, setup

sys.path.insert(0, str(Path(__file__).parent))

from data_helpers import make_jsonl
from stage1_helpers import TinyPatches, tiny_config, write_tokenizer

# As a project file's `imports` would, which some of the other tests have: a name is registered once.
import_file("runner_fakes.py", relative_to=Path(__file__).parent)

# 4 views of 4 tokens x 24 numbers in 2 bytes: five pictures a file.
PICTURE_BYTES = 4 * 4 * 24 * 2
if "FEATURE_SHARD_BYTES" in os.environ:
    feature_store.SHARD_BYTES = int(os.environ["FEATURE_SHARD_BYTES"])
if "FEATURE_SECONDS" in os.environ:
    _forward = TinyPatches.forward

    def _slowly(self: TinyPatches, image: Tensor) -> Tensor:
        time.sleep(float(os.environ["FEATURE_SECONDS"]))
        return _forward(self, image)

    TinyPatches.forward = _slowly  # type: ignore[method-assign]

if "FEATURE_ROUNDED" in os.environ:
    _encode = VisionTower.forward

    def _rounded(self: VisionTower, images: Any) -> Tensor:
        return _encode(self, images).bfloat16().float()

    VisionTower.forward = _rounded  # type: ignore[method-assign]


def noise_pictures(folder: Path, rows: int) -> Path:
    """`make_jsonl` with pictures of which no two parts look alike, so that augmented views differ."""
    path = make_jsonl(folder, rows)
    for row in range(rows):
        pixels = torch.randint(
            0, 256, (6, 8, 3), generator=torch.Generator().manual_seed(row), dtype=torch.uint8
        )
        Image.fromarray(pixels.numpy()).resize((40, 30)).save(folder / "images" / f"{row}.jpg", quality=95)
    return path


def project(folder: Path, *, rows: int = 24, **run: Any) -> Path:
    """A project file with `rows` pictures (drawn if not there); features go to `folder`/features."""
    if not (folder / "rows.jsonl").exists():
        noise_pictures(folder, rows)
    vision = {"name": "tiny_patches", "freeze": True, "precision": "fp32"}
    content = {
        "imports": [__file__],
        "model": {
            "arch": "blip2",
            **tiny_config(write_tokenizer(folder / "tokenizer"), vision_encoder=vision),
        },
        "datasets": {
            "own": {
                "root": str(folder),
                "train": {"annotations": "rows.jsonl", "images": "images"},
                "vis_processor": {
                    "train": {"name": "blip2_image_train", "image_size": 16},
                    "eval": {"name": "blip_image_eval", "image_size": 16},
                },
            }
        },
        "task": {"name": "fake_loss"},
        "run": {
            "output_dir": str(folder / "run"),
            "max_steps": 9,
            "batch_size_train": 8,
            "batch_size_eval": 8,
            "num_workers": 0,
            "num_threads": 1,
            "init_lr": 0.01,
            "warmup_steps": 2,
            "log_every": 1,
            "precision": "fp32",
            "cache_features": True,
            "features": {"folder": str(folder / "features"), "max_bytes": "10MB"},
            **run,
        },
    }
    path = folder / "project.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def config(folder: Path, *options: str, **run: Any) -> Config:
    """The configuration, with options laid over it."""
    return load_config(project(folder, **run), options)


def prepared(folder: Path, *options: str, **run: Any) -> Mapping[str, Any]:
    """The datasets of a run that is about to begin."""
    cfg = config(folder, *options, **run)
    features.check_encoder(cfg)
    base = setup.build_base(cfg, model_cfg=cfg.model)
    return features.with_features(cfg, base.datasets, setup.encoder_of(base))


def files(folder: Path) -> list[Path]:
    """Those of all stored features of a run in `folder`."""
    return sorted((folder / "features").glob("*/*.safetensors"))

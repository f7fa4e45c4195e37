"""Which folder a split's features belong into: one for each thing they depend on.

The key holds the dataset's name, the encoder and its weights, the arithmetic, the image transform and the seed. Another
key is another folder, so nothing is ever read that does not fit; the pictures themselves are checked file by file, by
their paths below the image folder, wherever that is now.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_lite.common.config import Config
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.fingerprint import describe, digest, tensors_digest
from lavis_lite.common.io import atomic_write, cache_dir, remove_leftovers
from lavis_lite.common.locks import locked
from lavis_lite.common.logging import get_logger
from lavis_lite.common.sizes import show_bytes
from lavis_lite.datasets.feature_store import FeatureStore, Layout
from lavis_lite.datasets.pictures import Pictures
from lavis_lite.runners.feature_build import Encoder
from lavis_lite.runners.resume import differing_keys

logger = get_logger(__name__)

ABOUT, LOCK = "about.json", "lock"
# Raised when files of older versions can't be read.
VERSION = 2
# Keys of a vision_encoder section that don't change what a frozen encoder computes, or that others tell better.
NOT_IN_KEY = ("freeze", "pretrained", "grad_checkpointing", "precision")


@dataclass(frozen=True)
class Chosen:
    """A split whose features are stored, with so many views of each picture."""

    name: str
    split: str
    pictures: Pictures
    views: int

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.name} {self.split}"


def find_store(
    cfg: Config,
    one: Chosen,
    encoder: Encoder,
    locks: ExitStack,
) -> tuple[FeatureStore, list[str]]:
    """The store that a split's features belong into, complete or not; its folder made, and locked as long as `locks`.
    And for each of its files the `Files.times` of its pictures.

    Raises ConfigError for a folder that can't be made, DataError when no picture can be read.
    """
    settings, pictures = cfg.run.features, one.pictures
    key = {
        "version": VERSION,
        "encoder": _encoder_key(cfg, encoder),
        "transform": _transform_key(pictures.dataset.vis_processor),
        "dataset": [one.name, one.split],
        "views": one.views,
        "seed": settings.seed,
        "precision": settings.precision,
    }
    root = Path(settings.folder).expanduser() if settings.folder else cache_dir() / "features"
    prefix = re.sub(r"[^\w.]+", "_", f"{one.name}-{one.split}") + "-"
    folder = root / f"{prefix}{digest(json.dumps(key, sort_keys=True))}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.features.folder: can't make '{folder}': {error.strerror}") from error
    locks.enter_context(locked(folder / LOCK, what=f"stores features in {folder}"))
    remove_leftovers(folder)
    layout = _read_layout(folder)
    if layout is None:
        _tell_of_others(root, prefix, key, one.label)
        layout = Layout.of(one.views, *encoder.shape(pictures), settings.precision)
        about = {"key": key, "tokens": layout.tokens, "width": layout.width, "per_shard": layout.per_shard}
        atomic_write(folder / ABOUT, json.dumps(about, indent=1) + "\n")
    files = [pictures.files(numbers) for numbers in layout.shards(len(pictures))]
    store = FeatureStore(folder, layout, len(pictures), [state for state, _ in files])
    return store, [times for _, times in files]


def _encoder_key(cfg: Config, encoder: Encoder) -> dict[str, Any]:
    section = {key: value for key, value in cfg.model["vision_encoder"].items() if key not in NOT_IN_KEY}
    dtype = encoder.tower.dtype
    arithmetic = encoder.precision if dtype is None else str(dtype).removeprefix("torch.")
    weights = tensors_digest(encoder.tower.state_dict())
    return {**section, "arithmetic": arithmetic, "weights": weights}


def _transform_key(processor: Any) -> dict[str, str]:
    """What an image processor is and was made with, each in a few characters."""
    state = {name: describe(value) for name, value in getattr(processor, "__dict__", {}).items()}
    short = {name: text if len(text) <= 40 else digest(text) for name, text in state.items()}
    return {"class": f"{type(processor).__module__}.{type(processor).__qualname__}", **short}


def _read_layout(folder: Path) -> Layout | None:
    try:
        about = json.loads((folder / ABOUT).read_text())
        key = about["key"]
        return Layout(key["views"], about["tokens"], about["width"], key["precision"], about["per_shard"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _tell_of_others(root: Path, prefix: str, key: Mapping[str, Any], label: str) -> None:
    """Log why features that were stored of this split before are not read now."""
    differences = {}
    for file in root.glob(f"{prefix}*/{ABOUT}"):
        try:
            other = json.loads(file.read_text())["key"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        differences[file.parent] = differing_keys(other, json.loads(json.dumps(key)))
    if differences:
        nearest = min(differences, key=lambda folder: len(differences[folder]))
        size = sum(file.stat().st_size for file in nearest.glob("*.safetensors"))
        logger.info(
            "features of %s are stored anew: %s differs from those in %s (%s, which may be deleted)",
            *(label, ", ".join(differences[nearest]), nearest, show_bytes(size)),
        )

"""What the world's written files depend on, and the folder that they therefore have."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from lavis_lite.common.errors import ConfigError
from lavis_lite.common.io import cache_dir
from lavis_lite.worlds.shapes.scene import Split

# Numbers of pictures, captions and questions of different splits never meet.
ID_STRIDE = 10_000_000


@dataclass(frozen=True)
class FileSpec:
    """Items per split, the seed, and whatever else a subclass adds; each in its `bounds`, else ConfigError.

    kind: the folder's name below the cache folder, and what messages begin with. version: raised whenever the same
    arguments would give other files.
    """

    kind: ClassVar[str]
    version: ClassVar[int]
    bounds: ClassVar[dict[str, tuple[int, int]]] = {
        "train": (0, ID_STRIDE // 100),
        "val": (0, ID_STRIDE // 100),
        "test": (0, ID_STRIDE // 100),
        "image_size": (16, 1024),
    }

    train: int
    val: int
    test: int
    image_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in self.bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"{self.kind}: {name} must be from {low} to {high}, got {getattr(self, name)}"
                )

    @property
    def folder(self) -> Path:
        """Where these files live, below the cache folder; another spec or version has another folder."""
        text = json.dumps(asdict(self), sort_keys=True)
        return cache_dir() / self.kind / f"v{self.version}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def size(self, split: Split) -> int:
        """Items in a split."""
        sizes: dict[Split, int] = {"train": self.train, "val": self.val, "test": self.test}
        return sizes[split]

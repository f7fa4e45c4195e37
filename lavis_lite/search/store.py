"""An index opened for reading: the images' names, and their vectors mapped into memory.

Legend: N images, Q vectors each, E their width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_lite.search.journal import each_name, read_names
from lavis_lite.search.manifest import NAMES, PARTS, VECTORS, Manifest

DTYPES: dict[str, np.dtype[Any]] = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
# Numbers converted to float32 at a time, 64 MiB; and bytes in float32 up to which they are kept for the next search.
BLOCK = 1 << 24
KEPT_BYTES = 2 << 30


class Store:
    """The images of a manifest.

    alive: bool[N], false for deleted images.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root, self.manifest = root, manifest
        shape = (manifest.queries, manifest.width)
        parts = [(root / PARTS / part.name, part.images) for part in manifest.parts if part.images]
        self._vectors: list[np.ndarray[Any, Any]] = [
            np.memmap(folder / VECTORS, DTYPES[manifest.dtype], "r", shape=(images, *shape))
            for folder, images in parts
        ]
        self._names = [read_names(folder / NAMES) for folder, _ in parts]
        self._ends = np.cumsum([images for _, images in parts], dtype=np.int64)
        self.alive = torch.ones(len(self), dtype=torch.bool)
        if manifest.deleted:
            self.alive[torch.from_numpy(np.load(root / manifest.deleted.path))] = False
        self._kept: list[tuple[int, Tensor]] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, row: int) -> str:
        """The name of an image."""
        part = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[part - 1]) if part else 0
        return os.fsdecode(self._names[part][row - start].as_py())

    def names(self) -> Iterator[tuple[int, str]]:
        """(row, name) of all images that aren't deleted."""
        every = (name for column in self._names for name in each_name(column))
        return ((row, name) for row, name in enumerate(every) if self.alive[row])

    def gather(self, rows: Tensor) -> Tensor:
        """float32[n, Q, E] of the images at `rows`, int64[n]."""
        wanted = rows.numpy()
        found = np.empty((len(wanted), self.manifest.queries, self.manifest.width), np.float32)
        parts = np.searchsorted(self._ends, wanted, side="right")
        for part in np.unique(parts):
            here = parts == part
            start = self._ends[part - 1] if part else 0
            found[here] = self._vectors[part][wanted[here] - start]
        return torch.from_numpy(found)

    def blocks(self, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """(first row, float32[n, Q, E]) over the images from row `start` on.

        All images are kept in memory for the next time where they are few.
        """
        if start:
            yield from self._read(start)
            return
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[int, Tensor]] = []
        few = len(self) * self.manifest.queries * self.manifest.width * 4 <= KEPT_BYTES
        for block in self._read(0):
            if few:
                kept.append(block)
            yield block
        self._kept = kept if few else None

    def forget_blocks(self) -> None:
        """Give the memory back that `blocks` kept for the next time."""
        self._kept = None

    def _read(self, start: int) -> Iterator[tuple[int, Tensor]]:
        step = max(1, BLOCK // (self.manifest.queries * self.manifest.width))
        for part, vectors in enumerate(self._vectors):
            before = int(self._ends[part - 1]) if part else 0
            for first in range(max(0, start - before), len(vectors), step):
                block = vectors[first : first + step].astype(np.float32)
                yield before + first, torch.from_numpy(block)

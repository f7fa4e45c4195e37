"""Image features that wait for their pairs: in memory while they are few, on disk beyond that.

At 364 pixels ViT-g leaves 677 x 1408 numbers an image: the 5,000 images of COCO's test split are 9.5 GB in fp16.
"""

from __future__ import annotations

import bisect
import itertools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from lavis_lite.common.errors import DataError

MEMORY_LIMIT = 1 << 30
FP16_LARGEST = torch.finfo(torch.float16).max


class FeatureSpool:
    """Rows of features of one shape, written in order and read in any.

    Where all rows of all processes take up to `memory_limit` bytes they are kept in host memory as they came. Else they
    are written in fp16 to a file that leaves nothing behind however the process ends. Rows read from there are mapped
    only while they are copied, so that the file doesn't count as this process's memory for long.

    Args:
        total: rows that may come in all processes together. Were it this process's share, the features would be in
            fp16 on one process and as they came on two.
        folder: where such a file may be, on a disk with room for it; None for the system's folder of temporary files.
        memory_limit: bytes; None for MEMORY_LIMIT.
    """

    def __init__(self, total: int, folder: Path | None = None, *, memory_limit: int | None = None) -> None:
        self.total = total
        self.folder = folder
        self.memory_limit = MEMORY_LIMIT if memory_limit is None else memory_limit
        self.row_shape: tuple[int, ...] = ()
        self._count = 0
        self._kept: list[Tensor] = []
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def on_disk(self) -> bool:
        """Whether the features went to a file."""
        return self._file is not None

    @property
    def row_numel(self) -> int:
        """Numbers in a row."""
        return math.prod(self.row_shape)

    def append(self, rows: Tensor) -> None:
        """Add rows [n, ...] of any float type and device; raises DataError when the disk has no room for them."""
        self.row_shape = tuple(rows.shape[1:])
        rows = rows.cpu()
        if self.total * self.row_numel * rows.element_size() <= self.memory_limit:
            self._kept.append(rows)
        else:
            self._write(rows)
        self._count += len(rows)

    def _write(self, rows: Tensor) -> None:
        try:
            if self._file is None:
                if self.folder is not None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115, open as long as the spool
            half = rows.float().clamp(-FP16_LARGEST, FP16_LARGEST).half()
            self._file.write(half.contiguous().numpy().data)
            self._file.flush()
        except OSError as error:
            where = self.folder or tempfile.gettempdir()
            raise DataError(
                f"no place for image features in {where}: {error.strerror or error}; they take "
                f"{2 * self.row_numel:,} bytes an image: free some space or name another run.output_dir"
            ) from error

    def read(self, rows: Sequence[int]) -> Tensor:
        """Some rows in the order given, on the host: as they came, or in fp16 from the file."""
        if self._file is None:
            ends = list(itertools.accumulate(len(part) for part in self._kept))
            parts = [bisect.bisect_right(ends, row) for row in rows]
            return torch.stack(
                [self._kept[part][row - ends[part]] for part, row in zip(parts, rows, strict=True)]
            )
        mapped = np.memmap(self._file, np.float16, "r", shape=(self._count, *self.row_shape))
        return torch.from_numpy(np.asarray(mapped[list(rows)]))

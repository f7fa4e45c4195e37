"""Features that a frozen image encoder made before, in the precision they are stored in.

B images, P image tokens, C encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

FeaturePrecision = Literal["bf16", "fp16", "int8"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
# The largest magnitude of int8; -128 is left out, so that the range is symmetric.
INT8_MAX = 127


@dataclass(frozen=True)
class ImageFeatures:
    """A batch's features in the place of its pictures; of one image they lack the first dimension.

    values: bfloat16, float16 or int8 [B, P, C].
    scale: of int8, what a value of 1 stands for in each token: float32[B, P, 1]; None otherwise.
    """

    values: Tensor
    scale: Tensor | None = None

    @classmethod
    def rounded(cls, features: Tensor, precision: FeaturePrecision) -> ImageFeatures:
        """Float features [..., P, C] in a stored precision, each value to the nearest.

        int8 has a scale for each token, its largest magnitude / 127. A magnitude beyond fp16's becomes infinite.
        """
        if precision != "int8":
            return cls(features.to(DTYPES[precision]))
        features = features.float()
        scale = features.abs().amax(-1, keepdim=True) / INT8_MAX
        # A token of zeros has no scale to divide by, and none is needed.
        values = (features / scale.masked_fill(scale == 0, 1.0)).round().to(torch.int8)
        return cls(values, scale)

    @classmethod
    def stack(cls, rows: Sequence[ImageFeatures]) -> ImageFeatures:
        """One batch of several images' features."""
        scales = [row.scale for row in rows if row.scale is not None]
        return cls(torch.stack([row.values for row in rows]), torch.stack(scales) if scales else None)

    def float(self) -> Tensor:
        """The features as float32[B, P, C]."""
        values = self.values.float()
        return values if self.scale is None else values * self.scale

    def __len__(self) -> int:
        return len(self.values)

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return self.values.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageFeatures:
        """The same on a device, still in the stored precision: half or a quarter of float32's bytes travel."""
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageFeatures:
        """The same in page-locked memory; torch's DataLoader calls this."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, change: Any) -> ImageFeatures:
        return ImageFeatures(change(self.values), None if self.scale is None else change(self.scale))


def stack_images(images: Sequence[Any]) -> Any:
    """A batch of images: tensors [3, H, W] -> [B, 3, H, W], or features of one image each -> of all."""
    first = images[0]
    return ImageFeatures.stack(images) if isinstance(first, ImageFeatures) else torch.stack(list(images))

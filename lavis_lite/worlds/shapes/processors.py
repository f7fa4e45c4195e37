"""Pictures of the world to tensors; its augmentation never makes a caption false."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from lavis_lite.common.registry import registry
from lavis_lite.processors.rgb import as_seen

# Of 2,000 training pictures, over all channels (values in 0..1).
MEAN, STD = 0.40, 0.31


class ShapesImageProcessor:
    """A square picture to float32[3, H, W], normalised by the world's own mean and standard deviation."""

    def __init__(self, image_size: int = 64) -> None:
        self.image_size = image_size

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> Self:
        """The processor with the keywords of a mapping; None gives the defaults."""
        return cls(**dict(cfg or {}))

    def __call__(self, image: Image.Image) -> Tensor:
        return normalise(self.pixels(image))

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """uint8[H, W, 3] of the picture in RGB, resized when it has another size."""
        side = (self.image_size, self.image_size)
        image = as_seen(image)
        return np.asarray(image if image.size == side else image.resize(side, Image.Resampling.BICUBIC))


@registry.register_processor("shapes_image_eval")
class ShapesImageEval(ShapesImageProcessor):
    """The picture as it is; nothing random."""


@registry.register_processor("shapes_image_train")
class ShapesImageTrain(ShapesImageProcessor):
    """Small shifts, brightness, tint and noise; no mirroring, no crop.

    A shift of 2 of 64 pixels keeps every centre inside its cell (they stay 2.7 px away from its borders) and
    loses no object; tint and brightness stay well below the distance between colours.

    Args:
        image_size: the side in pixels.
        max_shift: in pixels of a 64-pixel picture, scaled with `image_size`; borders are repeated.
        brightness: largest relative change of all channels together.
        tint: largest relative change of one channel alone.
        noise: standard deviation of Gaussian noise, on values in 0..1.
    """

    def __init__(
        self,
        image_size: int = 64,
        *,
        max_shift: int = 2,
        brightness: float = 0.08,
        tint: float = 0.04,
        noise: float = 0.02,
    ) -> None:
        super().__init__(image_size)
        self.max_shift = max_shift * image_size // 64
        # Which row (or column) each one shows after a move by -max_shift to max_shift.
        places, moves = np.arange(image_size), np.arange(-self.max_shift, self.max_shift + 1)
        self._moved = np.clip(places - moves[:, None], 0, image_size - 1)
        self.brightness = brightness
        self.tint = tint
        self.noise = noise
        # Fresh noise would cost more than all the rest: a stretch of this one, begun at random, does as well.
        values = 3 * image_size**2
        self._noise = (
            np.random.Generator(np.random.PCG64(0)).standard_normal(2 * values, np.float32) * noise * 255
        )
        self._starts = values

    def __call__(self, image: Image.Image) -> Tensor:
        down, right, start, light, *tints = torch.rand(7).tolist()
        pixels = self._shift(self.pixels(image), self._offset(down), self._offset(right))
        light = 1 + (2 * light - 1) * self.brightness
        scale = [light + (2 * value - 1) * self.tint for value in tints]
        # Rows of pixels as one long line each: NumPy is slow where the last dimension is 3.
        lines = (self.image_size, 3 * self.image_size)
        scales = np.tile(np.array(scale, dtype=np.float32), self.image_size)
        values: NDArray[np.float32] = pixels.reshape(lines) * scales
        first = int(start * self._starts)
        values += self._noise[first : first + values.size].reshape(lines)
        return normalise(np.clip(values, 0, 255, out=values).reshape(pixels.shape))

    def _offset(self, value: float) -> int:
        return int(value * (2 * self.max_shift + 1)) - self.max_shift

    def _shift(self, pixels: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
        rows, columns = self._moved[down + self.max_shift], self._moved[right + self.max_shift]
        return pixels.take(rows, axis=0).take(columns, axis=1)


def normalise(pixels: NDArray[Any]) -> Tensor:
    """Normalised float32[3, H, W] of pixel values [H, W, 3] in 0..255."""
    values = pixels * np.float32(1 / (255 * STD)) - np.float32(MEAN / STD)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

"""RandAugment (arXiv 1909.13719) without the operations that would make a caption's colour words untrue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

# Strength at the top of the scale: sin of the slant, share of the side, degrees, share of the light.
MAX_SHEAR, MAX_TRANSLATE, MAX_ROTATE, MAX_LIGHT = 0.3, 0.3, 30.0, 0.9

Operation = Callable[[Image.Image, float, list[int]], Any]


def _affine(image: Image.Image, fill: list[int], **change: Any) -> Any:
    arguments: dict[str, Any] = {
        "angle": 0.0,
        "translate": [0, 0],
        "scale": 1.0,
        "shear": [0.0, 0.0],
        **change,
    }
    return F.affine(image, interpolation=InterpolationMode.BILINEAR, fill=fill, **arguments)


def _shear(strength: float) -> float:
    return float(torch.rad2deg(torch.atan(torch.tensor(MAX_SHEAR * strength))))


# Each takes a picture, a signed strength in -1..1 and the colour of what comes in from outside.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, s, fill: image,
    "auto_contrast": lambda image, s, fill: F.autocontrast(image),
    "equalize": lambda image, s, fill: F.equalize(image),
    "brightness": lambda image, s, fill: F.adjust_brightness(image, 1.0 + MAX_LIGHT * s),
    "sharpness": lambda image, s, fill: F.adjust_sharpness(image, 1.0 + MAX_LIGHT * s),
    "shear_x": lambda image, s, fill: _affine(image, fill, shear=[_shear(s), 0.0]),
    "shear_y": lambda image, s, fill: _affine(image, fill, shear=[0.0, _shear(s)]),
    "translate_x": lambda image, s, fill: _affine(
        image, fill, translate=[round(MAX_TRANSLATE * s * image.width), 0]
    ),
    "translate_y": lambda image, s, fill: _affine(
        image, fill, translate=[0, round(MAX_TRANSLATE * s * image.height)]
    ),
    "rotate": lambda image, s, fill: F.rotate(
        image, MAX_ROTATE * s, interpolation=InterpolationMode.BILINEAR, fill=fill
    ),
}


class RandAugment:
    """Applies `num_ops` operations drawn with replacement, each at `magnitude` tenths of its range, sign at
    random.

    fill: RGB colour, 0..255, of the area that geometric operations uncover.
    """

    def __init__(
        self, *, num_ops: int = 2, magnitude: int = 5, fill: Sequence[int] = (128, 128, 128)
    ) -> None:
        if not 0 <= magnitude <= 10:
            raise ValueError(f"magnitude must be in 0..10, got {magnitude}")
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.fill = list(fill)

    def __call__(self, image: Image.Image) -> Image.Image:
        names = list(OPERATIONS)
        for _ in range(self.num_ops):
            name = names[int(torch.randint(len(names), ()))]
            sign = 1.0 if int(torch.randint(2, ())) else -1.0
            image = OPERATIONS[name](image, sign * self.magnitude / 10.0, self.fill)
        return image

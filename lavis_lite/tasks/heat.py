"""Attention drawn over a picture."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavis_lite.tasks.examples import jpeg

COLOURS = "inferno"
SIDE = 240  # pixels of the longer side


def overlay(picture: Image.Image, weights: Tensor, *, side: int = SIDE) -> bytes:
    """A JPEG of the picture with weights float[h, w] over the whole of it: the brighter, the more.

    The picture is greyed, so that all colour is attention; the largest weight has the brightest colour.
    """
    from matplotlib import colormaps  # slow to import, and only reports draw

    shown = picture.convert("RGB")
    scale = side / max(shown.size)
    shown = shown.resize((max(1, round(shown.width * scale)), max(1, round(shown.height * scale))))
    grid = weights.float().cpu()[None, None]
    smooth = torch.nn.functional.interpolate(
        grid, size=(shown.height, shown.width), mode="bicubic", align_corners=False
    )[0, 0]
    strength = (smooth.clamp(min=0) / smooth.max().clamp(min=1e-12)).numpy()
    colour = colormaps[COLOURS](strength)[..., :3] * 255
    grey = np.asarray(shown.convert("L"), dtype=np.float64)[..., None]
    share = 0.25 + 0.55 * strength[..., None]
    mixed = (1 - share) * grey + share * colour
    return jpeg(Image.fromarray(mixed.round().astype(np.uint8)))

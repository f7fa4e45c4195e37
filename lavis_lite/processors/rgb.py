"""Pictures of every kind as people see them: upright, in RGB, transparent ones on white."""

from __future__ import annotations

import contextlib
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps

# What Pillow's decoders raise on broken content: OSError when truncated, SyntaxError for PNG chunks, ...
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
_ORIENTATION = 0x0112  # EXIF's tag


def as_seen(image: Image.Image) -> Image.Image:
    """A picture as RGB, turned upright as its EXIF tag says; the same object where nothing is to be done.

    Transparent pictures are laid on white; deeper than 8 bits is scaled to 8.
    """
    # A broken tag says nothing about the pixels.
    with contextlib.suppress(*DECODER_ERRORS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):
        return _from_deep(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """16- and 32-bit grey to RGB: Pillow alone would clip everything above 255 to white."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    top = float(values.max(initial=0.0))
    if image.mode.startswith("I;16") or 255.0 < top <= 65535.0:
        values = values / 257.0
    elif top > 65535.0:
        values = values * (255.0 / top)
    elif image.mode == "F" and top <= 1.0:
        values = values * 255.0
    grey = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return Image.fromarray(grey, "L").convert("RGB")

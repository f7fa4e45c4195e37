"""Decodes pictures of every kind that turns up in a folder to RGB."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.tar_members import Address, read_member
from lavis_lite.processors.rgb import DECODER_ERRORS, as_seen

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file, or at the address of a shard's member, as RGB, turned upright as its EXIF tag says.

    Transparent pictures are laid on white; deeper than 8 bits is scaled to 8; of an animation, the first
    frame.

    Raises UnreadableSample when the file is missing, truncated, or no picture.
    """
    name = os.fspath(path)
    address = Address.parse(name)
    return decode_image(name if address is None else io.BytesIO(read_member(address)), name)


def read_bytes(path: str) -> bytes:
    """The bytes of a picture's file or of a shard's member, as they are; UnreadableSample where there are none."""
    address = Address.parse(path)
    if address is not None:
        return read_member(address)
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UnreadableSample(path, "no such file") from error
    except OSError as error:
        raise UnreadableSample(path, error.strerror or "can't be read") from error
    except ValueError as error:  # no path at all
        raise UnreadableSample(path, str(error)) from error
    if not content:
        raise UnreadableSample(path, "the file is empty")
    return content


def decode_image(source: str | io.BytesIO, name: str) -> Image.Image:
    """The picture in a file or in bytes, as `read_image` gives it. name: what a message calls it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # odd metadata, palettes with byte transparency: the picture is fine
            with Image.open(source) as image:
                image.load()
                return as_seen(image)
    except FileNotFoundError as error:
        raise UnreadableSample(name, "no such file") from error
    except UnidentifiedImageError as error:
        empty = Path(source).stat().st_size == 0 if isinstance(source, str) else not source.getvalue()
        reason = "the file is empty" if empty else "not a picture"
        raise UnreadableSample(name, reason) from error
    except Image.DecompressionBombError as error:
        raise UnreadableSample(name, "more pixels than Pillow allows (Image.MAX_IMAGE_PIXELS)") from error
    except DECODER_ERRORS as error:
        raise UnreadableSample(name, " ".join(str(error).split()) or type(error).__name__) from error

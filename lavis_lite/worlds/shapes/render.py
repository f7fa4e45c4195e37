"""Draws scenes with Pillow at three times the size and averages down."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lavis_lite.worlds.shapes.scene import Scene, SceneObject, outline

SUPERSAMPLING = 3
RGB: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (245, 225, 40),
    "green": (35, 160, 55),
    "cyan": (50, 210, 215),
    "blue": (45, 85, 235),
    "purple": (135, 45, 175),
    "pink": (250, 140, 190),
    "black": (18, 18, 18),
    "gray": (128, 128, 128),
    "white": (236, 236, 236),
    "brown": (105, 66, 38),
    "navy": (18, 26, 82),
}
COLOUR_JITTER = 12
BACKGROUND_JITTER = 6
NOISE = 5
# The inner radius of a ring, as a fraction of its outer one.
RING_HOLE = 0.55


def render(scene: Scene, *, size: int = 64) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels; the same bytes for the same scene and size."""
    rng = np.random.Generator(np.random.PCG64(scene.noise_seed))
    jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=(len(scene.objects) + 1, 3)).tolist()
    scale = BACKGROUND_JITTER / COLOUR_JITTER
    background = _shift(RGB[scene.background], [int(scale * value) for value in jitter[-1]])
    side = size * SUPERSAMPLING
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    for item, shift in zip(scene.objects, jitter, strict=False):
        _draw_object(draw, item, side, _shift(RGB[item.colour], shift), background)
    pixels = np.asarray(image.reduce(SUPERSAMPLING), dtype=np.int16)
    noise = rng.integers(-NOISE, NOISE + 1, size=pixels.shape, dtype=np.int8)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def object_mask(scene: Scene, *, size: int = 64) -> NDArray[np.uint8]:
    """Which object each pixel shows, uint8[size, size]: 0 for none, i + 1 for `scene.objects[i]`."""
    image = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(image)
    for number, item in enumerate(scene.objects, start=1):
        _draw_object(draw, item, size, number, 0)
    return np.asarray(image)


def _draw_object(
    draw: ImageDraw.ImageDraw,
    item: SceneObject,
    side: int,
    fill: tuple[int, int, int] | int,
    hole: tuple[int, int, int] | int,
) -> None:
    points = outline(item)
    if points is not None:
        draw.polygon([(x * side, y * side) for x, y in points], fill=fill)
        return
    draw.ellipse(_bounds(item, item.radius, side), fill=fill)
    if item.shape == "ring":
        draw.ellipse(_bounds(item, item.radius * RING_HOLE, side), fill=hole)


def _bounds(item: SceneObject, radius: float, side: int) -> tuple[float, float, float, float]:
    return (
        (item.x - radius) * side,
        (item.y - radius) * side,
        (item.x + radius) * side,
        (item.y + radius) * side,
    )


def _shift(colour: tuple[int, int, int], shift: list[int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, c + s)) for c, s in zip(colour, shift, strict=True))
    return (red, green, blue)

"""What a picture of the world shows, as data: a pure function of (seed, split, index).

All lengths are fractions of the picture's side, so a scene is independent of the picture's size.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from math import cos, pi, sin
from typing import Literal, Protocol

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "gray", "white", "brown", "navy")
# Words for the nine cells of a 3x3 grid, row by row.
CELLS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip

MAX_OBJECTS = 4
# How often a scene has 1, 2, 3 or 4 objects.
COUNT_WEIGHTS = (1, 4, 5, 5)
# Circumradius by size; the two ranges stay apart under the +-6% jitter, so "small" and "large" are visible
# facts.
RADII = {"small": 7.8 / 64, "large": 11.5 / 64}
RADIUS_JITTER = 0.06
# Degrees either way: a square is seen at two thirds of all its angles, a triangle at half.
MAX_ROTATION = 30
# A centre stays at least 1/6 - 0.125 = 0.04 (2.7 px of 64) inside its cell, so a cell word is never in doubt.
CENTRE_JITTER = 0.125
GAP = 1.0 / 64
# Of 16 content-hash buckets, val and test own two each, train the rest.
BUCKETS: dict[Split, range] = {"val": range(0, 2), "test": range(2, 4), "train": range(4, 16)}


@dataclass(frozen=True)
class SceneObject:
    """One object: words, centre (x, y) and circumradius as fractions of the side, rotation in degrees."""

    shape: str
    colour: str
    size: str
    cell: int
    x: float
    y: float
    radius: float
    rotation: float

    @property
    def row(self) -> int:
        """Row of its cell, 0 (top) to 2."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """Column of its cell, 0 (left) to 2."""
        return self.cell % 3

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box (x, y, width, height) as fractions of the side."""
        points = outline(self)
        if points is None:
            return (self.x - self.radius, self.y - self.radius, 2 * self.radius, 2 * self.radius)
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        return (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))


@dataclass(frozen=True)
class Scene:
    """A picture's content: a background word and 1-4 objects in reading order of their cells."""

    background: str
    objects: tuple[SceneObject, ...]
    # Seeds the renderer's jitter and noise.
    noise_seed: int

    @property
    def key(self) -> str:
        """What the words can say about it; scenes with equal keys always belong to the same split."""
        parts = [f"{o.size} {o.colour} {o.shape} {o.cell}" for o in self.objects]
        return "; ".join([self.background, *parts])


def outline(item: SceneObject) -> list[tuple[float, float]] | None:
    """The object's corners in fractions of the side, or None for circles and rings."""
    unit = _UNIT_OUTLINES.get(item.shape)
    if unit is None:
        return None
    angle = item.rotation * pi / 180
    c, s = cos(angle) * item.radius, sin(angle) * item.radius
    return [(item.x + c * u - s * v, item.y + s * u + c * v) for u, v in unit]


def sample_scene(*, seed: int, split: Split, index: int) -> Scene:
    """Scene number `index` of a split.

    Splits are disjoint by construction: a scene's content key is hashed into a bucket that one split owns,
    whatever the seed, and drawing is repeated until the bucket is the split's.
    """
    # A string seed goes through SHA-512: the same on every machine, and neighbouring indices are unrelated.
    rng = random.Random(f"shapes/{seed}/{split}/{index}")
    while True:
        scene = _draw_scene(rng)
        if bucket(scene) in BUCKETS[split]:
            return scene


class Keyed(Protocol):
    """What words can tell from all else of its kind: a scene, or a clip."""

    @property
    def key(self) -> str: ...


def bucket(scene: Keyed) -> int:
    """The content-hash bucket (0-15) of a scene's key."""
    return hashlib.blake2b(scene.key.encode(), digest_size=1).digest()[0] % 16


def _draw_scene(rng: random.Random) -> Scene:
    background = rng.choice(BACKGROUNDS)
    count = rng.choices(range(1, MAX_OBJECTS + 1), COUNT_WEIGHTS)[0]
    # Sizes once, places until they fit: drawing both again would make large objects rare.
    sizes = [rng.choice(SIZES) for _ in range(count)]
    radii = [RADII[size] * (1 + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER)) for size in sizes]
    places = None
    while places is None:
        places = _draw_places(rng, radii)
    objects = [
        SceneObject(
            rng.choice(SHAPES),
            rng.choice(COLOURS),
            size,
            cell,
            round(x, 5),
            round(y, 5),
            round(radius, 5),
            round(rng.uniform(-MAX_ROTATION, MAX_ROTATION), 2),
        )
        for size, radius, (cell, x, y) in zip(sizes, radii, places, strict=True)
    ]
    return Scene(background, tuple(objects), rng.getrandbits(32))


def _draw_places(rng: random.Random, radii: list[float]) -> list[tuple[int, float, float]] | None:
    """(cell, x, y) of objects in different cells, in reading order; None when two would touch."""
    places: list[tuple[int, float, float]] = []
    for cell, radius in zip(sorted(rng.sample(range(9), len(radii))), radii, strict=True):
        x, y = draw_centre(rng, cell % 3, radius), draw_centre(rng, cell // 3, radius)
        for (_, other_x, other_y), other in zip(places, radii, strict=False):
            if (x - other_x) ** 2 + (y - other_y) ** 2 < (radius + other + GAP) ** 2:
                return None
        places.append((cell, x, y))
    return places


def draw_centre(rng: random.Random, place: int, radius: float) -> float:
    """One coordinate in the given third of the side, with the object inside the picture."""
    middle = (place + 0.5) / 3
    low, high = (
        max(middle - CENTRE_JITTER, radius + GAP / 2),
        min(middle + CENTRE_JITTER, 1 - radius - GAP / 2),
    )
    return rng.uniform(low, high)


def _polygon(radii: tuple[float, ...], corners: int) -> list[tuple[float, float]]:
    return [
        (
            radii[i % len(radii)] * sin(2 * pi * i / corners),
            -radii[i % len(radii)] * cos(2 * pi * i / corners),
        )
        for i in range(corners)
    ]


def _cross(arm: float) -> list[tuple[float, float]]:
    long, quarter = (1 - arm**2) ** 0.5, []
    for corner in ((arm, -long), (arm, -arm), (long, -arm)):
        quarter.append(corner)
    # Rotating (x, y) by 90 degrees three times gives the other corners in order.
    corners = list(quarter)
    for _ in range(3):
        quarter = [(-y, x) for x, y in quarter]
        corners += quarter
    return corners


_UNIT_OUTLINES = {
    "square": _polygon((1.0,), 4),
    "triangle": _polygon((1.0,), 3),
    "star": _polygon((1.0, 0.42), 10),
    "cross": _cross(0.28),
}

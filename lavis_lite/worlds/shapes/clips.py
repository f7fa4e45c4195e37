"""What a clip of the world shows: two objects that move, the second one there from the middle on; a pure function of
(seed, split, index).

A clip has four quarters, which its texts call pictures: in the first each object rests where its way begins, in the
last where it ends, in between it moves along a row or a column. In the middle frame both objects are there, each half
on its way: that frame alone can't tell which way they go, nor which was there first.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lavis_lite.worlds.shapes.scene import (
    BACKGROUNDS,
    BUCKETS,
    COLOURS,
    GAP,
    MAX_ROTATION,
    RADII,
    RADIUS_JITTER,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    Split,
    bucket,
    draw_centre,
)

FRAMES = 15  # odd: one frame is the middle
FPS = 8
REST = 0.25  # share of the time before and after the movement
APPEARS = 6  # the first frame with the second object


@dataclass(frozen=True)
class Mover:
    """An object where its way begins and where it ends, alike in all but place."""

    first: SceneObject
    last: SceneObject

    def at(self, time: float) -> SceneObject:
        """The object at a time in 0..1."""
        done = min(1.0, max(0.0, (time - REST) / (1 - 2 * REST)))
        x, y = (a + done * (b - a) for a, b in ((self.first.x, self.last.x), (self.first.y, self.last.y)))
        return replace(self.first if done < 0.5 else self.last, x=x, y=y)

    @property
    def direction(self) -> str:
        """Where it ends seen from where it began: left, right, above or below."""
        if self.first.row == self.last.row:
            return "left" if self.last.column < self.first.column else "right"
        return "above" if self.last.row < self.first.row else "below"


@dataclass(frozen=True)
class Clip:
    """A clip's content: background, the object that is there from the start, and the one that comes later."""

    background: str
    early: Mover
    late: Mover
    # Seeds the renderer's jitter and noise.
    noise_seed: int

    @property
    def key(self) -> str:
        """What the words can say about it; clips with equal keys always belong to the same split."""
        ways = [
            f"{m.first.size} {m.first.colour} {m.first.shape} {m.first.cell} {m.last.cell}"
            for m in self.movers
        ]
        return "; ".join([self.background, *ways])

    @property
    def movers(self) -> tuple[Mover, Mover]:
        """Both objects, the early one first."""
        return self.early, self.late

    def frame(self, number: int) -> Scene:
        """What frame `number` of `FRAMES` shows. An object that isn't there yet is outside of the picture, so that the
        renderer's jitter stays the same in all frames."""
        time = number / (FRAMES - 1)
        late = self.late.at(time)
        if number < APPEARS:
            late = replace(late, x=-1.0, y=-1.0)
        return Scene(self.background, (self.early.at(time), late), self.noise_seed)


def sample_clip(*, seed: int, split: Split, index: int) -> Clip:
    """Clip number `index` of a split; splits share no clip, as scenes don't (`scene.sample_scene`)."""
    rng = random.Random(f"shapes_video/{seed}/{split}/{index}")
    while True:
        clip = _draw_clip(rng)
        if bucket(clip) in BUCKETS[split]:
            return clip


def _draw_clip(rng: random.Random) -> Clip:
    background = rng.choice(BACKGROUNDS)
    # Two colours and two shapes: each object has a name of its own.
    looks = list(zip(rng.sample(SHAPES, 2), rng.sample(COLOURS, 2), rng.choices(SIZES, k=2), strict=True))
    movers = [_draw_mover(rng, *look) for look in looks]
    while not _apart(movers):
        movers = [_draw_mover(rng, *look) for look in looks]
    return Clip(background, movers[0], movers[1], rng.getrandbits(32))


def _draw_mover(rng: random.Random, shape: str, colour: str, size: str) -> Mover:
    radius = RADII[size] * (1 + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER))
    rotation = round(rng.uniform(-MAX_ROTATION, MAX_ROTATION), 2)
    start, end = rng.sample(range(3), 2)
    across = rng.randrange(3)
    # The other coordinate stays, so that the way is along the row or the column.
    steady = draw_centre(rng, across, radius)
    places = [(cell, draw_centre(rng, cell, radius)) for cell in (start, end)]
    if rng.random() < 0.5:
        ends = [(3 * across + cell, along, steady) for cell, along in places]
    else:
        ends = [(3 * cell + across, steady, along) for cell, along in places]
    first, last = (
        SceneObject(shape, colour, size, cell, round(x, 5), round(y, 5), round(radius, 5), rotation)
        for cell, x, y in ends
    )
    return Mover(first, last)


def _apart(movers: Sequence[Mover]) -> bool:
    """Whether the objects never touch."""
    least = sum(mover.first.radius for mover in movers) + GAP
    for number in range(FRAMES):
        one, other = (mover.at(number / (FRAMES - 1)) for mover in movers)
        if (one.x - other.x) ** 2 + (one.y - other.y) ** 2 < least**2:
            return False
    return True

"""Captions of clips and questions about them, in the words that the world's tokenizers and language models know.

"Picture one" to "picture four" are a clip's quarters. Of the five types of question the first four need frames of
different times; the last, for comparison, needs any one frame that shows the object.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from lavis_lite.worlds.shapes.clips import Clip
from lavis_lite.worlds.shapes.questions import Question
from lavis_lite.worlds.shapes.scene import CELLS, SceneObject
from lavis_lite.worlds.shapes.words import PLACES, noun

_Found = tuple[str, str]


def clip_captions(clip: Clip) -> list[str]:
    """Two captions that tell both ways: from each object's beginning to its end, and quarter by quarter."""
    early, late = clip.movers
    return [
        f"{_told(early.first)} in picture one, {PLACES[early.last.cell]} in picture four and in picture three "
        f"{noun(late.first)}, {PLACES[late.last.cell]} in picture four",
        f"in picture one there is {_told(early.first)}, in picture four there is {_told(early.last)} and "
        f"{_told(late.last)}",
    ]


def _told(item: SceneObject) -> str:
    return f"{noun(item)} {PLACES[item.cell]}"


def clip_questions(clip: Clip, *, count: int = 4) -> list[Question]:
    """`count` questions (1-5) of different types, a pure function of the clip."""
    rng = random.Random(f"clip questions/{clip.noise_seed}/{clip.key}")
    return [Question(kind, *_ASKERS[kind](clip, rng)) for kind in rng.sample(CLIP_TYPES, count)]


def _ask_direction(clip: Clip, rng: random.Random) -> _Found:
    way, name = clip.early.direction, noun(clip.early.first, article="the")
    choice = "left or right of" if way in ("left", "right") else "above or below"
    return f"is {name} in picture four {choice} the one in picture one?", way


def _ask_first_place(clip: Clip, rng: random.Random) -> _Found:
    return f"where is {noun(clip.early.first, article='the')} in picture one?", CELLS[clip.early.first.cell]


def _ask_last_place(clip: Clip, rng: random.Random) -> _Found:
    mover = rng.choice(clip.movers)
    return f"where is {noun(mover.last, article='the')} in picture four?", CELLS[mover.last.cell]


def _ask_order(clip: Clip, rng: random.Random) -> _Found:
    """Which of the two was there first."""
    first = clip.early.first
    if rng.random() < 0.5:
        return "what shape is the object in picture one?", first.shape
    return "what color is the object in picture one?", first.colour


def _ask_colour(clip: Clip, rng: random.Random) -> _Found:
    item = rng.choice(clip.movers).last
    return f"what color is the {item.shape}?", item.colour


_ASKERS: dict[str, Callable[[Clip, random.Random], _Found]] = {
    "direction": _ask_direction,
    "first_place": _ask_first_place,
    "last_place": _ask_last_place,
    "order": _ask_order,
    "color": _ask_colour,
}
CLIP_TYPES = tuple(_ASKERS)

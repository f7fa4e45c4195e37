"""Phrases shared by captions, questions and descriptions, and how to read them back."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lavis_lite.worlds.shapes.scene import BACKGROUNDS, CELLS, COLOURS, SHAPES, SIZES, SceneObject

NUMBERS = ("no", "one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
SINGULARS = {plural: shape for shape, plural in PLURALS.items()}
PLACES = tuple("in the center" if cell == "center" else f"at the {cell}" for cell in CELLS)

SIZE_PATTERN = "|".join(SIZES)
COLOUR_PATTERN = "|".join(COLOURS)
SHAPE_PATTERN = "|".join(SHAPES)
BACKGROUND_PATTERN = "|".join(BACKGROUNDS)
NUMBER_PATTERN = "|".join(NUMBERS)
# Longest first: "at the top left" must not be read as "at the top".
PLACE_PATTERN = "|".join(sorted(PLACES, key=len, reverse=True))
NOUN = (
    rf"(?:(?:a|an|one|the|is) )?(?:(?P<size>{SIZE_PATTERN}) )?"
    rf"(?P<colour>{COLOUR_PATTERN}) (?P<shape>{SHAPE_PATTERN})"
)


def noun(item: SceneObject, *, article: str = "a", size: bool = False) -> str:
    """A noun phrase such as "an orange ring" or "the large red star"; `article`: "a", "the", "one" or ""."""
    words = f"{item.size} {item.colour} {item.shape}" if size else f"{item.colour} {item.shape}"
    if article == "a" and words[0] in "aeiou":
        article = "an"
    return f"{article} {words}".strip()


def join(parts: Sequence[str]) -> str:
    """The parts as "a", "a and b" or "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def split_list(text: str) -> list[str]:
    """The parts `join` put together."""
    return re.split(r", | and ", text)


def holds(relation: str, first: SceneObject, second: SceneObject) -> bool:
    """Whether the relation holds between the cells: "left of" compares columns, "above" compares rows."""
    if relation in ("left of", "right of"):
        a, b = first.column, second.column
    else:
        a, b = first.row, second.row
    return a < b if relation in ("left of", "above") else a > b

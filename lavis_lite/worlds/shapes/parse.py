"""Reads captions and descriptions back into facts: shows that texts identify pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations

from lavis_lite.worlds.shapes.scene import CELLS, Scene, SceneObject
from lavis_lite.worlds.shapes.words import (
    BACKGROUND_PATTERN,
    COLOUR_PATTERN,
    NOUN,
    NUMBER_PATTERN,
    NUMBERS,
    PLACE_PATTERN,
    PLACES,
    RELATIONS,
    SINGULARS,
    holds,
    split_list,
)

_RELATION = "|".join(RELATIONS)
_GROUP = re.compile(
    rf"(?P<number>{NUMBER_PATTERN}) (?:(?P<colour>{COLOUR_PATTERN}) )?(?P<shapes>{'|'.join(SINGULARS)})"
    rf"(?: in (?P<colours>(?:{COLOUR_PATTERN})(?:(?:, | and )(?:{COLOUR_PATTERN}))*))?"
)


@dataclass(frozen=True)
class Mention:
    """What a text says of one object; None where it says nothing."""

    colour: str | None
    shape: str | None
    size: str | None = None
    cell: int | None = None

    def fits(self, item: SceneObject) -> bool:
        """Whether nothing said contradicts the object."""
        pairs = (
            (self.colour, item.colour),
            (self.shape, item.shape),
            (self.size, item.size),
            (self.cell, item.cell),
        )
        return all(said is None or said == is_ for said, is_ in pairs)


@dataclass
class Facts:
    """What a text says of a picture; `relations` holds (index of a mention, relation, index of a mention)."""

    mentions: list[Mention] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    background: str | None = None
    count: int | None = None
    large: int | None = None


def parse(text: str) -> Facts:
    """The facts in a caption of any style or in a description; ValueError for a text that is neither."""
    facts = Facts(background=_first(rf"({BACKGROUND_PATTERN}) background", text))
    if match := re.search(rf"\b({NUMBER_PATTERN}) (?:shape|object)s?\b", text):
        facts.count = NUMBERS.index(match[1])
    if match := re.search(rf"({NUMBER_PATTERN}|none) of them large", text):
        facts.large = 0 if match[1] == "none" else NUMBERS.index(match[1])
        _parse_groups(text.partition(": ")[2], facts)
    elif re.search(rf" (?:{_RELATION}) ", text):
        _parse_relations(text, facts)
    else:
        _parse_mentions(text, facts)
    if not facts.mentions:
        raise ValueError(f"not a text of this world: '{text}'")
    return facts


def consistent(facts: Facts, scene: Scene) -> bool:
    """Whether a scene could be the one described: some assignment of mentions to different objects fits."""
    items = scene.objects
    if facts.background not in (None, scene.background) or facts.count not in (None, len(items)):
        return False
    if facts.large not in (None, sum(item.size == "large" for item in items)):
        return False
    # Most scenes fail here already, long before assignments are tried.
    if not all(any(mention.fits(item) for item in items) for mention in facts.mentions):
        return False
    return any(_fits(facts, chosen) for chosen in permutations(items, len(facts.mentions)))


def _fits(facts: Facts, chosen: Sequence[SceneObject]) -> bool:
    return all(mention.fits(item) for mention, item in zip(facts.mentions, chosen, strict=True)) and all(
        holds(relation, chosen[i], chosen[j]) for i, relation, j in facts.relations
    )


def ceiling(texts: Sequence[tuple[int, str]], scenes: Sequence[Scene]) -> float:
    """Expected text-to-image recall at 1 of a perfect reader who guesses among the scenes that fit.

    Args:
        texts: (index of the scene described, text).
        scenes: the gallery.
    """
    total = 0.0
    for truth, text in texts:
        facts = parse(text)
        fitting = [i for i, scene in enumerate(scenes) if consistent(facts, scene)]
        if truth not in fitting:
            raise ValueError(f"'{text}' contradicts its own scene '{scenes[truth].key}'")
        total += 1 / len(fitting)
    return total / len(texts)


def _parse_groups(text: str, facts: Facts) -> None:
    for match in _GROUP.finditer(text):
        shape, number = SINGULARS[match["shapes"]], NUMBERS.index(match["number"])
        colours = split_list(match["colours"]) if match["colours"] else [match["colour"]] * number
        facts.mentions += [Mention(colour, shape) for colour in colours]
    facts.mentions += [_mention(match) for match in re.finditer(NOUN, text) if match[0].startswith("one ")]


def _parse_relations(text: str, facts: Facts) -> None:
    """The forms are "A is left of B", "A is left of B and above C", "A is left of B and C is above D"."""
    nouns = list(re.finditer(NOUN, text))
    facts.mentions = [_mention(match) for match in nouns]
    subject = 0
    for number, match in enumerate(nouns):
        before = re.search(rf"({_RELATION}) $", text[: match.start()])
        if before is None:
            subject = number
        else:
            facts.relations.append((subject, before[1], number))
    # Every object of the scene takes part in a relation.
    facts.count = len(nouns)


def _parse_mentions(text: str, facts: Facts) -> None:
    """Objects with a place after them, or before when the text opens with it, or with none."""
    opening = re.match(rf"({PLACE_PATTERN}) there is ", text)
    for match in re.finditer(NOUN, text):
        place = opening[1] if opening else _first(rf"^,? ?({PLACE_PATTERN})", text[match.end() :])
        facts.mentions.append(_mention(match, place))
    # A listing names every object, and so do the other styles where they name fewer than three.
    listed = all(mention.cell is None for mention in facts.mentions)
    if facts.count is None and (listed or len(facts.mentions) < 3):
        facts.count = len(facts.mentions)


def _mention(match: re.Match[str], place: str | None = None) -> Mention:
    cell = PLACES.index(place) if place else None
    assert cell is None or cell < len(CELLS)
    return Mention(match["colour"], match["shape"], match["size"], cell)


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None

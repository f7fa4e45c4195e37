"""Captions in four styles: each is true of its picture, and together they identify it."""

from __future__ import annotations

import random
from collections.abc import Callable

from lavis_lite.worlds.shapes.scene import Scene, SceneObject
from lavis_lite.worlds.shapes.words import NUMBERS, PLACES, PLURALS, RELATIONS, holds, join, noun


def captions(scene: Scene, *, count: int = 2) -> list[str]:
    """`count` captions in different styles (1-4), a pure function of the scene; about 15 words each.

    >>> captions(sample_scene(seed=0, split="train", index=0))
    ['a yellow triangle at the left, a blue star at the top right and ...', ...]
    """
    rng = random.Random(f"captions/{scene.noise_seed}/{scene.key}")
    return [caption(scene, style, rng) for style in rng.sample(STYLES, count)]


def caption(scene: Scene, style: str, rng: random.Random) -> str:
    """One caption in the given style; `rng` chooses what is said where a style leaves something out."""
    return _WRITERS[style](scene, rng)


def describe(scene: Scene) -> str:
    """Everything the words can say: each object's size, colour, shape and place, and the background."""
    number = len(scene.objects)
    items = join([f"{noun(item, size=True)} {PLACES[item.cell]}" for item in scene.objects])
    counted = "is one object" if number == 1 else f"are {NUMBERS[number]} objects"
    return f"there {counted} on {_background(scene)}: {items}"


def _background(scene: Scene, article: str = "a") -> str:
    return f"{article} {scene.background} background"


def _listing(scene: Scene, rng: random.Random) -> str:
    """All objects with their sizes, and the background."""
    first = scene.objects[0]
    if len(scene.objects) == 1:
        return f"{noun(first, size=True)} {PLACES[first.cell]} of {_background(scene)}"
    return f"{join([noun(item, size=True) for item in scene.objects])} on {_background(scene)}"


def _position(scene: Scene, rng: random.Random) -> str:
    """Up to three objects with their places."""
    first = scene.objects[0]
    if len(scene.objects) == 1:
        return f"{PLACES[first.cell]} there is {noun(first, size=True)} on {_background(scene)}"
    told = sorted(rng.sample(range(len(scene.objects)), min(3, len(scene.objects))))
    return join([f"{noun(scene.objects[i])} {PLACES[scene.objects[i].cell]}" for i in told])


def _relation(scene: Scene, rng: random.Random) -> str:
    """How objects lie to each other: one statement for two objects, two for three and four."""
    items = scene.objects
    if len(items) == 1:
        where = f"{PLACES[items[0].cell]} of {_background(scene, 'the')}"
        return f"nothing is beside {noun(items[0], article='the', size=True)} {where}"
    order = rng.sample(items, len(items))
    if len(items) == 2:
        return f"{_statement(order[0], order[1], rng, size=True)} on {_background(scene)}"
    if len(items) == 3:
        return f"{_statement(order[0], order[1], rng)} and {_relate(order[0], order[2], rng)}"
    return f"{_statement(order[0], order[1], rng)} and {_statement(order[2], order[3], rng)}"


def _statement(first: SceneObject, second: SceneObject, rng: random.Random, *, size: bool = False) -> str:
    return f"{noun(first, size=size)} is {_relate(first, second, rng, size=size)}"


def _relate(first: SceneObject, second: SceneObject, rng: random.Random, *, size: bool = False) -> str:
    relation = rng.choice([relation for relation in RELATIONS if holds(relation, first, second)])
    return f"{relation} {noun(second, size=size)}"


def _counting(scene: Scene, rng: random.Random) -> str:
    """How many objects, how many of them large, then how many of each shape and in which colours."""
    items = scene.objects
    if len(items) == 1:
        return f"one shape on {_background(scene)}, {noun(items[0], size=True)} {PLACES[items[0].cell]}"
    large = sum(item.size == "large" for item in items)
    head = f"{NUMBERS[len(items)]} shapes"
    if len(items) == 2:
        head += f" on {_background(scene)}"
    groups: dict[str, list[SceneObject]] = {}
    for item in items:
        groups.setdefault(item.shape, []).append(item)
    told = join([_group(group) for group in groups.values()])
    return f"{head}, {'none' if large == 0 else NUMBERS[large]} of them large: {told}"


def _group(group: list[SceneObject]) -> str:
    """Objects of one shape: "one red star", "two pink rings", "two circles in red and blue"."""
    if len(group) == 1:
        return noun(group[0], article="one")
    plural, colours = PLURALS[group[0].shape], [item.colour for item in group]
    if len(set(colours)) == 1:
        return f"{NUMBERS[len(group)]} {colours[0]} {plural}"
    return f"{NUMBERS[len(group)]} {plural} in {join(colours)}"


_WRITERS: dict[str, Callable[[Scene, random.Random], str]] = {
    "listing": _listing,
    "relation": _relation,
    "position": _position,
    "counting": _counting,
}
STYLES = tuple(_WRITERS)

"""Questions of eleven types, each answerable from the picture and from `captions.describe`'s text alone."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lavis_lite.worlds.shapes.parse import Mention, parse
from lavis_lite.worlds.shapes.scene import BACKGROUNDS, CELLS, COLOURS, SHAPES, SIZES, Scene, SceneObject
from lavis_lite.worlds.shapes.words import PLACE_PATTERN, PLACES, PLURALS, RELATIONS, SINGULARS, holds, noun

# A word that selects objects -> the attribute it names.
_KINDS = {
    **{PLURALS[shape]: "shape" for shape in SHAPES},
    **{f"{colour} objects": "colour" for colour in COLOURS},
    **{f"{size} objects": "size" for size in SIZES},
}


@dataclass(frozen=True)
class Question:
    """A question with its one right answer; `answer_type` is VQAv2's "yes/no", "number" or "other"."""

    type: str
    text: str
    answer: str

    @property
    def answer_type(self) -> str:
        """VQAv2's coarse class of the answer."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "number" if self.answer.isdigit() else "other"


def questions(scene: Scene, *, count: int = 4) -> list[Question]:
    """`count` questions of different types, a pure function of the scene.

    Answers are drawn before objects where that balances them: within each type no answer is much more
    frequent than the others (a test holds the mean majority answer below 0.34).
    """
    rng = random.Random(f"questions/{scene.noise_seed}/{scene.key}")
    asked: list[Question] = []
    for kind in rng.sample(TYPES, len(TYPES)):
        question = ask(scene, kind, rng)
        if question is not None and len(asked) < count:
            asked.append(question)
    return asked


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of the given type, or None where the scene has nothing to ask it of."""
    found = _ASKERS[kind](scene, rng)
    return Question(kind, *found) if found else None


_Found = tuple[str, str] | None


def _ask_existence(scene: Scene, rng: random.Random) -> _Found:
    present = {(item.colour, item.shape) for item in scene.objects}
    if rng.random() < 0.5:
        colour, shape = rng.choice(sorted(present))
        return f"is there {_a(colour)} {shape}?", "yes"
    # Half of the absent ones combine a colour and a shape that are both there.
    mixed = {(c, s) for c, _ in present for _, s in present} - present
    everything = {(c, s) for c in COLOURS for s in SHAPES} - present
    colour, shape = rng.choice(sorted(mixed if mixed and rng.random() < 0.5 else everything))
    return f"is there {_a(colour)} {shape}?", "no"


def _ask_count(scene: Scene, rng: random.Random) -> _Found:
    return "how many objects are there?", str(len(scene.objects))


def _ask_kind_count(scene: Scene, rng: random.Random) -> _Found:
    counts = Counter(getattr(item, kind) for item in scene.objects for kind in ("shape", "colour", "size"))
    by_count: dict[int, list[str]] = {}
    for phrase, kind in _KINDS.items():
        number = counts[SINGULARS[phrase] if kind == "shape" else phrase.split()[0]]
        # Colours and shapes that are absent are many: an absent size is as good a zero and rarer.
        by_count.setdefault(min(number, 4), []).append(phrase)
    number = rng.choice(sorted(by_count))
    return f"how many {rng.choice(by_count[number])} are there?", str(number)


def _ask_colour(scene: Scene, rng: random.Random) -> _Found:
    item = _unique(scene, rng, "shape")
    return (f"what color is the {item.shape}?", item.colour) if item else None


def _ask_colour_at(scene: Scene, rng: random.Random) -> _Found:
    item = rng.choice(scene.objects)
    return f"what color is the object {PLACES[item.cell]}?", item.colour


def _ask_shape(scene: Scene, rng: random.Random) -> _Found:
    item = _unique(scene, rng, "colour")
    return (f"what shape is the {item.colour} object?", item.shape) if item else None


def _ask_shape_at(scene: Scene, rng: random.Random) -> _Found:
    item = rng.choice(scene.objects)
    return f"what shape is the object {PLACES[item.cell]}?", item.shape


def _ask_size(scene: Scene, rng: random.Random) -> _Found:
    item = _unique(scene, rng, "colour", "shape")
    return (f"is {noun(item, article='the')} small or large?", item.size) if item else None


def _ask_position(scene: Scene, rng: random.Random) -> _Found:
    item = _unique(scene, rng, "colour", "shape")
    return (f"where is {noun(item, article='the')}?", CELLS[item.cell]) if item else None


def _ask_relation(scene: Scene, rng: random.Random) -> _Found:
    items = uniques(scene, "colour", "shape")
    if len(items) < 2:
        return None
    first, second = rng.sample(items, 2)
    truth = rng.random() < 0.5
    fitting = [relation for relation in RELATIONS if holds(relation, first, second) == truth]
    return relation_question(first, rng.choice(fitting), second), "yes" if truth else "no"


def relation_question(first: SceneObject, relation: str, second: SceneObject) -> str:
    """Whether a relation holds between two objects, in words."""
    return f"is {noun(first, article='the')} {relation} {noun(second, article='the')}?"


def _ask_background(scene: Scene, rng: random.Random) -> _Found:
    return "what color is the background?", scene.background


_ASKERS: dict[str, Callable[[Scene, random.Random], _Found]] = {
    "existence": _ask_existence,
    "count": _ask_count,
    "kind_count": _ask_kind_count,
    "color": _ask_colour,
    "color_at": _ask_colour_at,
    "shape": _ask_shape,
    "shape_at": _ask_shape_at,
    "size": _ask_size,
    "position": _ask_position,
    "relation": _ask_relation,
    "background": _ask_background,
}
TYPES = tuple(_ASKERS)


def answer(question: str, description: str) -> str:
    """The answer to a question, read from a description alone; ValueError for a question of no known type.

    Shows that the full text of a picture answers every question asked of it.
    """
    facts = parse(description)
    for pattern, reader in _ANSWERERS:
        if match := re.fullmatch(pattern, question):
            return reader(match, facts.mentions, str(facts.background))
    raise ValueError(f"not a question of this world: '{question}'")


def _pick(mentions: Sequence[Mention], **said: str | int | None) -> Mention:
    (found,) = [m for m in mentions if all(getattr(m, name) == value for name, value in said.items())]
    return found


def _named(mentions: Sequence[Mention], phrase: str) -> Mention:
    colour, shape = phrase.split()
    return _pick(mentions, colour=colour, shape=shape)


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _answer_kind_count(match: re.Match[str], mentions: Sequence[Mention], background: str) -> str:
    phrase = match[1]
    word = SINGULARS[phrase] if _KINDS[phrase] == "shape" else phrase.split()[0]
    return str(sum(getattr(mention, _KINDS[phrase]) == word for mention in mentions))


def _answer_relation(match: re.Match[str], mentions: Sequence[Mention], background: str) -> str:
    first, second = (_as_object(_named(mentions, match[i])) for i in (1, 3))
    return _yes(holds(match[2], first, second))


def _as_object(mention: Mention) -> SceneObject:
    """An object with the mention's cell; relations look at nothing else."""
    assert mention.cell is not None
    return SceneObject(
        str(mention.shape), str(mention.colour), str(mention.size), mention.cell, 0.0, 0.0, 0.0, 0.0
    )


_ANSWERERS: tuple[tuple[str, Callable[[re.Match[str], Sequence[Mention], str], str]], ...] = (
    (r"what color is the background\?", lambda m, items, background: background),
    (r"how many objects are there\?", lambda m, items, _: str(len(items))),
    (r"how many (.+) are there\?", _answer_kind_count),
    (
        r"is there an? (\w+) (\w+)\?",
        lambda m, items, _: _yes(any((i.colour, i.shape) == (m[1], m[2]) for i in items)),
    ),
    (rf"what color is the object ({PLACE_PATTERN})\?", lambda m, items, _: str(_at(items, m[1]).colour)),
    (rf"what shape is the object ({PLACE_PATTERN})\?", lambda m, items, _: str(_at(items, m[1]).shape)),
    (r"what color is the (\w+)\?", lambda m, items, _: str(_pick(items, shape=m[1]).colour)),
    (r"what shape is the (\w+) object\?", lambda m, items, _: str(_pick(items, colour=m[1]).shape)),
    (r"is the (\w+ \w+) small or large\?", lambda m, items, _: str(_named(items, m[1]).size)),
    (r"where is the (\w+ \w+)\?", lambda m, items, _: CELLS[_named(items, m[1]).cell or 0]),
    (rf"is the (\w+ \w+) ({'|'.join(RELATIONS)}) the (\w+ \w+)\?", _answer_relation),
)


def _at(mentions: Sequence[Mention], place: str) -> Mention:
    return _pick(mentions, cell=PLACES.index(place))


def answers() -> list[str]:
    """Every answer there is."""
    return ["yes", "no", *"01234", *COLOURS, *BACKGROUNDS, *SHAPES, *SIZES, *CELLS]


def uniques(scene: Scene, *attributes: str) -> list[SceneObject]:
    """The objects that these attributes tell from all others."""
    keys = [tuple(getattr(item, name) for name in attributes) for item in scene.objects]
    return [item for item, key in zip(scene.objects, keys, strict=True) if keys.count(key) == 1]


def _unique(scene: Scene, rng: random.Random, *attributes: str) -> SceneObject | None:
    items = uniques(scene, *attributes)
    return rng.choice(items) if items else None


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"

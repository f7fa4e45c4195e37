"""What the world's language models are taught: a description, and what can be said when one has read it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lavis_lite.worlds.shapes.captions import STYLES, caption, describe
from lavis_lite.worlds.shapes.questions import TYPES, ask, relation_question, uniques
from lavis_lite.worlds.shapes.scene import CELLS, Scene, SceneObject
from lavis_lite.worlds.shapes.words import PLACES, RELATIONS, holds, join, noun

# How often a reply is drawn, per reply wanted, before a document does with fewer.
MAX_DRAWS = 3
# The exact prompts of BLIP-2's question answering, in lower case.
QUESTION_PROMPTS = ("question: {} answer:", "question: {} short answer:")
DESCRIBE_PROMPT = "describe:"
# After a question about two objects, instead of its answer: where are they, and which relations hold?
PAIR_PROMPTS = {"where": "question: {} where:", "what": "question: {} what:"}
# Joins words that share one place of the input, see `_slots`.
BLEND = "+"
CAPTION_PROMPTS = ("", "a photo of", "a picture of", "caption:")
_CAPTION_WEIGHTS = (3, 5, 1, 1)
# What a reply is about, and how often it is so.
REPLY_WEIGHTS = {"answer": 10, "object": 5, "caption": 3, "description": 2, "pair": 0}
# Types that need several facts of the description at once are the ones learned last.
TYPE_WEIGHTS = {kind: 3 if kind in ("relation", "kind_count", "existence") else 1 for kind in TYPES}


@dataclass(frozen=True)
class Reply:
    """A prompt, the text that should follow it, and what it is: one of `REPLY_WEIGHTS`."""

    prompt: str
    text: str
    kind: str


@dataclass(frozen=True)
class Document:
    """A picture's facts in words ("" for none) and replies that they determine."""

    context: str
    replies: tuple[Reply, ...]


def document(
    scene: Scene,
    rng: random.Random,
    *,
    replies: int,
    contexts: Mapping[str, float],
    reply_weights: Mapping[str, float] = REPLY_WEIGHTS,
    type_weights: Mapping[str, float] = TYPE_WEIGHTS,
) -> Document:
    """A document about a scene with so many replies, or fewer where there is little to say.

    The objects are told in any order, and all replies keep to it: what is learned is to read the context,
    not to sort it. Without a context the replies are captions, as nothing else can be known.

    Args:
        contexts: how often each form of `CONTEXTS` is taken, or none at all ("none").
        reply_weights: how often a reply is of each kind.
        type_weights: how often each type of question is asked, where the scene allows it; where it allows none, a
            caption takes the place of the answer.
    """
    if rng.random() < 0.5:
        scene = replace(scene, objects=tuple(rng.sample(scene.objects, len(scene.objects))))
    form = rng.choices(list(contexts), list(contexts.values()))[0]
    told = "" if form == "none" else CONTEXTS[form](scene, rng)
    # A reply that comes again could be copied from above: it teaches nothing about the context.
    chosen: dict[Reply, None] = {}
    for _ in range(MAX_DRAWS * replies):
        if len(chosen) < replies:
            reply = _reply(scene, rng, reply_weights, type_weights) if told else _caption(scene, rng)
            chosen[reply] = None
    return Document(told, tuple(chosen))


def question_prompt(question: str, rng: random.Random) -> str:
    """The question in one of the two prompts."""
    return rng.choice(QUESTION_PROMPTS).format(question)


def _reply(
    scene: Scene, rng: random.Random, reply_weights: Mapping[str, float], type_weights: Mapping[str, float]
) -> Reply:
    kind = rng.choices(list(reply_weights), list(reply_weights.values()))[0]
    if kind == "caption":
        return _caption(scene, rng)
    if kind == "description":
        return Reply(DESCRIBE_PROMPT, describe(scene), kind)
    if kind == "object":
        return _object(scene, rng)
    if kind == "pair" and len(distinct := uniques(scene, "colour", "shape")) > 1:
        return _pair(distinct, rng)
    return _answer(scene, rng, type_weights) or _caption(scene, rng)


def _answer(scene: Scene, rng: random.Random, type_weights: Mapping[str, float]) -> Reply | None:
    """A question of a drawn type with its answer; None where the scene allows no type that is ever drawn."""
    left = {kind: weight for kind, weight in type_weights.items() if weight > 0}
    while left:
        kind = rng.choices(list(left), list(left.values()))[0]
        if question := ask(scene, kind, rng):
            return Reply(question_prompt(question.text, rng), question.answer, "answer")
        del left[kind]
    return None


def _pair(items: Sequence[SceneObject], rng: random.Random) -> Reply:
    """The two places that a relation compares, or the relations that hold: the steps on the way to its answer."""
    first, second = rng.sample(items, 2)
    question = relation_question(first, rng.choice(RELATIONS), second)
    asked = rng.choice(list(PAIR_PROMPTS))
    told = [relation for relation in RELATIONS if holds(relation, first, second)]
    if asked == "where":
        told = [CELLS[first.cell], CELLS[second.cell]]
    return Reply(PAIR_PROMPTS[asked].format(question), ", ".join(told), "pair")


def _object(scene: Scene, rng: random.Random) -> Reply:
    """All about one object, found by what tells it from the others: "the ring is a small red ring at the top"."""
    item = rng.choice(scene.objects)
    names = [f"object {PLACES[item.cell]}"]
    others = [other for other in scene.objects if other is not item]
    if all(other.shape != item.shape for other in others):
        names.append(item.shape)
    if all(other.colour != item.colour for other in others):
        names.append(f"{item.colour} object")
    if all((other.colour, other.shape) != (item.colour, item.shape) for other in others):
        names.append(noun(item, article=""))
    return Reply(f"the {rng.choice(names)} is", f"{noun(item, size=True)} {PLACES[item.cell]}", "object")


def _caption(scene: Scene, rng: random.Random) -> Reply:
    prompt = rng.choices(CAPTION_PROMPTS, _CAPTION_WEIGHTS)[0]
    return Reply(prompt, caption(scene, rng.choice(STYLES), rng), "caption")


def _full(scene: Scene, rng: random.Random) -> str:
    return describe(scene)


def _plain(scene: Scene, rng: random.Random) -> str:
    """The same facts without the opening words."""
    items = join([f"{noun(item, size=True)} {PLACES[item.cell]}" for item in scene.objects])
    return f"{items} on a {scene.background} background"


def _terse(scene: Scene, rng: random.Random) -> str:
    """Only the words that carry a fact: "gray: large red star top left, small blue ring center"."""
    return f"{scene.background}: {', '.join(' '.join(_facts(item)) for item in scene.objects)}"


def _loose(scene: Scene, rng: random.Random) -> str:
    """The words of `_terse` with those of each object in any order: visual prompts keep to no grammar."""
    items = [rng.sample(_facts(item), 4) for item in scene.objects]
    return f"{scene.background}: {', '.join(' '.join(words) for words in items)}"


def _facts(item: SceneObject) -> list[str]:
    return [item.size, item.colour, item.shape, CELLS[item.cell]]


def _slots(scene: Scene, rng: random.Random) -> str:
    """Words joined by "+" share one place, as the mean of their embeddings: "gray large+red+star+top+left".

    An object has one place or two. So few visual prompts can hold a scene only if each says several words,
    and a model that never met such a thing can't be talked to that way.
    """
    places = [scene.background]
    for item in scene.objects:
        words = rng.sample(" ".join(_facts(item)).split(), len(" ".join(_facts(item)).split()))
        cut = rng.randint(1, len(words) - 1) if rng.random() < 0.4 else len(words)
        places += [BLEND.join(part) for part in (words[:cut], words[cut:]) if part]
    return " ".join(places)


CONTEXTS = {"full": _full, "plain": _plain, "terse": _terse, "loose": _loose, "slots": _slots}

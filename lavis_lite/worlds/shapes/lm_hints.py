"""What a T5's encoder should know at words of a question, besides what its decoder should answer.

To say whether "the red ring is left of the blue star" two objects have to be found and compared before the first word
of the answer, and one bit of loss says how well that went. Here the encoder is asked where an object is at the word
that names it, and whether a relation holds at the word that begins it: each step is a lesson of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lavis_lite.worlds.shapes.questions import uniques
from lavis_lite.worlds.shapes.scene import CELLS, Scene, SceneObject
from lavis_lite.worlds.shapes.words import RELATIONS, holds

# Classes at a word: none, the cell of the object it names, or whether the relation it begins holds.
FALSE = 1 + len(CELLS)
TRUE = FALSE + 1
CLASSES = TRUE + 1


def hints(words: Sequence[str], scene: Scene) -> Tensor:
    """int64[T]: what is to be known at each of T words of an encoder's input; 0 where nothing is.

    Only in questions, and of objects that colour and shape tell from the others.
    """
    known = {(item.colour, item.shape): item for item in uniques(scene, "colour", "shape")}
    found = torch.zeros(len(words), dtype=torch.long)
    named: SceneObject | None = None
    for index in range(words.index("question") if "question" in words else len(words), len(words)):
        if words[index] == "question":
            named = None  # a new one
        second = _object_at(words, index, known)
        if second is None:
            continue
        found[index] = 1 + second.cell
        if named is not None and (relation := _relation_before(words, index)):
            start = index - 2 - len(relation.split())
            found[start] = TRUE if holds(relation, named, second) else FALSE
        named = second
    return found


def _object_at(
    words: Sequence[str], index: int, known: dict[tuple[str, str], SceneObject]
) -> SceneObject | None:
    """The object that "the <colour> <shape>" names whose last word this is."""
    if index < 2 or words[index - 2] != "the":
        return None
    return known.get((words[index - 1], words[index]))


def _relation_before(words: Sequence[str], index: int) -> str | None:
    """The relation that stands before "the <colour> <shape>"."""
    before = " ".join(words[max(0, index - 4) : index - 2])
    return next((relation for relation in RELATIONS if before.endswith(relation)), None)

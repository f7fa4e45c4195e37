"""Where a question-conditioned Q-Former looked, for two different questions about the same picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lavis_lite.common.errors import InputError
from lavis_lite.common.logging import get_logger
from lavis_lite.tasks.answers import Answered
from lavis_lite.tasks.examples import thumbnail
from lavis_lite.tasks.heat import overlay
from lavis_lite.tasks.heldout import to_device
from lavis_lite.tasks.html import card, cards, picture, section
from lavis_lite.tasks.predictions import evenly

logger = get_logger(__name__)


@dataclass(frozen=True)
class TwoLooks:
    """A picture, and for each of two questions the attention over it (JPEG bytes)."""

    picture: bytes
    asked: tuple[Answered, Answered]
    heat: tuple[bytes, bytes]


def draw_looks(
    model: Any, dataset: Any, rows: Sequence[Answered], loader_args: Any, number: int
) -> list[TwoLooks]:
    """`number` pictures at even distances among those of which two questions of different types were asked.

    model: with `where_queries_look`, in eval mode. dataset: with `image_path`. None are drawn, and a line says why,
    where the encoder's tokens are no square grid.
    """
    try:
        return [
            _look_twice(model, dataset, pair, loader_args)
            for pair in evenly(_same_picture(dataset, rows), number)
        ]
    except InputError as error:
        logger.warning("the report doesn't show where the queries looked: %s", error)
        return []


def _same_picture(dataset: Any, rows: Sequence[Answered]) -> list[tuple[Answered, Answered]]:
    first: dict[str, Answered] = {}
    pairs: dict[str, tuple[Answered, Answered]] = {}
    for item in rows:
        path = dataset.image_path(item.row)
        other = first.setdefault(path, item)
        if path not in pairs and _differ(other, item):
            pairs[path] = (other, item)
    return list(pairs.values())


def _differ(one: Answered, other: Answered) -> bool:
    if one.question_type and other.question_type:
        return one.question_type != other.question_type
    return one.question != other.question


def _look_twice(model: Any, dataset: Any, pair: tuple[Answered, Answered], loader_args: Any) -> TwoLooks:
    batch = to_device(dataset.collate([dataset.load(item.row, seed=0) for item in pair]), loader_args.device)
    with loader_args.autocast():
        weights = model.where_queries_look(batch["image"], batch["text_input"])
    shown = dataset.image(pair[0].row)
    first, second = (overlay(shown, own) for own in weights)
    return TwoLooks(thumbnail(dataset, pair[0].row), pair, (first, second))


def looks_section(looks: Sequence[TwoLooks]) -> str:
    """Each picture beside the two overlays with their questions and answers."""
    note = (
        "Cross-attention of the Q-Former, the mean over queries, heads and blocks, for two questions about the same "
        "picture: the brighter, the more was read there. It shows what was read, not what decided the answer."
    )
    return section("Where the queries looked", cards(_cards(looks)), note=note)


def _cards(looks: Sequence[TwoLooks]) -> list[str]:
    shown = []
    for look in looks:
        number = look.asked[0].question_id
        shown.append(card(picture(look.picture, f"the picture of question {number}"), "<p>as it is</p>"))
        for item, heat in zip(look.asked, look.heat, strict=True):
            described = f"attention over the picture for: {item.question}"
            shown.append(card(picture(heat, described), _told(item)))
    return shown


def _told(item: Answered) -> str:
    return f"<p>{escape(item.question)}</p><h3>{escape(item.prediction) or '(nothing)'}</h3>"

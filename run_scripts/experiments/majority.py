"""What guessing reaches on an embedded world's questions: the majority's answer to each form of question."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from statistics import mean
from typing import Any

from lavis_lite.worlds.shapes.words import COLOUR_PATTERN, SHAPE_PATTERN

NAMES = re.compile(rf"\b({COLOUR_PATTERN}|{SHAPE_PATTERN})\b")


def majority(splits: Mapping[str, Any]) -> dict[str, float]:
    """Test accuracies, "all" and by type, of the answer that training has most often for questions of the same form."""
    told: dict[str, Counter[str]] = {}
    for _, form, answer in asked(splits["train"]):
        told.setdefault(form, Counter())[answer] += 1
    right: dict[str, list[float]] = {}
    for kind, form, answer in asked(splits["test"]):
        right.setdefault(kind, []).append(float(told[form].most_common(1)[0][0] == answer))
    everything = [hit for hits in right.values() for hit in hits]
    return {"all": mean(everything), **{kind: mean(right[kind]) for kind in sorted(right)}}


def asked(dataset: Any) -> list[tuple[str, str, str]]:
    """Type, form (the question without the words that name an object) and answer of every row."""
    questions = (dataset.record(row).question for row in range(len(dataset)))
    return [(str(item.question_type), NAMES.sub("x", item.text), item.answers[0]) for item in questions]

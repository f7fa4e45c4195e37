"""Accuracy of answers against those people gave (Antol et al., 2015; visualqa.org's evaluation)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from lavis_lite.metrics.vqa_text import normalise, one_line, without_punctuation

# See `accuracy`.
Truths = Literal["normalised", "official"]
VOICES = 3  # so many people must agree with an answer for it to be right


def accuracy(prediction: str, answers: Sequence[str], *, truths: Truths = "normalised") -> float:
    """How right an answer is, from 0 to 1, given the answers people gave to the question.

    Of n answers each in turn is left out, the prediction scores min(k / 3, 1) for the k of the others that agree with
    it, and the mean of these counts: with ten answers 1, 2, 3, 4 that agree make 0.3, 0.6, 0.9, 1. Fewer than four
    answers can't make 1; a single one, as in GQA, is right or wrong.

    Args:
        truths: what is done to people's answers. "normalised": the same as to the prediction, see `normalise`.
            "official": what visualqa.org's script does, on which published scores rest: only their punctuation is
            removed, so that "none" never equals a prediction, which becomes "0"; and where all people agree neither
            they nor the prediction is touched, so that "Two" isn't "two". A single answer is always normalised.

    Raises ValueError without an answer.
    """
    if not answers:
        raise ValueError("a question without answers has no accuracy")
    if len(answers) == 1:
        return float(normalise(prediction) == normalise(answers[0]))
    said, given = _compared(prediction, answers, truths)
    agreeing = [said == answer for answer in given]
    total = sum(agreeing)
    return sum(min((total - own) / VOICES, 1.0) for own in agreeing) / len(given)


def _compared(prediction: str, answers: Sequence[str], truths: Truths) -> tuple[str, list[str]]:
    if truths == "normalised":
        return normalise(prediction), [normalise(answer) for answer in answers]
    said, given = one_line(prediction), [one_line(answer) for answer in answers]
    if len(set(given)) == 1:
        return said, given
    return normalise(said), [without_punctuation(answer) for answer in given]


def answer_type(answer: str) -> str:
    """VQAv2's coarse class of an answer, for data that doesn't tell it: "yes/no", "number" or "other"."""
    text = normalise(answer)
    if text in ("yes", "no"):
        return "yes/no"
    return "number" if text.replace(".", "", 1).isdecimal() else "other"


def means_by(values: Iterable[tuple[str, float]]) -> dict[str, tuple[float, int]]:
    """The mean and number of values by their name, most frequent first."""
    groups: dict[str, list[float]] = {}
    for name, value in values:
        groups.setdefault(name, []).append(value)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name: (sum(own) / len(own), len(own)) for name, own in ordered}

"""Accuracy of answers against those people gave (Antol et al., 2015; visualqa.org's evaluation)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from lavis_lite.metrics.lemmas import lemmatise
from lavis_lite.metrics.vqa_text import normalise, one_line, without_punctuation

# See `accuracy`.
Truths = Literal["normalised", "official", "official_later"]
Lemmas: TypeAlias = bool | Literal["prediction"]
VOICES = 3  # so many people must agree with an answer for it to be right


def accuracy(
    prediction: str, answers: Sequence[str], *, truths: Truths = "normalised", lemmatize: Lemmas = False
) -> float:
    """How right an answer is, from 0 to 1, given the answers people gave to the question.

    Of n answers each in turn is left out, the prediction scores min(k / 3, 1) for the k of the others that agree with
    it, and the mean of these counts: with ten answers 1, 2, 3, 4 that agree make 0.3, 0.6, 0.9, 1. Fewer than four
    answers can't make 1; a single one, as in GQA, is right or wrong.

    Args:
        truths: what is done to people's answers. "normalised": the same as to the prediction, see `normalise`.
            "official": what visualqa.org's script did when published scores were measured, and LAVIS's copy does: the
            prediction is normalised; people's answers lose their punctuation where they differ, and nothing where all
            are the same, so that "none" and "Two" never equal a prediction, which becomes "0" and "2".
            "official_later": what that script does since: where people's answers differ both sides are normalised,
            where all are the same neither is. A single answer is always normalised.
        lemmatize: compare dictionary forms of what `truths` leaves: of both sides, or of the prediction alone, where
            people's answers are such forms already, as OK-VQA's.

    Raises ValueError without an answer, ConfigError for `lemmatize` without simplemma.
    """
    if not answers:
        raise ValueError("a question without answers has no accuracy")
    said, given = _compared(prediction, answers, truths)
    if lemmatize:
        said = lemmatise(said)
    if lemmatize is True:
        given = [lemmatise(answer) for answer in given]
    agreeing = [said == answer for answer in given]
    if len(given) == 1:
        return float(agreeing[0])
    total = sum(agreeing)
    return sum(min((total - own) / VOICES, 1.0) for own in agreeing) / len(given)


def _compared(prediction: str, answers: Sequence[str], truths: Truths) -> tuple[str, list[str]]:
    """The prediction and people's answers as they are compared."""
    if truths == "normalised" or len(answers) == 1:
        return normalise(prediction), [normalise(answer) for answer in answers]
    if truths == "official":
        differ = len(set(answers)) > 1
        return normalise(prediction), [without_punctuation(text) if differ else text for text in answers]
    said, given = one_line(prediction), [one_line(answer) for answer in answers]
    if len(set(given)) == 1:
        return said, given
    return normalise(said), [normalise(answer) for answer in given]


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

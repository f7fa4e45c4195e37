"""How people are shown an evaluation of answers: accuracies by type, pictures with question, answer and truth."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lavis_lite.tasks.answers import Answered
from lavis_lite.tasks.examples import thumbnail
from lavis_lite.tasks.html import card, cards, picture, section, table, tick, tiles
from lavis_lite.tasks.predictions import evenly

SCALE = "Papers print 100 times these numbers."
ANSWERS_SHOWN = 4
KINDS = {"answer_type": "answers", "question_type": "questions"}


@dataclass(frozen=True)
class TypeScore:
    """The accuracy of the questions of one type. kind: answer_type or question_type."""

    kind: str
    name: str
    accuracy: float
    count: int

    @property
    def metric(self) -> str:
        """Its name in the log, such as answer_type/yes_no."""
        name = re.sub(r"\W+", "_", self.name.lower()).strip("_")
        return f"{self.kind}/{name}"


@dataclass(frozen=True)
class AnswerExample:
    """A picture (JPEG bytes) with what was asked and answered; accuracy: None without known answers."""

    item: Answered
    accuracy: float | None
    picture: bytes


@dataclass(frozen=True)
class AnswerExamples:
    """Evenly drawn examples, and evenly drawn ones among those answered wrong."""

    even: list[AnswerExample]
    wrong: list[AnswerExample]


def draw_examples(
    rows: Sequence[Answered], accuracies: Sequence[float] | None, dataset: Any, number: int
) -> AnswerExamples:
    """`number` questions at even distances through the split, and half as many that nobody would have answered so."""

    def example(at: int) -> AnswerExample:
        score = accuracies[at] if accuracies is not None else None
        return AnswerExample(rows[at], score, thumbnail(dataset, rows[at].row))

    wrong = [at for at, score in enumerate(accuracies or ()) if score == 0]
    return AnswerExamples(
        [example(at) for at in evenly(range(len(rows)), number)],
        [example(at) for at in evenly(wrong, (number + 1) // 2)],
    )


def accuracy_table(
    metrics: Mapping[str, float], types: Sequence[TypeScore] = ()
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: all questions, then each answer type, then each question type, as far as measured.

    types: the groups with their names and sizes; without them, as in a summary of metrics alone, names are the
    metrics' own and sizes aren't shown.
    """
    known = {score.metric: score for score in types}
    rows = []
    if "accuracy" in metrics:
        rows.append(["all", f"{metrics['accuracy']:.3f}", f"{metrics.get('num_questions', 0):.0f}"])
    for metric, value in metrics.items():
        kind, _, slug = metric.partition("/")
        if kind in KINDS:
            score = known.get(metric)
            name = score.name if score else slug.replace("_", " ")
            rows.append([f"{KINDS[kind]}: {name}", f"{value:.3f}", str(score.count) if score else ""])
    columns = 3 if types else 2
    header = ["accuracy of", "accuracy", "questions"]
    return header[:columns], [row[:columns] for row in rows]


def size_line(metrics: Mapping[str, float]) -> str:
    """How much was evaluated, in words."""
    left_out = int(metrics.get("unreadable_images", 0))
    size = f"{metrics.get('num_questions', 0):.0f} questions"
    return size + (f"; {left_out} with unreadable images left out" if left_out else "")


def scores_section(metrics: Mapping[str, float], types: Sequence[TypeScore]) -> str:
    """Headline accuracies, then all of them as a table."""
    told = [("Accuracy", f"{metrics['accuracy']:.3f}", "of all")] if "accuracy" in metrics else []
    told += [
        (score.name, f"{score.accuracy:.3f}", f"{score.count} questions")
        for score in types
        if score.kind == "answer_type"
    ]
    if "loss" in metrics:
        told.append(("Loss", f"{metrics['loss']:.3f}", "held out"))
    header, rows = accuracy_table(metrics, types)
    note = f"{size_line(metrics)}. {SCALE if rows else 'No answers are known, so none is scored.'}"
    return section("Held-out results", tiles(told) + (table(header, rows) if rows else ""), note=note)


def examples_sections(examples: AnswerExamples) -> list[str]:
    """Pictures with the question, the model's answer in bold, its accuracy, and what people said."""
    note = "The question, the model's answer, and people's. Drawn at even distances through the split."
    if any(example.item.confidence is not None for example in examples.even):
        note += " Confidence is how likely the language model finds the answer, from 0 to 1."
    result = [section("Questions and answers", cards(map(_card, examples.even)), note=note)]
    if examples.wrong:
        note = "Nobody gave these answers. Drawn at even distances through all such questions."
        result.append(section("Mistakes", cards(map(_card, examples.wrong)), note=note))
    return result


def _card(example: AnswerExample) -> str:
    item = example.item
    described = f"picture of question {item.question_id}: {item.question}"
    truths = Counter(item.answers).most_common(ANSWERS_SHOWN)
    listed = "".join(
        f"<li>{escape(text)}{f' ({count} of {len(item.answers)})' if len(item.answers) > 1 else ''}</li>"
        for text, count in truths
    )
    told = [] if example.accuracy is None else [f"accuracy {example.accuracy:.2f}"]
    if item.confidence is not None:
        told.append(f"confidence {item.confidence:.2f}")
    told += [kind for kind in (item.question_type, item.answer_type) if kind]
    right = example.accuracy is not None and example.accuracy >= 0.5
    said = f"<p>{escape(item.question)}</p><h3>{tick(right)}{escape(item.prediction) or '(nothing)'}</h3>"
    note = f'<p class="note">{escape(", ".join(told))}</p>'
    return card(picture(example.picture, described), f"{said}{note}<ol>{listed}</ol>")

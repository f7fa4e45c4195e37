"""The answers that a model gives to the questions of a split, shared out over the ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.logging import get_logger
from lavis_lite.metrics.vqa import answer_type
from lavis_lite.tasks.predictions import predict_rows, write_list
from lavis_lite.tasks.so_far import SoFar

logger = get_logger(__name__)

EXAMPLES = 3  # numbers that a message names


class AnsweringModel(Protocol):
    """What a model must offer to be evaluated on questions; names are LAVIS's."""

    def predict_answers(
        self,
        samples: Mapping[str, Any],
        *,
        num_beams: int,
        inference_method: Literal["generate", "rank"],
        max_len: int,
        min_len: int,
        num_ans_candidates: int,
        answer_list: Sequence[str] | None,
        prompt: str,
        length_penalty: float,
    ) -> list[str]:
        """One answer per image of {"image": float[B, 3, H, W], "text_input": B questions}, or per clip of {"video":
        float[B, F, 3, H, W], ...}."""


@dataclass(frozen=True)
class Answering:
    """How answers are found; the arguments of `predict_answers`."""

    num_beams: int = 5
    inference_method: Literal["generate", "rank"] = "generate"
    max_len: int = 10
    min_len: int = 1
    num_ans_candidates: int = 128
    answer_list: Sequence[str] | None = None
    prompt: str = ""
    length_penalty: float = -1.0


@dataclass(frozen=True)
class Answered:
    """A question's answer beside those people gave, as they stand in its file.

    row: of the dataset. question_id: as its file has it. answers: none where it tells none. answer_type,
    question_type: the file's, else the first by its most frequent answer and the second None. confidence:
    p(prediction), where it was asked for.
    """

    row: int
    question_id: int | str
    image: str
    question: str
    prediction: str
    answers: list[str]
    answer_type: str | None
    question_type: str | None
    confidence: float | None = None


class Said(NamedTuple):
    """An answer, and how likely the model finds it, p(text), where that was asked for."""

    text: str
    confidence: float | None


def answers_of(
    model: Any, samples: Mapping[str, Any], settings: Mapping[str, Any], confidence: bool
) -> list[Said]:
    """A model's answer to each question of a batch.

    Args:
        model: an `AnsweringModel`. settings: of its `predict_answers`.

    Raises ConfigError for `confidence` of a model without `predict_answers_with_scores`.
    """
    if not confidence:
        return [Said(text, None) for text in model.predict_answers(samples, **settings)]
    check_confidence(model)
    found = model.predict_answers_with_scores(samples, **settings)
    return [Said(*pair) for pair in zip(found.texts, found.confidences, strict=True)]


def check_confidence(model: Any) -> None:
    """Raise ConfigError for a model that doesn't tell how likely its answers are."""
    if not hasattr(model, "predict_answers_with_scores"):
        raise ConfigError(f"confidence: model {type(model).__name__} doesn't tell how likely its answers are")


def ask_questions(
    model: AnsweringModel,
    dataset: Any,
    rows: Sequence[int],
    answering: Answering,
    loader_args: Any,
    so_far: SoFar,
    *,
    confidence: bool = False,
) -> list[Answered]:
    """Answers to the rows whose picture can be read, in their order; the same on every rank.

    Raises ConfigError as `answers_of`.
    """
    settings = {name: getattr(answering, name) for name in Answering.__dataclass_fields__}

    def say(visual: Mapping[str, Tensor], batch: Mapping[str, Any]) -> list[Said]:
        return answers_of(model, {**visual, "text_input": batch["text_input"]}, settings, confidence)

    def keep(answers: Sequence[tuple[int, Said]]) -> None:
        so_far.add(_prediction(_answered(dataset, row, said)) for row, said in answers)

    predictions = predict_rows(dataset, rows, loader_args, say, keep)
    return [_answered(dataset, row, said) for row, said in predictions.items()]


def _answered(dataset: Any, row: int, said: Said) -> Answered:
    record = dataset.record(row)
    asked = record.question
    kind = asked.answer_type
    if kind is None and asked.answers:
        # Of equally frequent ones the first.
        kind = answer_type(max(asked.answers, key=asked.answers.count))
    return Answered(
        row,
        json.loads(asked.id),
        record.image,
        asked.text,
        said.text,
        asked.answers,
        kind,
        asked.question_type,
        said.confidence,
    )


def write_predictions(path: Path, rows: Sequence[Answered]) -> None:
    """Write what was asked, answered and true, one object a question, with the answer's confidence where known."""
    write_list(path, [_prediction(item) for item in rows])


def _prediction(item: Answered) -> dict[str, Any]:
    left_out = {"row"} if item.confidence is not None else {"row", "confidence"}
    return {key: value for key, value in asdict(item).items() if key not in left_out}


def write_results(path: Path, rows: Sequence[Answered], dataset: Any, asked: Sequence[int]) -> None:
    """Write the file that VQAv2's evaluation server takes: [{"question_id": 42, "answer": "red"}, ...].

    asked: the rows that were to be answered. The server refuses a file that leaves a question out, so those without an
    answer, whose picture can't be read, get "" and a line in the log.
    """
    results = [{"question_id": item.question_id, "answer": item.prediction} for item in rows]
    answered = {item.row for item in rows}
    silent = [dataset.record(row).question for row in asked if row not in answered]
    numbers = [json.loads(question.id) for question in silent if question is not None]
    if numbers:
        shown = ", ".join(map(str, numbers[:EXAMPLES]))
        logger.warning(
            '%s: "" stands for the answers to %d questions whose picture can\'t be read, for example %s',
            path,
            len(numbers),
            shown,
        )
    write_list(path, [*results, *({"question_id": number, "answer": ""} for number in numbers)])


def read_answer_list(path: str, *, where: str = "task.answer_list") -> list[str]:
    """A closed list from a file: json with a list (or an object, whose keys are taken), else an answer a line.

    where: what names the file, for messages. Raises DataError when it can't be read or holds none, ConfigError as
    `clean_answers`.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: can't read {file}: {error}") from error
    found = clean_answers(content, where=where) if isinstance(content, (list, dict)) else []
    if not found:
        raise DataError(f"{where}: {file} holds no answers; give a list of texts, or one a line")
    return found


def clean_answers(answers: Iterable[object], *, where: str = "task.answer_list") -> list[str]:
    """A closed list as texts without blanks at their ends, none of them empty, each once; numbers as they are written.

    Raises ConfigError for what is neither text nor number.
    """
    texts = []
    for answer in answers:
        if isinstance(answer, bool):
            raise ConfigError(
                f"{where}: {str(answer).lower()} is a truth value, as YAML reads yes and no; "
                'write "yes" and "no", in quotes'
            )
        if not isinstance(answer, (str, int, float)):
            raise ConfigError(f"{where}: an answer must be a text or a number, got {answer!r:.60}")
        texts.append(str(answer).strip())
    return list(dict.fromkeys(text for text in texts if text))

"""Evaluation of visual question answering: an answer to every held-out question, scored against people's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lavis_lite.common import dist
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.logging import get_logger
from lavis_lite.common.registry import registry
from lavis_lite.metrics.lemmas import lemmatise
from lavis_lite.metrics.vqa import VOICES, Lemmas, Truths, accuracy, means_by
from lavis_lite.tasks.answers import (
    Answered,
    Answering,
    ask_questions,
    check_confidence,
    clean_answers,
    read_answer_list,
    write_predictions,
    write_results,
)
from lavis_lite.tasks.base import BaseTask, EvalArgs, Evaluation, RunFacts
from lavis_lite.tasks.heldout import evaluating
from lavis_lite.tasks.predictions import evenly
from lavis_lite.tasks.so_far import keeping_predictions
from lavis_lite.tasks.summary import loss_table, table_lines
from lavis_lite.tasks.vqa_looks import TwoLooks, draw_looks, looks_section
from lavis_lite.tasks.vqa_report import (
    SCALE,
    AnswerExamples,
    TypeScore,
    accuracy_table,
    draw_examples,
    examples_sections,
    scores_section,
    size_line,
)

logger = get_logger(__name__)

LOOKS = 4  # pictures of which the report shows where the queries looked


@dataclass(frozen=True)
class AnswerDetails:
    """rows: every answered question. predictions: the file they are in, None where there was no folder. looks: where a
    Q-Former that reads questions looked."""

    rows: list[Answered]
    predictions: Path | None
    types: list[TypeScore]
    examples: AnswerExamples | None
    looks: list[TwoLooks]


@registry.register_task("vqa")
class VqaTask(BaseTask):
    """Answers to all questions of a split as in the paper's section 4.1, and their accuracy.

    Before anything is scored two files are written to the run's folder: `predictions_<split>.json` with question,
    answer and truth, and `results_<split>.json`, which VQAv2's evaluation server takes: with "" for the answers to
    questions whose picture can't be read, which nothing else counts. Of an evaluation that is ended before, the answers
    so far are in `predictions_<split>.part<rank>.jsonl`. Ground truth are the annotations' own answers; a split without
    any is answered, not scored.

    prompt: what asks a question, with {} in its place; empty for the model's own.
    inference_method: generate, or rank a closed list. answer_list: that list, or a file with it: json, or an answer a
        line. num_ans_candidates: of the list, so many with the likeliest first token are scored whole.
    num_beams, max_len, min_len, length_penalty: of generated answers, in new tokens.
    truths: what is done to people's answers before they are compared: see `metrics.vqa.accuracy`.
    lemmatize: compare words by their dictionary forms ("dogs" and "dog" agree), of both sides, or of the `prediction`
        alone where people's are such already; the files keep what was said.
    confidence: tell p(answer) by the language model, from 0 to 1, in predictions_<split>.json and the report.
    questions_in_training: so many questions, evenly drawn, are asked in mid-training; null for all.
    num_examples: questions that the report shows with picture, answer and truth.
    loss_batch_size, loss_batches, seed: see `BaseTask`.

    Metrics: loss (held out, of a model whose own prompt takes questions); accuracy; answer_type/<type> and
    question_type/<type> where the dataset has them: papers print 100 times these; num_questions, unreadable_images.
    """

    def __init__(
        self,
        *,
        prompt: str = "",
        inference_method: Literal["generate", "rank"] = "generate",
        answer_list: Sequence[Any] | str | None = None,
        num_ans_candidates: int = 128,
        num_beams: int = 5,
        max_len: int = 10,
        min_len: int = 1,
        length_penalty: float = -1.0,
        truths: Truths = "normalised",
        lemmatize: Lemmas = False,
        confidence: bool = False,
        questions_in_training: int | None = None,
        num_examples: int = 12,
        loss_batch_size: int = 64,
        loss_batches: int = 16,
        seed: int = 42,
    ) -> None:
        super().__init__(loss_batch_size=loss_batch_size, loss_batches=loss_batches, seed=seed)
        if prompt and "{}" not in prompt:
            raise ConfigError(
                f"task.prompt: '{prompt}' has no {{}}, the question's place: 'Question: {{}} Answer:'"
            )
        if not 0 <= min_len <= max_len or max_len < 1 or num_beams < 1:
            raise ConfigError(
                "task: an answer needs num_beams and max_len of at least 1, and min_len from 0 to max_len; got "
                f"{num_beams}, {max_len} and {min_len}"
            )
        if num_ans_candidates < 1:
            raise ConfigError(f"task.num_ans_candidates must be at least 1, got {num_ans_candidates}")
        if questions_in_training is not None and questions_in_training < 1:
            raise ConfigError(
                f"task.questions_in_training must be at least 1 or null, got {questions_in_training}"
            )
        if (inference_method == "rank") != (answer_list is not None):
            raise ConfigError(
                "task.answer_list: the list that task.inference_method=rank chooses from; set both or neither"
            )
        answers = _closed_list(answer_list)
        self.answering = Answering(
            num_beams, inference_method, max_len, min_len, num_ans_candidates, answers, prompt, length_penalty
        )
        self.truths = truths
        self.lemmatize = lemmatize
        if lemmatize:
            lemmatise("")  # a library that is missing is better told now than after hours
        self.confidence = confidence
        self.questions_in_training = questions_in_training
        self.num_examples = num_examples
        self._warned_of_few = False

    def check_fit(self, model: Any, dataset: Any) -> None:
        """Raise ConfigError for a model that can't answer, or not tell its confidence where that is asked for, and for
        rows without questions or of which it can't compute the loss."""
        if not hasattr(model, "predict_answers"):
            raise ConfigError(
                f"task vqa: model {type(model).__name__} doesn't answer questions; use a stage-2 model, such as "
                "model.arch=blip2_opt"
            )
        if self.confidence:
            check_confidence(model)
        if not hasattr(dataset, "answered"):
            raise ConfigError(
                f"task vqa: dataset '{dataset.name}' has no questions; use `builder: vqa`, or leave it out of the "
                f"evaluation with datasets.{dataset.name}.<split>=null"
            )
        if _has_loss(model, dataset):
            self.check_losses(model, dataset)

    def evaluate(self, model: Any, dataset: Any, *, loader_args: EvalArgs, final: bool = True) -> Evaluation:
        """Answers and accuracies of one split; see the class for the metrics.

        model: an `AnsweringModel`. dataset: of questions, as `QuestionDataset`.
        Raises ConfigError as `check_fit`, DataError without a readable image.
        """
        self.check_fit(model, dataset)
        metrics = self.losses(model, dataset, loader_args) if _has_loss(model, dataset) else {}
        chosen = self._rows(len(dataset), final)
        path = loader_args.folder / f"predictions_{loader_args.label}.json" if loader_args.folder else None
        with keeping_predictions(loader_args) as so_far:
            with evaluating(model):
                rows = ask_questions(
                    model, dataset, chosen, self.answering, loader_args, so_far, confidence=self.confidence
                )
            if rows and dist.is_main() and loader_args.folder is not None and path is not None:
                write_predictions(path, rows)
                results = loader_args.folder / f"results_{loader_args.label}.json"
                write_results(results, rows, dataset, chosen)
        if not rows:
            raise DataError(f"dataset '{dataset.name}' has no question to answer")
        metrics["num_questions"] = float(len(rows))
        metrics["unreadable_images"] = float(len(chosen) - len(rows))
        # Every rank has all rows, and the same ones.
        accuracies = self._accuracies(rows)
        types = type_scores(rows, accuracies) if accuracies else []
        if accuracies:
            metrics["accuracy"] = sum(accuracies) / len(accuracies)
        metrics |= {score.metric: score.accuracy for score in types}
        if not dist.is_main():
            return Evaluation(metrics)
        shown, looks = None, []
        if final and self.num_examples:
            shown = draw_examples(rows, accuracies, dataset, self.num_examples)
            if getattr(model, "qformer_text_input", False) and getattr(dataset, "visual", "image") == "image":
                with evaluating(model):
                    looks = draw_looks(model, dataset, rows, loader_args, LOOKS)
        return Evaluation(metrics, AnswerDetails(rows, path, types, shown, looks))

    def _rows(self, total: int, final: bool) -> list[int]:
        limit = self.questions_in_training
        return evenly(range(total), total if final or limit is None else limit)

    def _accuracies(self, rows: Sequence[Answered]) -> list[float] | None:
        """Of each answer; None, with a line in the log, where not all questions have known answers."""
        without = sum(not item.answers for item in rows)
        if without:
            logger.info("%d of %d questions have no known answers: nothing is scored", without, len(rows))
            return None
        self._warn_of_few_answers(rows)
        return [
            accuracy(item.prediction, item.answers, truths=self.truths, lemmatize=self.lemmatize)
            for item in rows
        ]

    def _warn_of_few_answers(self, rows: Sequence[Answered]) -> None:
        """A line in the log, once a run, where the measure itself keeps right answers from scoring 1."""
        few = sum(1 < len(item.answers) <= VOICES for item in rows)
        if few and not self._warned_of_few and dist.is_main():
            self._warned_of_few = True
            logger.warning(
                "%d of %d questions have 2 or 3 answers, of which even a right one scores at most 1/3 or 2/3: give one "
                "answer, or four and more (docs/vqa.md)",
                few,
                len(rows),
            )

    def metric_lines(self, metrics: Mapping[str, float]) -> list[str]:
        """Held-out loss, then the accuracy of all questions and of each type."""
        tables = [loss_table(metrics), accuracy_table(metrics)]
        lines = [line for header, rows in tables if rows for line in [*table_lines(header, rows), ""]]
        return [*lines, f"{size_line(metrics)}. {SCALE}"]

    def summary(self, evaluation: Evaluation | None, facts: RunFacts) -> list[str]:
        """The lines at a run's end, with the file of answers among the run's."""
        details = evaluation.details if evaluation else None
        if isinstance(details, AnswerDetails) and details.predictions and facts.files:
            facts = replace(facts, files={"answers": details.predictions, **facts.files})
        return super().summary(evaluation, facts)

    def report_sections(self, evaluation: Evaluation) -> list[str]:
        """Accuracies, then pictures with question, answer and truth."""
        details = evaluation.details
        if not isinstance(details, AnswerDetails):
            return [scores_section(evaluation.metrics, [])]
        shown = examples_sections(details.examples) if details.examples else []
        looks = [looks_section(details.looks)] if details.looks else []
        return [scores_section(evaluation.metrics, details.types), *shown, *looks]


def _has_loss(model: Any, dataset: Any) -> bool:
    """Whether there are answers, and a model that learns them: the prompt of a zero-shot one may take no question."""
    return bool(dataset.answered) and bool(getattr(model, "takes_questions", True))


def _closed_list(given: Sequence[Any] | str | None) -> list[str] | None:
    """The answers of a list, or of the file with that name."""
    if given is None or isinstance(given, str):
        return None if given is None else read_answer_list(given)
    answers = clean_answers(given)
    if not answers:
        raise ConfigError("task.answer_list is empty; name the answers to choose from, or a file with them")
    return answers


def type_scores(rows: Sequence[Answered], accuracies: Sequence[float]) -> list[TypeScore]:
    """The accuracy of each answer type and of each question type, the most frequent first."""
    scored = list(zip(rows, accuracies, strict=True))
    kinds = {
        "answer_type": [(item.answer_type, value) for item, value in scored],
        "question_type": [(item.question_type, value) for item, value in scored],
    }
    return [
        TypeScore(kind, name, mean, count)
        for kind, values in kinds.items()
        for name, (mean, count) in means_by((name, value) for name, value in values if name).items()
    ]

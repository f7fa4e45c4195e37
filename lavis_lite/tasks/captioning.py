"""Evaluation of captioning: a caption for every held-out image, scored against those people wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lavis_lite.common import dist
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.logging import get_logger
from lavis_lite.common.registry import registry
from lavis_lite.metrics.coco_caption import METRICS, QUICK_METRICS, Metric, score_by_group
from lavis_lite.tasks.base import BaseTask, EvalArgs, Evaluation, RunFacts
from lavis_lite.tasks.caption_report import (
    COLUMNS,
    SCALE,
    CaptionExamples,
    caption_table,
    draw_examples,
    examples_sections,
    scores_section,
    size_line,
)
from lavis_lite.tasks.captions import Captioned, Decoding, caption_images, join_images, write_predictions
from lavis_lite.tasks.heldout import evaluating
from lavis_lite.tasks.predictions import evenly
from lavis_lite.tasks.so_far import keeping_predictions
from lavis_lite.tasks.summary import loss_table, table_lines

logger = get_logger(__name__)


@dataclass(frozen=True)
class CaptionDetails:
    """rows: every captioned image. predictions: the file they are in, None where there was no folder."""

    rows: list[Captioned]
    predictions: Path | None
    examples: CaptionExamples | None


@registry.register_task("captioning")
class CaptioningTask(BaseTask):
    """Captions of all images of a split by beam search as in the paper's section 4.2, and their scores.

    The captions are written to `predictions_<split>.json` in the run's folder, in COCO's results format,
    before any score is computed. Ground truth are the annotations' own captions, not what the text processor
    makes of them for training. A metric that can't be computed is left out with a line in the log.

    prompt: what the captions continue, for models that take one. num_beams: 1 is greedy.
    max_new_tokens, min_length: of a caption, without the prompt.
    metrics: computed at the end of a run; meteor and spice need Java. metrics_in_training: computed before.
    images_in_training: so many images, evenly drawn, are captioned in mid-training; null for all.
    num_examples: images that the report shows with their captions.
    loss_batch_size, loss_batches, seed: see `BaseTask`.

    Metrics: loss (held out); cider, bleu_1 to bleu_4, rouge_l, meteor, spice, raw: papers print 100 times
    these; where the dataset has groups, the same for each, as cider_in_domain; num_images, num_references,
    unreadable_images.
    """

    columns: ClassVar[Mapping[str, str]] = COLUMNS

    def __init__(
        self,
        *,
        prompt: str = "a photo of",
        num_beams: int = 5,
        max_new_tokens: int = 30,
        min_length: int = 8,
        metrics: Sequence[Metric] = METRICS,
        metrics_in_training: Sequence[Metric] = QUICK_METRICS,
        images_in_training: int | None = None,
        num_examples: int = 8,
        loss_batch_size: int = 64,
        loss_batches: int = 16,
        seed: int = 42,
    ) -> None:
        super().__init__(loss_batch_size=loss_batch_size, loss_batches=loss_batches, seed=seed)
        if not 0 <= min_length <= max_new_tokens or max_new_tokens < 1 or num_beams < 1:
            raise ConfigError(
                "task: a caption needs num_beams and max_new_tokens of at least 1, and min_length from 0 to "
                f"max_new_tokens; got {num_beams}, {max_new_tokens} and {min_length}"
            )
        if images_in_training is not None and images_in_training < 1:
            raise ConfigError(f"task.images_in_training must be at least 1 or null, got {images_in_training}")
        self.decoding = Decoding(prompt, num_beams, max_new_tokens, min_length)
        self.metrics = metrics
        self.metrics_in_training = metrics_in_training
        self.images_in_training = images_in_training
        self.num_examples = num_examples

    def check_fit(self, model: Any, dataset: Any) -> None:
        """Raise ConfigError for a model that can't generate, and for rows without captions or of which it can't compute
        the loss."""
        if not hasattr(model, "generate"):
            raise ConfigError(f"task captioning: model {type(model).__name__} doesn't generate texts")
        if getattr(dataset, "texts", None) == "questions":
            raise ConfigError(
                f"task captioning: dataset '{dataset.name}' has questions and no captions; set task.name=vqa, or leave "
                f"it out of the evaluation with datasets.{dataset.name}.<split>=null"
            )
        self.check_losses(model, dataset)

    def evaluate(self, model: Any, dataset: Any, *, loader_args: EvalArgs, final: bool = True) -> Evaluation:
        """Captions and scores of one split; see the class for the metrics.

        model: a `CaptioningModel`. dataset: with `record(row)`, as `ImageTextDataset`.
        Raises ConfigError as `check_fit`, DataError without a readable image.
        """
        self.check_fit(model, dataset)
        metrics = self.losses(model, dataset, loader_args)
        chosen = self._rows(len(dataset), final)
        path = loader_args.folder / f"predictions_{loader_args.label}.json" if loader_args.folder else None
        with keeping_predictions(loader_args) as so_far:
            with evaluating(model):
                captioned = caption_images(model, dataset, chosen, self.decoding, loader_args, so_far)
            rows = join_images(captioned)
            if rows and dist.is_main() and path is not None:
                write_predictions(path, rows)
        if not rows:
            raise DataError(f"dataset '{dataset.name}' has no image to caption")
        scores: dict[str, float] = {}
        if dist.is_main():
            scores = self.scores(rows, dataset, final=final)
        metrics |= dist.broadcast_object(scores)
        metrics["num_images"] = float(len(rows))
        metrics["num_references"] = float(sum(len(item.references) for item in rows))
        metrics["unreadable_images"] = float(len(chosen) - len(captioned))
        if not dist.is_main():
            return Evaluation(metrics)
        shown = draw_examples(rows, dataset, self.num_examples) if final and self.num_examples else None
        return Evaluation(metrics, CaptionDetails(rows, path, shown))

    def _rows(self, total: int, final: bool) -> list[int]:
        limit = self.images_in_training
        return evenly(range(total), total if final or limit is None else limit)

    def scores(self, rows: Sequence[Captioned], dataset: Any, *, final: bool) -> dict[str, float]:
        """The scores of captions; called on the main process only."""
        return score_by_group(
            [item.prediction for item in rows],
            [item.references for item in rows],
            [item.group for item in rows],
            self.metrics if final else self.metrics_in_training,
        )

    def metric_lines(self, metrics: Mapping[str, float]) -> list[str]:
        """Held-out loss, then the scores of all images and of each group."""
        tables = [loss_table(metrics), caption_table(metrics, self.columns)]
        lines = [line for header, rows in tables if rows for line in [*table_lines(header, rows), ""]]
        return [*lines, f"{size_line(metrics)}. {SCALE}"]

    def summary(self, evaluation: Evaluation | None, facts: RunFacts) -> list[str]:
        """The lines at a run's end, with the file of captions among the run's."""
        details = evaluation.details if evaluation else None
        if isinstance(details, CaptionDetails) and details.predictions and facts.files:
            facts = replace(facts, files={"captions": details.predictions, **facts.files})
        return super().summary(evaluation, facts)

    def report_sections(self, evaluation: Evaluation) -> list[str]:
        """Scores, then pictures with captions and references."""
        details = evaluation.details
        examples = details.examples if isinstance(details, CaptionDetails) else None
        shown = examples_sections(examples) if examples else []
        return [scores_section(evaluation.metrics, self.columns), *shown]

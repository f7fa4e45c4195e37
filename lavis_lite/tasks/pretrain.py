"""Evaluation of vision-language representation learning: held-out losses, and retrieval by ITC and by ITM."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lavis_lite.common import dist
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.metrics.retrieval import (
    chance_recall,
    ranks,
    relevant_images,
    relevant_texts,
    reranked_ranks,
    retrieval_metrics,
)
from lavis_lite.tasks.base import BaseTask, EvalArgs, Evaluation
from lavis_lite.tasks.examples import Examples, draw_examples
from lavis_lite.tasks.gallery import ENCODING, MATCHING, Gallery, encode_gallery
from lavis_lite.tasks.heldout import evaluating
from lavis_lite.tasks.rerank import FORMS, Matches, match_candidates, pair_scores
from lavis_lite.tasks.summary import RECALLS, loss_table, retrieval_table, table_lines


@dataclass(frozen=True)
class RetrievalDetails:
    """What a retrieval evaluation was computed from, for reports and experiments.

    relevant: bool[N, M], the right texts of each image. matches: None without re-ranking.
    """

    gallery: Gallery
    relevant: Tensor
    matches: Matches | None
    examples: Examples | None


@dataclass
class _Rankings:
    """Ranks of the right answers both ways, and each query's first answers."""

    text_ranks: Tensor
    image_ranks: Tensor
    first_texts: Tensor
    first_images: Tensor


@registry.register_task("image_text_pretrain")
@registry.register_task("retrieval")
class ImageTextPretrainTask(BaseTask):
    """Stage 1 and retrieval fine-tuning: losses on held-out batches, retrieval over a split's images and captions.

    Retrieval is by ITC first. The first k_test candidates of every image and of every caption are then put
    in the order of the ITM head's score; the others stay behind them as they were (paper, section 4.4).

    k_test: candidates at the end of a run. k_test_in_training: candidates in mid-training, 0 for none.
    rerank: the form of the score, see `lavis_lite.tasks.rerank`; "none" leaves re-ranking out.
    itm_weight: of the ITM head in the form "sum", above 0.
    num_examples: images, and captions, that the report shows with their first answers.
    loss_batch_size, loss_batches, seed: see `BaseTask`.

    Metrics: loss, loss_itc, loss_itm, loss_itg, itm_acc; itc/ and rerank/ before tr_r1, tr_r5, tr_r10
    (image to text), ir_r1, ir_r5, ir_r10 (text to image), r1_mean, tr_mean_rank, ir_mean_rank; chance_ and, for
    the forms that weren't asked for, rerank_<form>/ before the recalls; num_images, num_texts, unreadable_images.
    """

    def __init__(
        self,
        *,
        k_test: int = 128,
        k_test_in_training: int = 0,
        rerank: Literal["sum", "itm", "lavis", "none"] = "sum",
        itm_weight: float = 1.0,
        num_examples: int = 6,
        loss_batch_size: int = 64,
        loss_batches: int = 16,
        seed: int = 42,
    ) -> None:
        super().__init__(loss_batch_size=loss_batch_size, loss_batches=loss_batches, seed=seed)
        self.k_test = k_test
        self.k_test_in_training = k_test_in_training
        if itm_weight <= 0:
            raise ConfigError(
                f"task.itm_weight: must be above 0, got {itm_weight}; task.rerank: none for ITC alone"
            )
        self.rerank = rerank
        self.itm_weight = itm_weight
        self.num_examples = num_examples

    def check_fit(self, model: Any, dataset: Any) -> None:
        """Raise ConfigError for a model without features of images and texts to compare, or where it is re-ranked
        without a matching head, and for rows of which it can't compute the losses."""
        reranks = self.rerank != "none" and max(self.k_test, self.k_test_in_training) > 0
        needed = (*ENCODING, *MATCHING) if reranks else ENCODING
        lacking = next((name for name in needed if not hasattr(model, name)), None)
        if lacking is not None:
            raise ConfigError(
                f"task retrieval: model {type(model).__name__} doesn't match pictures with texts (it has no "
                f"`{lacking}`); use a stage-1 model, such as model.arch=blip2, or task.name=captioning or vqa"
            )
        self.check_losses(model, dataset)

    def evaluate(self, model: Any, dataset: Any, *, loader_args: EvalArgs, final: bool = True) -> Evaluation:
        """Losses and retrieval on one split; see the class for the metrics.

        model: a `MatchingModel`. dataset: rows are images, `captions(row)` gives their texts.
        Raises ConfigError as `check_fit`, DataError when the split has no readable image or no caption.
        """
        self.check_fit(model, dataset)
        metrics = self.losses(model, dataset, loader_args)
        k = self.k_test if final else self.k_test_in_training
        with evaluating(model):
            rerank = self.rerank != "none" and k > 0
            gallery = encode_gallery(model, dataset, loader_args, keep_features=rerank)
            matches = match_candidates(model, gallery, k, loader_args) if rerank else None
        relevant = relevant_texts(gallery.texts, gallery.image_of_text, len(gallery.rows))
        rankings = _rank_by_similarity(gallery, relevant)
        metrics |= _named("itc/", retrieval_metrics(rankings.text_ranks, rankings.image_ranks))
        if matches is not None:
            by_form = self._rank_again(rankings, gallery, relevant, matches, model.temp.item())
            rankings = by_form.pop(self.rerank)
            metrics |= _named("rerank/", retrieval_metrics(rankings.text_ranks, rankings.image_ranks))
            for form, others in by_form.items():
                recalls = retrieval_metrics(others.text_ranks, others.image_ranks)
                metrics |= _named(f"rerank_{form}/", {name: recalls[name] for name in RECALLS})
        metrics |= _chance(gallery, relevant)
        metrics["num_images"] = float(len(gallery.rows))
        metrics["num_texts"] = float(len(gallery.texts))
        metrics["unreadable_images"] = float(gallery.unreadable)
        if not dist.is_main():
            return Evaluation(metrics)
        examples = None
        if final and self.num_examples:
            examples = draw_examples(
                gallery, relevant, rankings.first_texts, rankings.first_images, dataset, self.num_examples
            )
        return Evaluation(metrics, RetrievalDetails(gallery, relevant, matches, examples))

    def _rank_again(
        self, by_itc: _Rankings, gallery: Gallery, relevant: Tensor, matches: Matches, temperature: float
    ) -> dict[str, _Rankings]:
        """The rankings of every form of the score: the logits are there, so that the others cost nothing."""
        text_similarity = gallery.similarity.gather(1, matches.texts)
        image_similarity = gallery.similarity.T.gather(1, matches.images)
        truth = relevant_images(gallery.image_of_text, len(gallery.rows))
        found = {}
        for form in FORMS:
            score = functools.partial(pair_scores, form, temperature=temperature, itm_weight=self.itm_weight)
            found[form] = _rank_by_scores(
                by_itc,
                relevant,
                truth,
                matches,
                score(matches.text_logits, text_similarity),
                score(matches.image_logits, image_similarity),
            )
        return found

    def metric_lines(self, metrics: Mapping[str, float]) -> list[str]:
        """Losses, then recalls before and after re-ranking and by chance."""
        header, rows = loss_table(metrics)
        lines = [*table_lines(header, rows), ""] if rows else []
        lines += table_lines(*retrieval_table(metrics))
        left_out = int(metrics.get("unreadable_images", 0))
        size = (
            f"gallery: {metrics.get('num_images', 0):.0f} images, {metrics.get('num_texts', 0):.0f} captions"
        )
        return [*lines, size + (f"; {left_out} unreadable images left out" if left_out else "")]

    def report_sections(self, evaluation: Evaluation) -> list[str]:
        """Headline numbers, tables, images with their first captions, captions with their first images."""
        from lavis_lite.tasks.html import examples_sections, retrieval_section

        details = evaluation.details
        examples = details.examples if isinstance(details, RetrievalDetails) else None
        return [retrieval_section(evaluation.metrics), *(examples_sections(examples) if examples else [])]


def _rank_by_similarity(gallery: Gallery, relevant: Tensor) -> _Rankings:
    similarity = gallery.similarity
    with_text = relevant.any(dim=1)
    truth = relevant_images(gallery.image_of_text, len(gallery.rows))
    shown = 10
    return _Rankings(
        ranks(similarity[with_text], relevant[with_text]),
        ranks(similarity.T, truth),
        similarity.topk(min(shown, similarity.shape[1]), dim=1).indices,
        similarity.topk(min(shown, similarity.shape[0]), dim=0).indices.T,
    )


def _rank_by_scores(
    by_itc: _Rankings,
    relevant: Tensor,
    truth: Tensor,
    matches: Matches,
    text_scores: Tensor,
    image_scores: Tensor,
) -> _Rankings:
    with_text = relevant.any(dim=1)
    return _Rankings(
        reranked_ranks(
            by_itc.text_ranks, relevant[with_text], matches.texts[with_text], text_scores[with_text]
        ),
        reranked_ranks(by_itc.image_ranks, truth, matches.images, image_scores),
        matches.texts.gather(1, text_scores.argsort(dim=1, descending=True)),
        matches.images.gather(1, image_scores.argsort(dim=1, descending=True)),
    )


def _chance(gallery: Gallery, relevant: Tensor) -> dict[str, float]:
    with_text = relevant[relevant.any(dim=1)]
    truth = torch.eye(1, len(gallery.rows), dtype=torch.bool)  # every text has one right image
    chance = {f"chance_tr_r{k}": chance_recall(with_text, k) for k in (1, 5, 10)}
    return chance | {f"chance_ir_r{k}": chance_recall(truth, k) for k in (1, 5, 10)}


def _named(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in metrics.items()}

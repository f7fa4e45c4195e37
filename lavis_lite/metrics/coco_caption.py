"""The scores that COCO's caption evaluation reports, by name; one that fails loses none of the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from lavis_lite.common.errors import MissingDependencyError
from lavis_lite.common.logging import get_logger
from lavis_lite.metrics import java_caption
from lavis_lite.metrics.caption import Words, bleu, cider, rouge_l
from lavis_lite.metrics.ptb import words

logger = get_logger(__name__)

Metric = Literal["cider", "bleu", "rouge_l", "meteor", "spice"]
METRICS: tuple[Metric, ...] = ("cider", "bleu", "rouge_l", "meteor", "spice")
# Those that need nothing but Python and take milliseconds an image at most.
QUICK_METRICS: tuple[Metric, ...] = ("cider", "bleu", "rouge_l")

Scorer = Callable[[Sequence[Words], Sequence[Sequence[Words]]], dict[str, float]]


def _cider(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
    if len(predictions) == 1:
        logger.warning(
            "CIDEr of a single image is 0 by definition: it weighs words by how few images have them"
        )
    scores = cider(predictions, references)
    return {"cider": sum(scores) / len(scores)}


SCORERS: dict[str, Scorer] = {
    "cider": _cider,
    "bleu": lambda p, r: {f"bleu_{n}": value for n, value in enumerate(bleu(p, r), 1)},
    "rouge_l": lambda p, r: {"rouge_l": rouge_l(p, r)},
    "meteor": lambda p, r: {"meteor": java_caption.meteor(p, r)},
    "spice": lambda p, r: {"spice": java_caption.spice(p, r)},
}


def score_captions(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[Metric] = METRICS
) -> dict[str, float]:
    """Scores of one prediction per image: cider, bleu_1 to bleu_4, rouge_l, meteor, spice.

    All are shares (0 to 1) but CIDEr (0 to 10); papers print 100 times these. What can't be computed is
    absent from the result, with one line in the log that says why. Empty without images.

    predictions: raw captions, tokenized here. references: at least one of each image.
    """
    if not predictions:
        return {}
    tokens = [words(text) for text in predictions]
    own = [[words(text) for text in several] for several in references]
    scores: dict[str, float] = {}
    for name in metrics:
        try:
            scores |= SCORERS[name](tokens, own)
        except MissingDependencyError as error:
            logger.warning("%s is left out: %s", name, error)
        except Exception as error:  # whatever a metric or its Java dies of, the others are worth having
            logger.warning("%s is left out, it failed: %s: %s", name, type(error).__name__, error)
    return scores


def score_by_group(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Sequence[str | None],
    metrics: Sequence[Metric] = METRICS,
) -> dict[str, float]:
    """The scores of all images, then of each group as a corpus of its own: cider, cider_in_domain, ...

    groups: the name of each image's group; None for none.
    """
    scores = score_captions(predictions, references, metrics)
    # What failed for all would fail, and be logged, for each group again.
    metrics = [name for name in metrics if any(key == name or key.startswith(f"{name}_") for key in scores)]
    for group in sorted({name for name in groups if name is not None}):
        rows = [row for row, name in enumerate(groups) if name == group]
        own = score_captions([predictions[row] for row in rows], [references[row] for row in rows], metrics)
        scores |= {f"{name}_{group_suffix(group)}": value for name, value in own.items()}
    return scores


def group_suffix(group: str) -> str:
    """A group's name as the end of a metric's: "in-domain" gives "in_domain"."""
    return re.sub(r"\W+", "_", group.lower()).strip("_")

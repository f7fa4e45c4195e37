"""Retrieval between images and texts: ranks, recall at k both ways, chance.

Legend: N images, M texts, K candidates per query.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
# What ranks are computed from is as large as the scores: 500 MB for COCO's 5,000 images and 25,000 texts.
QUERIES_AT_ONCE = 256


def relevant_texts(texts: Sequence[str], image_of_text: Tensor, num_images: int) -> Tensor:
    """bool[N, M]: the texts that are right answers for each image.

    Those are the image's own captions, and texts of other images that equal one of them word for word:
    such a text describes the image by its annotator's own words, and no scorer can tell the two apart.

    image_of_text: int64[M], the position of each text's image.
    """
    numbers: dict[str, int] = {}
    wording = torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts], dtype=torch.long)
    says = torch.zeros(num_images, len(numbers), dtype=torch.bool)
    says[image_of_text, wording] = True
    return says[:, wording]


def relevant_images(image_of_text: Tensor, num_images: int) -> Tensor:
    """bool[M, N]: the one image each text was written for, also where another has the same caption."""
    return image_of_text[:, None] == torch.arange(num_images)


def ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """int64[queries]: the rank of the best right answer of each query, 1 being first.

    Ties count against the scorer (a wrong answer with the same score is ranked before), so that a constant
    score ranks last, not first; a score that is not a number counts as the worst for a right answer and the
    best for a wrong one. Several right answers do not compete with each other.

    scores: float[queries, items]; relevant: bool of the same shape.
    Raises ValueError when a query has no right answer.
    """
    if scores.shape != relevant.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and relevant {tuple(relevant.shape)} differ in shape")
    if not bool(relevant.any(dim=1).all()):
        raise ValueError("ranks are defined for queries with at least one right answer; leave the others out")
    if not len(scores):
        return torch.empty(0, dtype=torch.long)
    blocks = zip(scores.split(QUERIES_AT_ONCE), relevant.split(QUERIES_AT_ONCE), strict=True)
    return torch.cat([_ranks(*block) for block in blocks])


def _ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    missing = scores.isnan()
    best = scores.masked_fill(~relevant | missing, -torch.inf).amax(dim=1, keepdim=True)
    rivals = scores.masked_fill(missing, torch.inf) >= best
    return 1 + (rivals & ~relevant).sum(dim=1)


def reranked_ranks(first_ranks: Tensor, relevant: Tensor, candidates: Tensor, scores: Tensor) -> Tensor:
    """int64[queries]: ranks after the first K items of each query were put in the order of new scores.

    A query whose right answers are not among its candidates keeps its first rank, which is beyond K.

    first_ranks: int64[queries]; relevant: bool[queries, items]; candidates: int64[queries, K], item numbers;
    scores: float[queries, K], the candidates' new scores.
    """
    relevant_candidates = relevant.gather(1, candidates)
    found = relevant_candidates.any(dim=1)
    result = first_ranks.clone()
    result[found] = ranks(scores[found], relevant_candidates[found])
    return result


def recall(rank_of_query: Tensor, at: int) -> float:
    """The share of queries whose right answer is among the first `at`; 0 without queries."""
    return float((rank_of_query <= at).double().mean()) if len(rank_of_query) else 0.0


def retrieval_metrics(text_ranks: Tensor, image_ranks: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, their R@1 mean, and mean ranks.

    text_ranks: int64, one per image: where its first right text is (TR, image to text).
    image_ranks: int64, one per text: where its image is (IR, text to image).
    """
    metrics = {f"tr_r{k}": recall(text_ranks, k) for k in RECALL_AT}
    metrics |= {f"ir_r{k}": recall(image_ranks, k) for k in RECALL_AT}
    metrics["r1_mean"] = (metrics["tr_r1"] + metrics["ir_r1"]) / 2
    metrics["tr_mean_rank"] = float(text_ranks.double().mean()) if len(text_ranks) else 0.0
    metrics["ir_mean_rank"] = float(image_ranks.double().mean()) if len(image_ranks) else 0.0
    return metrics


def chance_recall(relevant: Tensor, at: int) -> float:
    """The expected recall of a random order: mean over queries of 1 - C(items - right, at) / C(items, at).

    relevant: bool[queries, items].
    """
    items = relevant.shape[1]
    right = relevant.sum(dim=1).double()
    miss = torch.ones_like(right)
    for drawn in range(min(at, items)):
        miss = miss * ((items - right - drawn).clamp(min=0) / (items - drawn))
    return float((1 - miss).mean()) if len(right) else 0.0

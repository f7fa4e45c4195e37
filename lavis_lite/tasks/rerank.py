"""Re-ranking the first candidates of a retrieval by how well image and text match when they see each other.

Three forms of the score of a pair, with d = logit(match) - logit(no match) of the ITM head, s the cosine of
ITC and t its temperature:

- "sum", w d + s / t. The head learns to tell pairs from the negatives it is shown, and those are drawn in
  proportion to exp(s / t). So d estimates what remains of the log odds of a match once s / t is known,
  log p(image, text) / (p(image) p(text)) - s / t + const., and the ranking by the odds themselves has to
  put s / t back. w = 1 is right for a head that knows these odds; one that learned from few pairs, or for few
  steps, is too sure of them, and a smaller w (`itm_weight`) keeps its errors from undoing what s / t has right.
- "itm", d alone: what would be right had the negatives been drawn at random.
- "lavis", logit(match) + s: the form of the published retrieval scores. It leaves out the other logit,
  and s without temperature hardly counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lavis_lite.common import dist
from lavis_lite.tasks.gallery import Gallery, MatchingModel, texts_at

# Numbers of image features read by one batch of pairs, and kept projected at a time.
PAIR_BLOCK = 1 << 22
IMAGE_BLOCK = 1 << 24
MAX_PAIRS = 256


@dataclass(frozen=True)
class Matches:
    """The candidates of every query and the ITM head's logits for them; equal on all ranks.

    texts: int64[N, K'], each image's first texts by ITC; images: int64[M, K''], each text's first images.
    text_logits: float[N, K', 2]; image_logits: float[M, K'', 2].
    """

    texts: Tensor
    images: Tensor
    text_logits: Tensor
    image_logits: Tensor


def match_candidates(model: MatchingModel, gallery: Gallery, k: int, loader_args: Any) -> Matches:
    """The first k candidates of every image and every text (all, where there are fewer), scored as pairs.

    A pair that is a candidate both ways is computed once; each rank computes those of its own images.
    """
    num_images, num_texts = gallery.similarity.shape
    texts = gallery.similarity.topk(min(k, num_texts), dim=1).indices
    images = gallery.similarity.topk(min(k, num_images), dim=0).indices.T.contiguous()
    wanted = torch.zeros(num_images, num_texts, dtype=torch.bool)
    wanted.scatter_(1, texts, True)
    wanted.T.scatter_(1, images, True)
    keys, logits = _score(model, gallery, wanted, loader_args)
    text_keys = torch.arange(num_images)[:, None] * num_texts + texts
    image_keys = images * num_texts + torch.arange(num_texts)[:, None]
    return Matches(
        texts,
        images,
        logits[torch.searchsorted(keys, text_keys)],
        logits[torch.searchsorted(keys, image_keys)],
    )


def pair_scores(
    form: str, logits: Tensor, similarity: Tensor, temperature: float, *, itm_weight: float = 1.0
) -> Tensor:
    """Scores in one of the module's forms. logits: float[..., 2]; similarity: float[...], cosines."""
    if form == "lavis":
        return logits[..., 1] + similarity
    difference = logits[..., 1] - logits[..., 0]
    return itm_weight * difference + similarity / temperature if form == "sum" else difference


def _score(model: MatchingModel, gallery: Gallery, wanted: Tensor, loader_args: Any) -> tuple[Tensor, Tensor]:
    """Sorted keys image * M + text of all wanted pairs, and their logits [pairs, 2]."""
    keys, logits = [], []
    features = gallery.embeds[0].numel() if len(gallery.mine) else 0
    # A rank without images has nothing to compute, and split() would give it one empty chunk.
    for here in torch.arange(len(gallery.mine)).split(max(1, IMAGE_BLOCK // features)) if features else ():
        with loader_args.autocast():
            image_kv = model.project_image(gallery.embeds[here].to(loader_args.device, torch.float32))
        local, text = wanted[gallery.mine[here]].nonzero(as_tuple=True)
        by_length = gallery.text_lengths[text].argsort(stable=True)
        for pairs in by_length.split(min(MAX_PAIRS, max(16, PAIR_BLOCK // features))):
            with loader_args.autocast():
                images = image_kv[local[pairs].to(loader_args.device)]
                scored = model.match_logits(images, texts_at(gallery.tokens, text[pairs]))
            logits.append(scored.float().cpu())
            keys.append(gallery.mine[here][local[pairs]] * wanted.shape[1] + text[pairs])
    mine = (
        (torch.cat(keys), torch.cat(logits))
        if keys
        else (torch.empty(0, dtype=torch.long), torch.empty(0, 2))
    )
    parts = dist.gather_objects(mine)
    all_keys = torch.cat([part[0] for part in parts])
    order = all_keys.argsort()
    return all_keys[order], torch.cat([part[1] for part in parts])[order]

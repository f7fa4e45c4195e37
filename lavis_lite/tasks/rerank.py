"""Re-ranking the first candidates of a retrieval by how well image and text match when they see each other.

Three forms of the score of a pair, with d = logit(match) - logit(no match) of the ITM head, s the cosine of
ITC and t its temperature:

- "sum", w d + s / t. The head learns to tell pairs from the negatives it is shown, and those are drawn in
  proportion to exp(s / t). So d estimates what remains of the log odds of a match once s / t is known,
  log p(image, text) / (p(image) p(text)) - s / t + const., and the ranking by the odds themselves has to
  put s / t back. w = 1 is right for a head that knows these odds; one that learned from few pairs, or for few
  steps, is too sure of them, and a smaller w (`itm_weight`) keeps its errors from undoing what s / t has right.
- "itm", d alone: what the paper's text says, and would be right had the negatives been drawn at random.
- "lavis", logit(match) + s: the form of the published retrieval scores. It leaves out the other logit,
  and s without temperature hardly counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lavis_lite.common import dist
from lavis_lite.common.logging import ProgressDisplay, get_logger
from lavis_lite.tasks.gallery import Gallery, MatchingModel, texts_at
from lavis_lite.tasks.rerank_journal import PairJournal

logger = get_logger(__name__)

FORMS = ("sum", "itm", "lavis")

# Numbers that images are projected to and held at a time (0.43 GB in fp32; 17 images of ViT-g at 364 pixels), pairs
# whose texts are begun at a time, pairs in a batch, and pairs whose scores may be lost when the evaluation is ended.
IMAGE_BLOCK = 108_000_000
TEXT_BLOCK = 1024
MAX_PAIRS = 256
KEPT_PAIRS = 16_384


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

    A pair that is a candidate both ways is computed once; each rank computes those of its own images. What an image
    brings to its pairs is computed once, what a text brings once for a block of images.
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
    own = gallery.mine[gallery.mine >= 0]
    total = sum(int(wanted[part].sum()) for part in own.split(256))
    # One piece each: thousands of small ones, kept between large ones that come and go, scattered the heap, so that
    # 300 images at 364 pixels grew to 6 GB.
    keys, logits = torch.empty(total, dtype=torch.long), torch.empty(total, 2)
    journal = PairJournal(model, gallery, loader_args)
    done = _take_known(journal, wanted, keys, logits)
    kept = done
    # Around all batches, so that autocast converts the matching weights once and not for each of them.
    with ProgressDisplay(total, done, shown=dist.is_main(), unit="pair") as progress, loader_args.autocast():
        for block in _image_blocks(model, gallery, wanted, loader_args):
            for some_keys, some_logits in _score_images(model, gallery, wanted, block, loader_args):
                new = slice(done, done + len(some_keys))
                keys[new], logits[new] = some_keys, some_logits
                done = new.stop
                progress.advance(done)
                progress.show({})
                if done - kept >= KEPT_PAIRS or done == total:
                    journal.add(keys[kept:done], logits[kept:done])
                    kept = done
    parts = dist.gather_objects((keys, logits))
    journal.remove()
    all_keys = torch.cat([part[0] for part in parts])
    order = all_keys.argsort()
    return all_keys[order], torch.cat([part[1] for part in parts])[order]


def _take_known(journal: PairJournal, wanted: Tensor, keys: Tensor, logits: Tensor) -> int:
    """Put the pairs that are in the journal first, where they are wanted, and want them no more; their number."""
    known_keys, known_logits = journal.load()
    images, texts = known_keys // wanted.shape[1], known_keys % wanted.shape[1]
    still = wanted[images, texts]
    count = int(still.sum())
    keys[:count], logits[:count] = known_keys[still], known_logits[still]
    wanted[images, texts] = False
    if count:
        logger.info("going on: %d of %d pairs are scored", count, len(keys))
    return count


def _image_blocks(model: MatchingModel, gallery: Gallery, wanted: Tensor, loader_args: Any) -> list[Tensor]:
    """The rows of this rank's features that are projected at a time, each image once.

    An image is joined by those that share most of its texts: what a text brings is then computed once for more pairs.
    """
    if gallery.embeds is None:
        raise ValueError("a gallery without features can't be re-ranked: encode it with keep_features")
    # Twins of an image already met have position -1, and no pairs of their own.
    left = (gallery.mine >= 0).nonzero().squeeze(1)
    left = left[wanted.any(dim=1)[gallery.mine[left]]]
    if not len(left):
        return []
    # What is held is the projection, whose size depends on the matching model and not on the encoder's width.
    size = max(1, IMAGE_BLOCK // _project_images(model, gallery, left[:1], loader_args).numel())
    if size == 1:
        return list(left.split(1))
    images_of_text = wanted.T.contiguous()  # whole rows are read, where columns would be picked byte by byte
    blocks = []
    while len(left):
        positions = gallery.mine[left]
        texts = wanted[positions[0]].nonzero().squeeze(1)
        shared = images_of_text[texts].sum(dim=0)[positions]
        chosen = torch.zeros(len(left), dtype=torch.bool)
        chosen[shared.argsort(descending=True, stable=True)[:size]] = True
        blocks.append(left[chosen])
        left = left[~chosen]
    return blocks


# What is projected belongs to the two generators below: it is gone before the next block's is made.


def _score_images(
    model: MatchingModel, gallery: Gallery, wanted: Tensor, block: Tensor, loader_args: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and logits of a block of images' wanted pairs, batch by batch."""
    positions = gallery.mine[block]
    here = wanted[positions]
    image_kv = _project_images(model, gallery, block, loader_args)
    for texts in _text_blocks(here, gallery.text_lengths):
        for pairs, logits in _score_texts(model, image_kv, texts_at(gallery.tokens, texts), here[:, texts]):
            yield positions[pairs[:, 0]] * wanted.shape[1] + texts[pairs[:, 1]], logits


def _project_images(model: MatchingModel, gallery: Gallery, block: Tensor, loader_args: Any) -> Any:
    assert gallery.embeds is not None
    return model.project_image(gallery.embeds.read(block.tolist()).to(loader_args.device, torch.float32))


def _score_texts(
    model: MatchingModel, image_kv: Any, tokens: Any, wanted: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs int64[n, 2] of image and text that are wanted bool[images, texts], and their logits, batch by batch."""
    starts = model.project_text(tokens)
    for pairs in wanted.nonzero().split(MAX_PAIRS):
        logits = model.match_logits(_shares(image_kv, pairs[:, 0]), _rows(starts, pairs[:, 1]))
        yield pairs, logits.float().cpu()


def _text_blocks(wanted: Tensor, lengths: Tensor) -> list[Tensor]:
    """The texts of wanted pairs bool[n, M], those of like length together, in blocks of about TEXT_BLOCK pairs."""
    pairs = wanted.sum(dim=0)
    texts = pairs.nonzero().squeeze(1)
    texts = texts[lengths[texts].argsort(stable=True)]
    block = (pairs[texts].cumsum(0) - 1) // TEXT_BLOCK
    sizes = block.unique_consecutive(return_counts=True)[1]
    return list(texts.split(sizes.tolist()))


def _shares(image_kv: Any, images: Tensor) -> list[tuple[Any, int]]:
    """The images of pairs, in order, each once with the number of its pairs: what it is projected to isn't copied."""
    found, counts = images.unique_consecutive(return_counts=True)
    return [(image_kv[i : i + 1], each) for i, each in zip(found.tolist(), counts.tolist(), strict=True)]


def _rows(starts: Any, rows: Tensor) -> Any:
    return starts[rows.to(starts.attention_mask.device)]

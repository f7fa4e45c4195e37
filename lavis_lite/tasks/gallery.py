"""The held-out images and captions of a retrieval evaluation, encoded once and shared out over the ranks.

Legend: N images, M texts, Q queries, P image tokens, D the encoder's width, E projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lavis_lite.common import dist
from lavis_lite.common.errors import DataError
from lavis_lite.datasets.loader import eval_loader
from lavis_lite.tasks.feature_spool import FeatureSpool

# Numbers of the similarity block [images, M, Q] held at a time: 64 MB in fp32.
SIMILARITY_BLOCK = 1 << 24
TEXTS_PER_BATCH = 256


# What of a `MatchingModel` compares images with texts, and what besides re-ranks them.
ENCODING = ("encode_image", "query_features", "tokenize", "text_features")
MATCHING = ("project_image", "project_text", "match_logits", "temp")


class MatchingModel(Protocol):
    """What a model must offer to be evaluated on retrieval: each half once per item, the match per pair."""

    temp: Any

    def encode_image(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, P, D]."""

    def project_image(self, image_embeds: Tensor) -> Any:
        """What matching reads of an image, computed once; indexed by rows, with `numel()` numbers in all."""

    def query_features(self, images: Tensor) -> Tensor:
        """Features [B, P, D] -> [B, Q, E], normalised."""

    def tokenize(self, texts: list[str]) -> Any:
        """Padded tokens with `attention_mask` [B, T], indexed by rows, with `trimmed()`."""

    def text_features(self, tokens: Any) -> Tensor:
        """[B, E], normalised."""

    def project_text(self, tokens: Any) -> Any:
        """What matching reads of texts and owes to no image, computed once; indexed by rows."""

    def match_logits(self, images: Sequence[tuple[Any, int]], texts: Any) -> Tensor:
        """[B, 2] of pairs: groups of projected images, each with how many of the projected texts every one serves."""


@dataclass(frozen=True)
class Gallery:
    """Readable images and their captions; equal on all ranks but for `mine` and `embeds`.

    Rows with equal image_id are one image with all their captions.

    rows: the dataset's (first) row of each of the N images. texts: M captions. image_of_text: int64[M],
    positions in `rows`. similarity: float[N, M], the largest cosine over the queries.
    mine: for every row that this rank encoded the position of its image, -1 where another row shows the same image.
    embeds: the features [P, D] of those rows; None where they weren't asked for.
    unreadable: rows left out with their captions.
    """

    rows: list[int]
    texts: list[str]
    image_of_text: Tensor
    similarity: Tensor
    tokens: Any
    text_lengths: Tensor
    mine: Tensor
    embeds: FeatureSpool | None
    unreadable: int


def encode_gallery(
    model: MatchingModel, dataset: Any, loader_args: Any, *, keep_features: bool = True
) -> Gallery:
    """Encode every readable image and all captions of a split, and compare all with all.

    keep_features: hold the images' features for re-ranking, which are gigabytes of COCO's test split.
    Raises DataError when nothing can be read or there is no caption.
    """
    embeds = FeatureSpool(len(dataset), loader_args.folder) if keep_features else None
    my_rows, queries = _encode_images(model, dataset, loader_args, embeds)
    picture_of_row = {row: picture for part in dist.gather_objects(my_rows) for row, picture in part.items()}
    first_row: dict[int, int] = {}
    for row in sorted(picture_of_row):
        first_row.setdefault(picture_of_row[row], row)
    rows = list(first_row.values())
    position = {picture: number for number, picture in enumerate(first_row)}
    captions = [
        (position[picture_of_row[row]], text)
        for row in sorted(picture_of_row)
        for text in dataset.captions(row)
    ]
    if not captions:
        raise DataError(
            f"dataset '{dataset.name}': nothing to retrieve, {len(rows)} of {len(dataset)} held-out images "
            f"can be read{' and none has a caption' if rows else ''}"
        )
    texts = [text for _, text in captions]
    tokens = model.tokenize(texts)
    text_lengths = tokens.attention_mask.sum(dim=1).cpu()
    text_feats = _encode_texts(model, tokens, text_lengths, loader_args)
    mine = torch.tensor(
        [position[picture] if first_row[picture] == row else -1 for row, picture in my_rows.items()],
        dtype=torch.long,
    )
    kept = mine >= 0
    return Gallery(
        rows=rows,
        texts=texts,
        image_of_text=torch.tensor([number for number, _ in captions], dtype=torch.long),
        similarity=_gather_rows(mine[kept], _similarity(queries[kept], text_feats), len(rows)),
        tokens=tokens,
        text_lengths=text_lengths,
        mine=mine,
        embeds=embeds,
        unreadable=len(dataset) - len(picture_of_row),
    )


def _encode_images(
    model: MatchingModel, dataset: Any, loader_args: Any, embeds: FeatureSpool | None
) -> tuple[dict[int, int], Tensor]:
    """This rank's rows with the id of their picture, and their queries [n, Q, E]; `embeds` gets the features."""
    rows: dict[int, int] = {}
    queries: list[Tensor] = []
    loader = eval_loader(
        dataset,
        batch_size=loader_args.batch_size,
        num_workers=loader_args.num_workers,
        rank=dist.rank(),
        world_size=dist.world_size(),
        max_bad_fraction=loader_args.max_bad_fraction,
    )
    for batch in loader:
        with loader_args.autocast():
            image_embeds = model.encode_image(batch["image"].to(loader_args.device, non_blocking=True))
            queries.append(model.query_features(image_embeds).float())
        rows.update(zip(batch["index"].tolist(), batch["image_id"].tolist(), strict=True))
        if embeds is not None:
            embeds.append(image_embeds.to(loader_args.storage_dtype))
    return rows, torch.cat(queries) if queries else torch.empty(0, 1, 1)  # more ranks than images


def _encode_texts(model: MatchingModel, tokens: Any, lengths: Tensor, loader_args: Any) -> Tensor:
    """[M, E]: this rank's share encoded in batches of like lengths, the others' gathered."""
    order = lengths.argsort(stable=True)[dist.rank() :: dist.world_size()]
    feats = []
    for batch in order.split(TEXTS_PER_BATCH) if len(order) else ():  # more ranks than texts
        with loader_args.autocast():
            feats.append(model.text_features(texts_at(tokens, batch)).float().cpu())
    mine = torch.cat(feats) if feats else torch.empty(0, 1)
    return _gather_rows(order, mine, len(lengths)).to(loader_args.device)


def texts_at(tokens: Any, positions: Tensor) -> Any:
    """The tokens of some texts, without the columns that are padding for all of them."""
    return tokens[positions.to(tokens.attention_mask.device)].trimmed()


def _similarity(queries: Tensor, text_feats: Tensor) -> Tensor:
    """float[n, M] on the host: cosine of each text with the query of each image that is nearest to it."""
    if not len(queries):
        return torch.empty(0, len(text_feats))
    block = max(1, SIMILARITY_BLOCK // (queries.shape[1] * len(text_feats)))
    return torch.cat([_nearest(part, text_feats).cpu() for part in queries.split(block)])


def _nearest(queries: Tensor, text_feats: Tensor) -> Tensor:
    return (queries @ text_feats.T).amax(dim=1)


def _gather_rows(positions: Tensor, values: Tensor, total: int) -> Tensor:
    """All ranks' rows of a table of `total` rows, each put at its position."""
    parts = dist.gather_objects((positions, values))
    width = next(part.shape[1:] for where, part in parts if len(where))
    table = torch.empty(total, *width)
    for where, part in parts:
        if len(where):
            table[where] = part
    return table

"""Searching an index with a text or a picture, re-ranked by image-text matching if asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lavis_lite.common.errors import DataError, InputError
from lavis_lite.common.logging import get_logger
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.images import read_image
from lavis_lite.search.encode import Pictures, batched
from lavis_lite.search.encoding import Encoder, ModelChoice, load_encoder
from lavis_lite.search.manifest import load_manifest
from lavis_lite.search.opening import ImageIndex, check_same_model, open_index
from lavis_lite.search.sources import short_name
from lavis_lite.tasks.rerank import pair_scores

logger = get_logger(__name__)

# Of matching, for which pictures are read and encoded again.
CANDIDATES = 128
BATCH_SIZE = 16


@dataclass(frozen=True)
class Hit:
    """A found image.

    name: how `read_image` finds it. score: `scoring.score`, a cosine. reranked: the score of re-ranking, on the scale
    of log odds; itm: the probability that image and text match, in [0, 1]; both None where the image wasn't re-ranked:
    not asked for, behind the candidates, or the picture can't be read any more.
    """

    rank: int
    name: str
    score: float
    reranked: float | None = None
    itm: float | None = None

    @property
    def image(self) -> str:
        """The name as people read it."""
        return short_name(self.name)


class Searcher:
    """An index together with the model that built it.

    Raises DataError when the encoder is another model than the index's.
    """

    def __init__(self, index: ImageIndex, encoder: Encoder) -> None:
        check_same_model(index.root, index.manifest, encoder)
        self.index, self.encoder = index, encoder

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], choice: ModelChoice | None = None, *, device: str = "auto"
    ) -> Searcher:
        """Open an index with the model it names, or with `choice` where its checkpoint lies elsewhere now."""
        # The manifest first: a model loads for seconds, and in vain when there is no index.
        index = open_index(path)
        return cls(index, load_encoder(choice or choice_of(path), device=device))

    def search(
        self,
        text: str | None = None,
        image: str | os.PathLike[str] | None = None,
        *,
        top: int = 10,
        rerank: str | None = None,
        candidates: int = CANDIDATES,
        itm_weight: float | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """The best images for a text, or for the picture in a file.

        Args:
            rerank: "sum" or "itm" puts the first `candidates` in the order of that score, see
                `lavis_lite.tasks.rerank`; for texts.
            itm_weight: of matching in the form "sum", by default the encoder's: what its run was evaluated with.
            exact: compare with every image also where there is an approximate index.

        Raises InputError unless there is one of text and image, and when a picture is to be re-ranked or can't be read.
        """
        if (text is None) == (image is None):
            raise InputError("search with either a text or an image")
        if text is not None and not text.strip():
            raise InputError("the text to search with is empty")
        if top < 1 or candidates < 1:
            raise InputError(f"at least one image is to be found, not {min(top, candidates)}")
        if rerank is not None and text is None:
            raise InputError("re-ranking matches images with a text: search with --text")
        if itm_weight is not None and rerank != "sum":
            raise InputError("--itm-weight is part of --rerank sum, and of nothing else")
        if itm_weight is not None and itm_weight <= 0:
            raise InputError(
                f"--itm-weight must be above 0, not {itm_weight}; without --rerank ITC alone decides"
            )
        query = self.encoder.encode_texts([text]) if text is not None else self._encode_picture(str(image))
        wanted = max(top, candidates) if rerank else top
        scores, rows = self.index.search(query, wanted, exact=exact)
        pairs = [
            (row, score) for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True) if row >= 0
        ]
        hits = [Hit(place, self.index.store.name(row), score) for place, (row, score) in enumerate(pairs, 1)]
        if rerank:
            weight = self.encoder.itm_weight if itm_weight is None else itm_weight
            hits = self._rerank(str(text), hits, rerank, candidates, weight)
        return hits[:top]

    def _encode_picture(self, path: str) -> torch.Tensor:
        try:
            picture = read_image(Path(path).expanduser())
        except UnreadableSample as error:
            raise InputError(f"--image '{error.path}': {error.reason}") from error
        return self.encoder.encode_images(self.encoder.processor(picture)[None])

    def _rerank(self, text: str, hits: Sequence[Hit], form: str, candidates: int, weight: float) -> list[Hit]:
        """The first `candidates` in the order of their new score; then those that can't be read, then all others."""
        pictures = Pictures([hit.name for hit in hits[:candidates]], self.encoder.processor)
        by_name = {hit.name: hit for hit in hits}
        projected = self.encoder.project_text(text)
        read: list[tuple[float, Hit]] = []
        for start in range(0, len(pictures), BATCH_SIZE):
            batch = batched([pictures[at] for at in range(start, min(start + BATCH_SIZE, len(pictures)))])
            for name, reason in batch.unreadable.items():
                logger.warning("not re-ranked: %s: %s", short_name(name), reason)
            if batch.images is None:
                continue
            logits = self.encoder.match(batch.images, projected)
            same = [by_name[name] for name in batch.names]
            cosines = torch.tensor([hit.score for hit in same])
            scores = pair_scores(form, logits, cosines, self.encoder.temperature, itm_weight=weight).tolist()
            itm = logits.softmax(-1)[:, 1].tolist()
            read += [
                (score, replace(hit, reranked=score, itm=match))
                for hit, score, match in zip(same, scores, itm, strict=True)
            ]
        read.sort(key=lambda pair: -pair[0])
        matched = {hit.name for _, hit in read}
        order = [*(hit for _, hit in read), *(hit for hit in hits if hit.name not in matched)]
        return [replace(hit, rank=rank) for rank, hit in enumerate(order, 1)]


def choice_of(path: str | os.PathLike[str]) -> ModelChoice:
    """The model that an index was built by; DataError when there is no index, or its model had no name."""
    identity = load_manifest(Path(path)).model
    if not identity.get("model"):
        raise DataError(f"'{path}' doesn't say which model built it; name one")
    return ModelChoice(identity["model"], identity.get("checkpoint"))

"""What tells how well captions fit pictures: stage 1 of ours, or a CLIP of transformers.

B pictures, M captions of all of them, Q queries, E projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from lavis_lite.api import load_model_and_preprocess
from lavis_lite.capfilt.settings import Settings, parse_model
from lavis_lite.capfilt.transformers_models import load_pretrained
from lavis_lite.common.device import autocast
from lavis_lite.common.errors import ConfigError


class Ranker(Protocol):
    """Scores captions of pictures; only scores of the same picture are compared."""

    def scores(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """How well each of a picture's texts fits it, higher is better; B pictures in RGB, B lists of texts."""
        ...


def build_ranker(settings: Settings, device: torch.device, precision: str) -> Ranker:
    """The ranker that the settings name, on a device; ConfigError or CheckpointError when there is none."""
    named = parse_model(settings.ranker, "ranker")
    if not named.ours:
        if settings.rank_by == "itm":
            raise ConfigError(f"--rank-by itm: '{settings.ranker}' has no matching head; --rank-by itc")
        return ClipRanker(named.name, device, precision)
    model, vis, text = load_model_and_preprocess(named.name, None, True, str(device), named.checkpoint)
    if not hasattr(model, "match_logits"):
        raise ConfigError(
            f"--ranker '{settings.ranker}': this model compares no texts with images; e.g. blip2/TYPE"
        )
    arithmetic = autocast(device, precision)
    return QFormerRanker(model, vis["eval"], text["eval"], arithmetic, by=settings.rank_by)


class QFormerRanker:
    """Stage 1: the cosine of text and best query (by: itc), or the probability of a match (by: itm)."""

    def __init__(
        self, model: Any, vis: Any, text: Any, arithmetic: AbstractContextManager[None], *, by: str
    ) -> None:
        self.model = model
        self.vis = vis
        self.text = text
        self.arithmetic = arithmetic
        self.by = by

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `Ranker`."""
        flat, rows = _flattened(texts)
        if not flat:
            return [[] for _ in texts]
        pixels = torch.stack([self.vis(image) for image in images]).to(self.model.device)
        with self.arithmetic:
            tokens = self.model.tokenize([self.text(text) for text in flat])
            embeds = self.model.encode_image(pixels)
            if self.by == "itm":
                logits = self.model.match_logits(
                    self.model.project_image(embeds)[rows.to(pixels.device)], tokens
                )
                # In double precision, so that sure matches still differ.
                found = logits.double().softmax(-1)[:, 1]
            else:
                queries = self.model.query_features(embeds)[rows.to(pixels.device)]
                found = torch.einsum("mqe,me->mq", queries, self.model.text_features(tokens)).amax(1)
        return _by_picture(found, texts)


class ClipRanker:
    """CLIP: the cosine of its image and its text feature."""

    def __init__(self, name: str, device: torch.device, precision: str) -> None:
        self.model, self.processor = load_pretrained(name, "AutoModel", device, precision, role="ranker")
        if not hasattr(self.model, "get_text_features"):
            raise ConfigError(
                f"--ranker hf:{name}: a {type(self.model).__name__} compares no texts with images"
            )
        self.longest = self.model.config.text_config.max_position_embeddings
        # SigLIP reads the padding too, and was trained with texts of one length.
        self.padding = "max_length" if "siglip" in self.model.config.model_type else "longest"

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `Ranker`."""
        flat, rows = _flattened(texts)
        if not flat:
            return [[] for _ in texts]
        device = self.model.device
        pixels = self.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        tokens = self.processor.tokenizer(
            flat, padding=self.padding, truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(device)
        image = _feature(self.model.get_image_features(pixel_values=pixels.to(device, self.model.dtype)))
        text = _feature(self.model.get_text_features(**tokens))
        return _by_picture((image[rows.to(device)] * text).sum(-1), texts)


def _feature(output: Any) -> Tensor:
    """[N, E], normalised, of what transformers' 5 (an output with a pooled feature) or an earlier one returns."""
    return normalize(getattr(output, "pooler_output", output).float(), dim=-1)


def _flattened(texts: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """All texts, and the row of each one's picture int64[M]."""
    rows = [row for row, own in enumerate(texts) for _ in own]
    return [text for own in texts for text in own], torch.tensor(rows, dtype=torch.long)


def _by_picture(scores: Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
    return [part.tolist() for part in scores.double().cpu().split([len(own) for own in texts])]

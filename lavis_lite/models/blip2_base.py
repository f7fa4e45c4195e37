"""What every BLIP-2 model has: an image encoder, the Q-Former on top of it, and texts as tokens.

B rows, Q queries, P image tokens, T text tokens, C encoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavis_lite.models.attention_maps import as_grid, cross_attention
from lavis_lite.models.base import BaseModel
from lavis_lite.models.convert.bert import load_bert
from lavis_lite.models.qformer import QFormer, QFormerConfig
from lavis_lite.models.qformer_states import ImageKV, QueryStates
from lavis_lite.models.tokenizer import TextTokenizer, TextTokens
from lavis_lite.models.vision.tower import build_vision_tower
from lavis_lite.samples import Images


class Blip2Base(BaseModel):
    """Encoder, `ln_vision`, learned queries and Q-Former; subclasses add what they learn or generate with it.

    Args:
        vision_encoder: `name` of a registered encoder and its keywords, `freeze`, `precision`, `pretrained`.
        qformer: the Q-Former's shape.
        tokenizer: of texts the Q-Former reads: hub name, local folder, or `shapes`; None builds it without a text side.
        max_txt_len: texts are cut to so many tokens, [CLS] and [SEP] included.
        language_head: whether the Q-Former predicts text.
    """

    optional_keys: ClassVar[tuple[str, ...]] = (r"^visual_encoder\.",)

    def __init__(
        self,
        *,
        vision_encoder: Mapping[str, Any],
        qformer: QFormerConfig,
        tokenizer: str | None,
        max_txt_len: int,
        language_head: bool = True,
    ) -> None:
        super().__init__()
        self._tokenizer = TextTokenizer(tokenizer) if tokenizer is not None else None
        self.max_txt_len = max_txt_len
        self.visual_encoder = build_vision_tower(vision_encoder, where="model.vision_encoder")
        image_width = self.visual_encoder.num_features
        self.ln_vision = nn.LayerNorm(image_width)
        self.Qformer = QFormer(
            qformer,
            vocab_size=len(self._tokenizer) if self._tokenizer is not None else None,
            image_width=image_width,
            language_head=language_head,
        )
        queries = torch.empty(1, qformer.num_query_token, qformer.hidden_size)
        self.query_tokens = nn.Parameter(queries.normal_(std=0.02))

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of texts that the Q-Former reads; RuntimeError in a model whose Q-Former reads none."""
        if self._tokenizer is None:
            raise RuntimeError(
                f"the Q-Former of this {type(self).__name__} reads no text: it has no tokenizer"
            )
        return self._tokenizer

    def load_backbones(self) -> None:
        """Load the encoder's pretrained weights and BERT, where the config asked for them."""
        self.visual_encoder.load_pretrained()
        source = self.Qformer.config.pretrained
        if source:
            load_bert(self.Qformer, source)

    def is_of_backbones(self, name: str) -> bool:
        """The encoder's tensors where `vision_encoder.pretrained` is set."""
        return name.startswith("visual_encoder.") and bool(self.visual_encoder.pretrained)

    def select_weights(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """All tensors, the encoder's position embeddings interpolated where they are for other image sizes."""
        kept, optional = super().select_weights(tensors)
        return self.visual_encoder.fit_positions(kept, prefix="visual_encoder."), optional

    def needs_no_checkpoint(self) -> tuple[str, ...]:
        """The image encoder, where it has weights of its own. BERT gives the Q-Former but half of what it is."""
        return (r"^visual_encoder\.",) if self.visual_encoder.pretrained else ()

    def lr_scale(self, name: str, decay: float) -> float:
        """Layer-wise decay applies to the image encoder only."""
        prefix = "visual_encoder."
        if not name.startswith(prefix):
            return 1.0
        return self.visual_encoder.lr_scale(name.removeprefix(prefix), decay)

    def no_weight_decay(self) -> set[str]:
        """The queries: pulling them to zero means nothing."""
        return {"query_tokens"}

    def encode_image(self, image: Images) -> Tensor:
        """Images [B, 3, H, W], or the encoder's stored features of them -> features [B, P, C] after `ln_vision`, which
        computes in float32."""
        features = self.visual_encoder(image)
        with torch.autocast(features.device.type, enabled=False):
            return self.ln_vision(features.float())

    def project_image(self, image_embeds: Tensor) -> ImageKV:
        """Features [B, P, C] -> keys and values for every cross-attention, computed once per image."""
        return self.Qformer.project_image(image_embeds)

    def encode_queries(self, images: ImageKV | Tensor) -> QueryStates:
        """The queries' states [B, Q, D] after they have seen the images and no text.

        Args:
            images: projected, or features [B, P, C] where nothing else will look at them.
        """
        return self.Qformer.encode_queries(self.query_tokens, images)

    @torch.no_grad()
    def where_queries_look(self, image: Images, texts: Sequence[str] | None = None) -> Tensor:
        """How much attention each part of the images gets: float32[B, side, side], the mean over queries, heads and the
        blocks that look at the image.

        It shows what the queries read from, not what decided the answer. Sums are below 1 where class tokens got some.

        Args:
            image: [B, 3, H, W], or stored features. texts: B texts that the queries read beside the images; None for
                images alone.

        Raises InputError where images or their tokens are no square grid.
        """
        image_kv = self.project_image(self.encode_image(image))

        def look() -> None:
            if texts is None:
                self.encode_queries(image_kv)
            else:
                self.Qformer.encode_pairs(self.query_tokens, image_kv, self.tokenize(texts))

        picture = image.shape[-2:] if isinstance(image, Tensor) else None
        return as_grid(cross_attention(self.Qformer, image_kv, look).mean((0, 2, 3)), picture)

    def tokenize(self, texts: Sequence[str]) -> TextTokens:
        """Texts -> tokens on the model's device, cut to `max_txt_len`."""
        return self.tokenizer(texts, max_length=self.max_txt_len).to(self.device)

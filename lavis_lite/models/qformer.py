"""The Querying Transformer (BLIP-2, section 3.1), arranged so that nothing is computed twice.

B rows, Q queries, T text tokens, N real text tokens of all rows together, P image tokens, D width, V
vocabulary.

Three masks over the same parameters decide what depends on what (rows look at columns):

              unimodal (ITC)      bidirectional (ITM)      causal (ITG)
               Q Q t t t             Q Q t t t              Q Q t t t
            Q  x x . . .             x x x x x              x x . . .
            Q  x x . . .             x x x x x              x x . . .
            t  . . x x x             x x x x x              x x x . .
            t  . . x x x             x x x x x              x x x x .
            t  . . x x x             x x x x x              x x x x x

From which follows the arrangement below, none of which changes a result:
- Keys and values of an image in every cross-attention depend on the image alone: `project_image`, once per
  image.
- Queries don't see text under the first and third mask: `encode_queries` serves ITC and, with the keys and
  values of its self-attention, ITG. Text doesn't see queries under the first: `encode_text` without a prefix.
- Padding is never an input of a dense layer: text is kept as its N real tokens, spread out only for
  attention.
- Under the second mask too nothing has seen the image before the first cross-attention, and text before the second
  block: `begin_pairs` serves all images that a text is paired with.
- In the last block only the rows that somebody reads go beyond their keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, linear

from lavis_lite.common.device import device_type_of
from lavis_lite.common.errors import ConfigError
from lavis_lite.models.qformer_layers import EPS, QFormerLayer
from lavis_lite.models.qformer_states import (
    ImageKV,
    KeysValues,
    PairStart,
    QueryStates,
    RealTokens,
    Shares,
    UnprojectedImages,
    rounded,
)
from lavis_lite.models.tokenizer import TextTokens


@dataclass(frozen=True)
class QFormerConfig:
    """The Q-Former's shape; the defaults are BERT-base's, as in the paper.

    cross_attention_freq: blocks 0, f, 2f, ... look at the image.
    num_query_token: Q. dropout: of attention weights, embeddings and sublayer outputs.
    max_position_embeddings: longest text. pretrained: BERT to start from, a hub name or a folder; null =
        random.
    """

    num_layers: int = 12
    hidden_size: int = 768
    num_heads: int = 12
    intermediate_size: int = 3072
    num_query_token: int = 32
    cross_attention_freq: int = 2
    dropout: float = 0.1
    max_position_embeddings: int = 512
    pretrained: str | None = None

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "num_heads", "intermediate_size", "num_query_token")
        for name in (*sizes, "cross_attention_freq", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.qformer.{name}: must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.qformer.hidden_size: {self.hidden_size} is no multiple of num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.qformer.dropout: must be in [0, 1), got {self.dropout}")


class TextEmbeddings(nn.Module):
    """BERT's embeddings; word and position tables are for text only, the LayerNorm is for queries as well."""

    def __init__(self, config: QFormerConfig, vocab_size: int | None) -> None:
        super().__init__()
        if vocab_size is not None:
            self.word_embeddings = nn.Embedding(vocab_size, config.hidden_size)
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=EPS)
        self.dropout = config.dropout

    def forward(self, words: Tensor, positions: Tensor) -> Tensor:
        """Looked-up words [..., D] and their int64 positions [...] -> [..., D]."""
        return self.norm(words + self.position_embeddings(positions))

    def norm(self, x: Tensor) -> Tensor:
        """LayerNorm and dropout, the end of both kinds of embedding."""
        return dropout(self.LayerNorm(x), self.dropout, self.training)


class LanguageModelHead(nn.Module):
    """BERT's prediction head; its decoder is the word embedding itself, so that no weight is held twice."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = nn.ModuleDict(
            {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=EPS)}
        )
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """[N, D] -> logits [N, V]."""
        hidden = self.transform["LayerNorm"](gelu(self.transform["dense"](hidden)))
        return linear(hidden, word_embeddings, self.bias)


class QFormer(nn.Module):
    """The Querying Transformer: queries [Q, D], images [B, P, C] and texts in, states of width D out.

    Args:
        vocab_size: V; None builds it without what only text needs (embedding tables, text FFNs, prediction head):
            107M instead of 188M parameters at full size.
        image_width: C.
        language_head: build the head that predicts text, which only ITG needs.
    """

    def __init__(
        self,
        config: QFormerConfig,
        *,
        vocab_size: int | None,
        image_width: int,
        language_head: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        layers = nn.ModuleList(
            QFormerLayer(
                width=config.hidden_size,
                num_heads=config.num_heads,
                intermediate_size=config.intermediate_size,
                image_width=image_width if index % config.cross_attention_freq == 0 else None,
                dropout=config.dropout,
                text=vocab_size is not None,
            )
            for index in range(config.num_layers)
        )
        encoder = nn.ModuleDict({"layer": layers})
        self.bert = nn.ModuleDict({"embeddings": TextEmbeddings(config, vocab_size), "encoder": encoder})
        if vocab_size is not None and language_head:
            self.cls = nn.ModuleDict({"predictions": LanguageModelHead(config.hidden_size, vocab_size)})
        self.apply(init_bert_weights)

    @property
    def embeddings(self) -> TextEmbeddings:
        """The text embeddings."""
        return cast(TextEmbeddings, self.bert["embeddings"])

    @property
    def layers(self) -> list[QFormerLayer]:
        """The blocks, first to last."""
        encoder = cast(nn.ModuleDict, self.bert["encoder"])
        return cast("list[QFormerLayer]", encoder["layer"])

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [N, V] of text states [N, D]."""
        count = hidden.shape[0]
        filled = F.pad(hidden, (0, 0, 0, rounded(count) - count))  # see `RealTokens`
        logits: Tensor = self.cls["predictions"](filled, self.embeddings.word_embeddings.weight)
        return logits[:count]

    def look_up(self, tokens: TextTokens, *, dec_id: int) -> TextTokens:
        """The same tokens with their word embeddings and that of [DEC], for all that is to be done with them.

        Every look-up's gradient is as large as the table (30,523 x 768): one instead of one for each loss. On a CPU
        it is sparse until the prediction head's, a full one, comes to it: to fill that table with zeros took 7% of a
        step. On a GPU the sum of both would add repeated words in no fixed order.
        """
        ids = torch.cat([tokens.input_ids.flatten(), tokens.input_ids.new_tensor([dec_id])])
        table = self.embeddings.word_embeddings.weight
        words = F.embedding(ids, table, sparse=device_type_of(table) == "cpu")
        return replace(tokens, words=words[:-1].unflatten(0, tokens.input_ids.shape), dec_word=words[-1])

    def project_image(self, image_embeds: Tensor) -> ImageKV:
        """Every cross-attention's keys and values of images float[B, P, C], for all that is to look at them."""
        features = self._features(image_embeds)
        attentions = features.attentions
        return ImageKV(tuple(a.keys_values(features.embeds) if a is not None else None for a in attentions))

    def _features(self, image_embeds: Tensor) -> UnprojectedImages:
        device = image_embeds.device.type
        if torch.is_autocast_enabled(device):
            # Once here, or each of the twelve projections would make and keep its own copy.
            image_embeds = image_embeds.to(torch.get_autocast_dtype(device))
        return UnprojectedImages(image_embeds, tuple(layer.crossattention for layer in self.layers))

    def encode_queries(self, query_tokens: Tensor, images: ImageKV | Tensor) -> QueryStates:
        """Queries [1, Q, D] look at each image, and at no text.

        Args:
            images: projected, or float[B, P, C] where nothing else will look at them.
        """
        seen = self._features(images) if isinstance(images, Tensor) else images
        hidden = self._embed_queries(query_tokens, len(seen))
        kept = []
        for index, layer in enumerate(self.layers):
            key, value = layer.attention.keys_values(hidden)
            attended = layer.attention.attend(layer.attention.query(hidden), key, value)
            hidden = layer.finish_queries(attended, hidden, seen.looks(index))
            kept.append((key, value))
        return QueryStates(hidden, tuple(kept))

    def encode_text(
        self, tokens: TextTokens, *, prefix: QueryStates | None = None, read: Literal["first", "all"] = "all"
    ) -> Tensor:
        """Text alone, every token seeing all others (unimodal mask); with `prefix`, the decoder's causal
        mask.

        Args:
            prefix: the queries of the same B rows, which every token of a text to be decoded sees beside
                earlier text.
            read: "first": only [CLS] is wanted, so the last block computes nothing else.

        Returns: [N, D], the real tokens row after row, or [B, D] of the first ones.
        """
        real = RealTokens(tokens.attention_mask)
        hidden = self._embed_text(tokens, real)
        mask = _text_mask(real, prefix, hidden.device)
        for index, layer in enumerate(self.layers):
            key, value = (real.spread(x) for x in layer.attention.keys_values(hidden))
            if prefix is not None:
                key, value = _behind(prefix.keys_values[index], (key, value))
            if read == "first" and layer is self.layers[-1]:
                hidden = real.first_of_rows(hidden)
                query = layer.attention.query(hidden).unsqueeze(1)
                attended = layer.attention.attend(query, key, value, mask).squeeze(1)
            else:
                query = real.spread(layer.attention.query(hidden))
                attended = real.pack(layer.attention.attend(query, key, value, mask))
            hidden = layer.finish_text(attended, hidden)
        return hidden if read == "first" else hidden[: real.count]

    def begin_pairs(self, query_tokens: Tensor, tokens: TextTokens) -> PairStart:
        """Queries [1, Q, D] and texts up to the first look at an image, for all images they are to be paired with."""
        real = RealTokens(tokens.attention_mask)
        mask = _pair_mask(real, query_tokens.shape[1])
        queries, text = self._begin_pairs(query_tokens, tokens, real, mask)
        return PairStart(queries, real.spread(text), tokens.attention_mask)

    def encode_pairs(
        self, query_tokens: Tensor, images: ImageKV | Tensor | Shares, texts: TextTokens | PairStart
    ) -> Tensor:
        """Queries and text that all see each other (bidirectional mask).

        Args:
            query_tokens: [1, Q, D].
            images: I images for B texts, B a multiple of I: each image serves B/I texts in a row; projected, or
                float[I, P, C] where nothing else will look at them. Or several groups of projected ones, one after
                the other, each with how many texts an image of it serves.
            texts: B of them, or what `begin_pairs` made of them with the same queries.

        Returns: the queries' states [B, Q, D].

        Raises ValueError when the images don't serve B texts.
        """
        shares = self._shares(images, len(texts))
        real = RealTokens(texts.attention_mask)
        mask = _pair_mask(real, query_tokens.shape[1])
        if isinstance(texts, PairStart):
            queries, text = texts.queries, real.pack(texts.text)
        else:
            queries, text = self._begin_pairs(query_tokens, texts, real, mask)
        for index, layer in enumerate(self.layers):
            if index > 0:
                queries, text = self._meet(index, queries, text, real, mask)
            queries = layer.look(queries, [look for kv, each in shares for look in kv.looks(index, each)])
        return queries

    def _shares(self, images: ImageKV | Tensor | Shares, rows: int) -> Shares:
        if isinstance(images, (ImageKV, Tensor)):
            seen = self._features(images) if isinstance(images, Tensor) else images
            images = [(seen, rows // len(seen))]
        if sum(len(kv) * each for kv, each in images) != rows:
            count = sum(len(kv) for kv, _ in images)
            raise ValueError(f"{count} images can't serve {rows} texts: give as many, or a multiple")
        return images

    def _begin_pairs(
        self, query_tokens: Tensor, tokens: TextTokens, real: RealTokens, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        queries = self._embed_queries(query_tokens, len(tokens))
        return self._meet(0, queries, self._embed_text(tokens, real), real, mask)

    def _meet(
        self, index: int, queries: Tensor, text: Tensor, real: RealTokens, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Queries and text through a block's self-attention, and text through what follows.

        Args:
            queries: [B, Q, D], or [1, Q, D] while all rows are the same. text: [N + fill, D].

        Returns: the queries before the block's cross-attention [B, Q, D], and the text after the block; in the last
            block, where nobody reads it any more, as it was.
        """
        layer, rows, num_query = self.layers[index], real.shape[0], queries.shape[1]
        attention = layer.attention
        spread = tuple(real.spread(x) for x in attention.keys_values(text))
        key, value = _behind(attention.keys_values(queries), (spread[0], spread[1]))
        query = attention.query(queries).expand(rows, -1, -1)
        if layer is self.layers[-1]:
            return attention.output(attention.attend(query, key, value, mask), queries), text
        query = torch.cat([query, real.spread(attention.query(text))], 1)
        attended = attention.attend(query, key, value, mask)
        text = layer.finish_text(real.pack(attended[:, num_query:]), text)
        return attention.output(attended[:, :num_query], queries), text

    def _embed_queries(self, query_tokens: Tensor, rows: int) -> Tensor:
        # Without dropout all rows are the same until they see image or text: one row stands for them.
        if self.training and self.config.dropout > 0:
            query_tokens = query_tokens.expand(rows, -1, -1)
        return self.embeddings.norm(query_tokens)

    def _embed_text(self, tokens: TextTokens, real: RealTokens) -> Tensor:
        batch, length = tokens.input_ids.shape
        positions = torch.arange(length, device=tokens.input_ids.device).expand(batch, length)
        if tokens.words is None:
            words = self.embeddings.word_embeddings(real.pack(tokens.input_ids))
        else:
            words = real.pack(tokens.words)
        return self.embeddings(words, real.pack(positions))


def _behind(first: KeysValues, second: KeysValues) -> KeysValues:
    """Keys and values of both, `first` (of B rows or one for all) before `second` [B, T, D]."""
    rows = second[0].shape[0]
    joined = [torch.cat([a.expand(rows, -1, -1), b], 1) for a, b in zip(first, second, strict=True)]
    return joined[0], joined[1]


def _pair_mask(real: RealTokens, num_query: int) -> Tensor | None:
    """All may look at the queries and at real tokens; None = everything."""
    if real.mask is None:
        return None
    return torch.cat([real.mask.new_ones(real.shape[0], num_query), real.mask], 1)[:, None, None]


def _text_mask(real: RealTokens, prefix: QueryStates | None, device: torch.device) -> Tensor | None:
    """What text tokens may look at; None = everything."""
    if prefix is None:
        return None if real.mask is None else real.mask[:, None, None]
    # Padding follows all real tokens, so the causal mask alone hides it from them.
    length, num_query = real.shape[1], prefix.output.shape[1]
    return torch.ones(length, num_query + length, dtype=torch.bool, device=device).tril(num_query)


def init_bert_weights(module: nn.Module) -> None:
    """BERT's initialisation: N(0, 0.02) for weights, zero for biases, identity for LayerNorm."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)

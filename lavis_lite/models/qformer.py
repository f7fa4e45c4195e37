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
- In the last block only the rows that somebody reads go beyond their keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, linear

from lavis_lite.common.device import device_type_of
from lavis_lite.common.errors import ConfigError
from lavis_lite.models.qformer_layers import EPS, Attention, QFormerLayer
from lavis_lite.models.rows import take_rows
from lavis_lite.models.tokenizer import TextTokens

KeysValues = tuple[Tensor, Tensor]


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


@dataclass(frozen=True)
class ImageKV:
    """The keys and values of I images for every cross-attention block.

    layers: one entry per block, (keys, values) float[I, P, D] or None where the block doesn't look at the
        image.
    """

    layers: tuple[KeysValues | None, ...]

    def __len__(self) -> int:
        return next(kv[0].shape[0] for kv in self.layers if kv is not None)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> ImageKV:
        """The chosen images, in that order, repeated where an index is."""
        return ImageKV(tuple(kv and (take_rows(kv[0], rows), take_rows(kv[1], rows)) for kv in self.layers))

    def looks(self, layer: int, each: int = 1) -> list[tuple[Tensor, Tensor, int]]:
        """What a block sees when `each` rows in a row look at every image; nothing without cross-attention."""
        kv = self.layers[layer]
        return [] if kv is None else [(*kv, each)]


@dataclass(frozen=True)
class ImageFeatures:
    """Images that are looked at once: a block's keys and values are made when it asks for them and not kept.

    For 16 images at full size those of all blocks would be 150 MB, and to get so much fresh memory took 4% of greedy
    generation's time (benchmarks/generate.py).

    embeds: float[I, P, C]. attentions: of every block the one that looks at the image, or None.
    """

    embeds: Tensor
    attentions: tuple[Attention | None, ...]

    def __len__(self) -> int:
        return len(self.embeds)

    def looks(self, layer: int, each: int = 1) -> list[tuple[Tensor, Tensor, int]]:
        """See `ImageKV.looks`."""
        attention = self.attentions[layer]
        return [] if attention is None else [(*attention.keys_values(self.embeds), each)]


# Groups of images, each with how many rows one after the other look at an image of it.
Shares = Sequence[tuple[ImageKV, int]]


@dataclass(frozen=True)
class QueryStates:
    """Queries that have seen images and no text.

    output: float[B, Q, D]. keys_values: of the self-attention of every block, float[B or 1, Q, D] each.
    """

    output: Tensor
    keys_values: tuple[KeysValues, ...]


class RealTokens:
    """Which places of a padded batch [B, T] hold tokens, and the way between the two arrangements.

    Packed tokens are followed by up to 3% of fill, copies of the first one that nothing reads: kernels made for a
    number of rows can then be used again. With a number of its own in every batch oneDNN made new ones at each step.
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        places = mask.flatten().nonzero().squeeze(1)
        self.count = places.numel()
        fill = _rounded(self.count) - self.count
        # A batch without padding needs no moving about.
        self.places = None if self.count == mask.numel() else F.pad(places, (0, fill))
        self.mask = None if self.places is None else mask
        self.first = (mask.sum(1).cumsum(0) - mask.sum(1)) if self.places is not None else None

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [N + fill, ...], row after row."""
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)

    def spread(self, x: Tensor) -> Tensor:
        """[N + fill, D] -> [B, T, D] with zeros at padding."""
        if self.places is not None:
            places = self.places[: self.count]
            x = x.new_zeros(self.shape.numel(), x.shape[-1]).index_copy(0, places, x[: self.count])
        return x.unflatten(0, self.shape)

    def first_of_rows(self, x: Tensor) -> Tensor:
        """[N + fill, D] -> [B, D], the first token of every row ([CLS])."""
        if self.first is None:
            return x.unflatten(0, self.shape)[:, 0]
        return x.index_select(0, self.first)


def _rounded(count: int) -> int:
    """The next of 32 sizes between powers of two."""
    step = 1 << max(0, count.bit_length() - 6)
    return -(-count // step) * step


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
        filled = F.pad(hidden, (0, 0, 0, _rounded(count) - count))  # see `RealTokens`
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

    def _features(self, image_embeds: Tensor) -> ImageFeatures:
        device = image_embeds.device.type
        if torch.is_autocast_enabled(device):
            # Once here, or each of the twelve projections would make and keep its own copy.
            image_embeds = image_embeds.to(torch.get_autocast_dtype(device))
        return ImageFeatures(image_embeds, tuple(layer.crossattention for layer in self.layers))

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

    def encode_pairs(
        self, query_tokens: Tensor, images: ImageKV | Tensor | Shares, tokens: TextTokens
    ) -> Tensor:
        """Queries and text that all see each other (bidirectional mask).

        Args:
            query_tokens: [1, Q, D].
            images: I images for B texts, B a multiple of I: each image serves B/I texts in a row; projected, or
                float[I, P, C] where nothing else will look at them. Or several groups of projected ones, one after
                the other, each with how many texts an image of it serves.

        Returns: the queries' states [B, Q, D].

        Raises ValueError when the images don't serve B texts.
        """
        rows, num_query = len(tokens), query_tokens.shape[1]
        shares: Sequence[tuple[ImageKV | ImageFeatures, int]]
        if isinstance(images, (ImageKV, Tensor)):
            seen = self._features(images) if isinstance(images, Tensor) else images
            shares = [(seen, rows // len(seen))]
        else:
            shares = images
        if sum(len(kv) * each for kv, each in shares) != rows:
            count = sum(len(kv) for kv, _ in shares)
            raise ValueError(f"{count} images can't serve {rows} texts: give as many, or a multiple")
        real = RealTokens(tokens.attention_mask)
        queries, text = self._embed_queries(query_tokens, rows), self._embed_text(tokens, real)
        mask = None
        if real.mask is not None:
            mask = torch.cat([real.mask.new_ones(rows, num_query), real.mask], 1)[:, None, None]
        for index, layer in enumerate(self.layers):
            attention = layer.attention
            looks = [look for kv, each in shares for look in kv.looks(index, each)]
            spread = tuple(real.spread(x) for x in attention.keys_values(text))
            key, value = _behind(attention.keys_values(queries), (spread[0], spread[1]))
            query = attention.query(queries).expand(rows, -1, -1)
            if layer is self.layers[-1]:
                return layer.finish_queries(attention.attend(query, key, value, mask), queries, looks)
            query = torch.cat([query, real.spread(attention.query(text))], 1)
            attended = attention.attend(query, key, value, mask)
            queries = layer.finish_queries(attended[:, :num_query], queries, looks)
            text = layer.finish_text(real.pack(attended[:, num_query:]), text)
        raise AssertionError("unreachable: a Q-Former has at least one block")

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

"""The parts of a Q-Former block, post-norm as in BERT and with BERT's parameter names.

B rows, Q queries, T text tokens, N real text tokens of all rows together, P image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu

from lavis_lite.models.attention import attend

EPS = 1e-12  # of every LayerNorm in BERT

# Keys and values [I, P, D] of I images, and how many rows one after the other look at each of them.
Looks = Sequence[tuple[Tensor, Tensor, int]]


class AddNorm(nn.Module):
    """LayerNorm(residual + dropout(dense(x))): how every sublayer of a post-norm block ends."""

    def __init__(self, in_features: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x [..., in_features], residual broadcastable to [..., D] -> [..., D]."""
        return self.LayerNorm(residual + dropout(self.dense(x), self.dropout, self.training))


class Intermediate(nn.Module):
    """The widening half of a feed-forward network: gelu(dense(x))."""

    def __init__(self, width: int, intermediate_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., intermediate_size]."""
        return gelu(self.dense(x))


class Attention(nn.Module):
    """Multi-head attention whose projections can be called apart, so that keys and values can be kept."""

    def __init__(self, width: int, context_width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        # BERT's name for the projections; [] below because `self.self` reads badly.
        projections = {"query": width, "key": context_width, "value": context_width}
        self.self = nn.ModuleDict({name: nn.Linear(size, width) for name, size in projections.items()})
        self.output = AddNorm(width, width, dropout)

    def query(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.self["query"](x)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[..., context width] -> keys and values [..., D]."""
        return self.self["key"](context), self.self["value"](context)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Projected queries [B, L, D] over projected keys and values [B, S, D] -> [B, L, D]."""
        rate = self.dropout if self.training else 0.0
        return attend(query, key, value, num_heads=self.num_heads, mask=mask, dropout=rate)


class QFormerLayer(nn.Module):
    """A block: self-attention shared by queries and text, cross-attention for queries, an FFN for each."""

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        intermediate_size: int,
        image_width: int | None,
        dropout: float,
        text: bool = True,
    ) -> None:
        super().__init__()
        self.attention = Attention(width, width, num_heads, dropout)
        # Set only where the block looks at the image: every `cross_attention_freq`-th one.
        self.crossattention = Attention(width, image_width, num_heads, dropout) if image_width else None
        # Without a text side (stage 2) text's own network isn't built at all.
        self.intermediate = Intermediate(width, intermediate_size) if text else None
        self.output = AddNorm(intermediate_size, width, dropout) if text else None
        self.intermediate_query = Intermediate(width, intermediate_size)
        self.output_query = AddNorm(intermediate_size, width, dropout)

    def finish_text(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """What follows self-attention for text: both [N, D] -> [N, D]."""
        assert self.intermediate is not None and self.output is not None, "built without a text side"
        hidden = self.attention.output(attended, hidden)
        return self.output(self.intermediate(hidden), hidden)

    def finish_queries(self, attended: Tensor, hidden: Tensor, images: Looks) -> Tensor:
        """What follows self-attention for queries: both [B or 1, Q, D] -> [B or 1, Q, D]; `images` as in `look`."""
        return self.look(self.attention.output(attended, hidden), images)

    def look(self, hidden: Tensor, images: Looks) -> Tensor:
        """What follows the queries' self-attention, which no image has a part in: [B or 1, Q, D] -> the same.

        Args:
            images: what this block's cross-attention looks at; empty where it has none. The rows of an image have
                their queries laid side by side rather than the image repeated.
        """
        if self.crossattention is not None:
            assert images, "a block with cross-attention needs the image's keys and values"
            hidden = self._look_at_images(hidden, images)
        return self.output_query(self.intermediate_query(hidden), hidden)

    def _look_at_images(self, hidden: Tensor, images: Looks) -> Tensor:
        assert self.crossattention is not None
        counts = [len(key) * each for key, _, each in images]
        query = self.crossattention.query(hidden).expand(sum(counts), -1, -1)
        seen = []
        for rows, (key, value, _) in zip(query.split(counts), images, strict=True):
            side_by_side = rows.reshape(len(key), -1, rows.shape[-1])
            seen.append(self.crossattention.attend(side_by_side, key, value).reshape(rows.shape))
        joined = seen[0] if len(seen) == 1 else torch.cat(seen)
        return self.crossattention.output(joined, hidden)

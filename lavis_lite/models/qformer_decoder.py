"""The Q-Former saying captions token by token: the ITG mask with every key and value kept."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_lite.models.qformer import QFormer
from lavis_lite.models.qformer_states import KeysValues, QueryStates


class QFormerDecoder:
    """A `decoding.Decoder`: the queries' keys and values were computed once, each step adds one token's.

    Args:
        prefix: queries that have seen B images. rows_per_image: R / B beams or samples of each.
    """

    def __init__(self, qformer: QFormer, prefix: QueryStates, *, rows_per_image: int = 1) -> None:
        self._qformer = qformer
        rows = torch.arange(prefix.output.shape[0], device=prefix.output.device).repeat_interleave(
            rows_per_image
        )
        self._kept: list[KeysValues] = [
            (_rows_of(key, rows), _rows_of(value, rows)) for key, value in prefix.keys_values
        ]
        self._length = 0

    def step(self, ids: Tensor) -> Tensor:
        """The next token int64[R] of every row -> logits [R, V] of the one after it."""
        qformer = self._qformer
        words = qformer.embeddings.word_embeddings(ids)
        hidden = qformer.embeddings(words, torch.full_like(ids, self._length))
        for index, layer in enumerate(qformer.layers):
            new = layer.attention.keys_values(hidden)
            key, value = (
                torch.cat([old, x[:, None]], 1) for old, x in zip(self._kept[index], new, strict=True)
            )
            self._kept[index] = (key, value)
            query = layer.attention.query(hidden)[:, None]
            hidden = layer.finish_text(layer.attention.attend(query, key, value).squeeze(1), hidden)
        self._length += 1
        return qformer.lm_logits(hidden)

    def reorder(self, rows: Tensor) -> None:
        """Row r goes on from where row `rows[r]` was."""
        self._kept = [(key[rows], value[rows]) for key, value in self._kept]


def _rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """The chosen rows; a single row stands for all."""
    return x.expand(rows.numel(), -1, -1) if x.shape[0] == 1 else x[rows]

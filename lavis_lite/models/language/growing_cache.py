"""Keys and values of a decoder's past, arranged so that a step moves little of them.

transformers' own dynamic cache copies all of the past twice a step of beam search: once to put beams in order, once to
append a token. Here what the rows of an input have in common (visual prompt and prompt) stays in its place, and tokens
are written into room kept for them: with 36 places of prompt, 20 new tokens and 5 beams an eighth of the copying.

R rows, H heads, S places, D head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, DynamicLayer

ROOM = 32  # places added when there is none left


class GrowingLayer(DynamicLayer):
    """Of one block: `keys` and `values` [R, H, S, D] are the filled part of buffers with more places.

    shared: so many places, the first, are the same for all rows of an input.
    """

    shared = 0
    buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append places; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        old, new = self.get_seq_length(), key_states.shape[-2]
        if self.buffers is None or old + new > self.buffers[0].shape[-2]:
            self.buffers = self._enlarged(self.keys, new), self._enlarged(self.values, new)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, old : old + new] = states
        self.keys, self.values = (buffer[:, :, : old + new] for buffer in self.buffers)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes so many, which share all places filled so far."""
        super().batch_repeat_interleave(repeats)
        self.shared, self.buffers = self.get_seq_length(), None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r goes on from where row `beam_idx[r]` of the same input was."""
        for states in (self.keys, self.values):
            own = states[:, :, self.shared :]
            own.copy_(own.index_select(0, beam_idx))

    @staticmethod
    def _enlarged(states: Tensor, new: int) -> Tensor:
        rows, heads, old, width = states.shape
        buffer = states.new_empty(rows, heads, old + new + ROOM, width)
        buffer[:, :, :old] = states
        return buffer


class GrowingCache(DynamicCache):
    """A cache of such layers, which come into being as the model's blocks run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer


def selected(cache: Any, rows: Tensor) -> DynamicCache:
    """A cache of its own with the past of the chosen rows int64[R], repeated where an index is."""
    chosen = DynamicCache()
    for number, layer in enumerate(cache.layers):
        chosen.update(layer.keys.index_select(0, rows), layer.values.index_select(0, rows), number)
    return chosen

"""The decoder's cache against transformers' own, which copies everything every time."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from lavis_lite.models.language.growing_cache import ROOM, GrowingCache

LAYERS, HEADS, WIDTH, INPUTS, PROMPT = 2, 3, 4, 2, 5


@pytest.mark.parametrize("beams", [1, 3])
def test_same_keys_and_values_as_a_cache_that_copies_all(beams: int) -> None:
    """Steps enough to outgrow the room twice, with beams in a new order after each."""
    draw = torch.Generator().manual_seed(0)
    caches = GrowingCache(), DynamicCache()

    def append(rows: int, places: int) -> None:
        for layer in range(LAYERS):
            states = torch.randn(2, rows, HEADS, places, WIDTH, generator=draw)
            ours, theirs = (cache.update(states[0], states[1], layer) for cache in caches)
            for own, expected in zip(ours, theirs, strict=True):
                assert torch.equal(own, expected)

    append(INPUTS, PROMPT)
    if beams > 1:
        for cache in caches:
            cache.batch_repeat_interleave(beams)
    for _ in range(2 * ROOM + 3):
        append(INPUTS * beams, 1)
        if beams > 1:
            order = torch.randint(beams, (INPUTS, beams), generator=draw) + torch.tensor([[0], [beams]])
            for cache in caches:
                cache.reorder_cache(order.flatten())
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == PROMPT + 2 * ROOM + 3

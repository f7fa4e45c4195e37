"""Where queries look: cross-attention weights of a pass, worked out from what it computes anyway.

B rows, Q queries, P image tokens, L blocks that look at the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lavis_lite.models.qformer import QFormer
from lavis_lite.models.qformer_states import ImageKV


@torch.no_grad()
def cross_attention(qformer: QFormer, images: ImageKV, look: Callable[[], Any]) -> Tensor:
    """The weights float32[L, B, heads, Q, P] with which queries look at image tokens while `look()` runs.

    They sum to 1 over P. The pass itself is not changed: attention kernels keep no weights, so these are computed
    again from the queries that the pass projects.

    Args:
        images: B of them, the ones that `look()` gives to its one pass of the Q-Former.
    """
    seen: list[Tensor] = []
    blocks = [layer.crossattention for layer in qformer.layers if layer.crossattention is not None]
    hooks = [
        block.self["query"].register_forward_hook(lambda module, inputs, output: seen.append(output))
        for block in blocks
    ]
    try:
        look()
    finally:
        for hook in hooks:
            hook.remove()
    keys = [kv[0] for kv in images.layers if kv is not None]
    weights = []
    for block, query, key in zip(blocks, seen, keys, strict=True):
        q, k = (x.float().unflatten(-1, (block.num_heads, -1)).transpose(1, 2) for x in (query, key))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # one row of equal queries serves all images
        weights.append(scores.softmax(-1))
    return torch.stack(weights)


def as_grid(weights: Tensor) -> Tensor:
    """Weights [..., P] over image tokens -> [..., side, side]; class and register tokens, which come first, left out.

    What these had is missing from the sum, so it says how much went to the picture itself.
    """
    side = math.isqrt(weights.shape[-1])
    return weights[..., weights.shape[-1] - side * side :].unflatten(-1, (side, side))

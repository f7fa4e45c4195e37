"""What cross-attention did in a pass, worked out from what the pass computes anyway: where queries looked, and what
came of it.

B rows, Q queries, P image tokens, L blocks that look at the image, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lavis_lite.common.errors import InputError
from lavis_lite.models.qformer import QFormer
from lavis_lite.models.qformer_layers import Attention
from lavis_lite.models.qformer_states import ImageKV

# A class token and nine registers are the most that an encoder of timm has before its patches.
MOST_PREFIX = 10


@dataclass(frozen=True)
class Recorded:
    """Of every cross-attention of one pass, first block to last: the queries it projected [B or 1, Q, D], and what
    these read, the heads' contexts side by side [B, Q, D]."""

    blocks: list[Attention]
    queries: list[Tensor] = field(default_factory=list)
    contexts: list[Tensor] = field(default_factory=list)

    def keep_context(self, context: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of what follows attention; where a gradient is wanted, it reaches the context even in a model
        whose parameters are all frozen."""
        if torch.is_grad_enabled() and not context.requires_grad:
            context = context.detach().requires_grad_()
        self.contexts.append(context)
        return context, residual


@contextmanager
def _recording(qformer: QFormer) -> Iterator[Recorded]:
    """Records the one pass that runs inside; the pass itself is not changed."""
    seen = Recorded([layer.crossattention for layer in qformer.layers if layer.crossattention is not None])
    with ExitStack() as hooks:
        for block in seen.blocks:
            for handle in (
                block.self["query"].register_forward_hook(
                    lambda _, inputs, output: seen.queries.append(output)
                ),
                block.output.register_forward_pre_hook(lambda _, inputs: seen.keep_context(*inputs)),
            ):
                hooks.callback(handle.remove)
        yield seen


@torch.no_grad()
def cross_attention(qformer: QFormer, images: ImageKV, look: Callable[[], Any]) -> Tensor:
    """The weights float32[L, B, heads, Q, P] with which queries look at image tokens while `look()` runs.

    They sum to 1 over P. Attention kernels keep no weights, so these are computed again from the queries that the pass
    projects.

    Args:
        images: B of them, the ones that `look()` gives to its one pass of the Q-Former.
    """
    with _recording(qformer) as seen:
        look()
    keys = [key for key, _ in _of_blocks(images)]
    return torch.stack([_weights(*each) for each in zip(seen.blocks, seen.queries, keys, strict=True)])


@torch.no_grad()
def attention_effects(
    qformer: QFormer, images: ImageKV, score: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """How much of a score came through each attention weight: w * d score / d w, float32[L, B, heads, Q, P], signed.

    A head's context is a sum of w v over image tokens, so d score / d w = v . d score / d context: one backward pass
    to the contexts gives it exactly, through whatever kernel attended.

    Args:
        images: B of them, the ones that `score()` gives to its one pass of the Q-Former.
        score: scores [B], each of its row alone; no dropout.

    Returns: the scores float[B], and the effects.
    """
    with torch.enable_grad(), _recording(qformer) as seen:
        scores = score()
        # Zeros for a block that no score came through: of queries alone the last one's output is read by nobody.
        gradients = torch.autograd.grad(scores.sum(), seen.contexts, materialize_grads=True)
    effects = []
    for block, query, gradient, (key, value) in zip(
        seen.blocks, seen.queries, gradients, _of_blocks(images), strict=True
    ):
        slope = _heads(block, gradient) @ _heads(block, value).transpose(-1, -2)
        effects.append(_weights(block, query, key) * slope)
    return scores.detach(), torch.stack(effects)


def _of_blocks(images: ImageKV) -> list[tuple[Tensor, Tensor]]:
    return [kv for kv in images.layers if kv is not None]


def _weights(block: Attention, query: Tensor, key: Tensor) -> Tensor:
    q, k = _heads(block, query), _heads(block, key)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # one row of equal queries serves all images
    return scores.softmax(-1)


def _heads(block: Attention, x: Tensor) -> Tensor:
    """[B, n, D] -> float32[B, heads, n, D / heads]."""
    return x.float().unflatten(-1, (block.num_heads, -1)).transpose(1, 2)


def as_grid(weights: Tensor, picture: Sequence[int] | None = None) -> Tensor:
    """Weights [..., P] over image tokens -> [..., side, side]; class and register tokens, which come first, left out.

    What these had is missing from the sum, so it says how much went to the picture itself. `picture` and errors as of
    `grid_side`.
    """
    side = grid_side(weights.shape[-1], picture)
    return weights[..., weights.shape[-1] - side * side :].unflatten(-1, (side, side))


def grid_side(tokens: int, picture: Sequence[int] | None = None) -> int:
    """The side of the square grid that an encoder's tokens are, behind class and register tokens.

    picture: height and width of what was encoded, where they are known: 9 x 16 tokens are as many as 12 x 12.
    Raises InputError where the grid can't be square.
    """
    side = math.isqrt(tokens)
    oblong = picture is not None and picture[0] != picture[1]
    if oblong or tokens - side * side > MOST_PREFIX:
        seen = f" of a picture of {picture[0]} x {picture[1]} pixels" if picture is not None else ""
        raise InputError(
            f"no map of the encoder's {tokens} tokens{seen}: pictures must be square, and their tokens a square grid, "
            f"row by row, behind at most {MOST_PREFIX} class and register tokens"
        )
    return side

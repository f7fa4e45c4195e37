"""Scaled dot-product attention: the one place where its implementation is chosen, by measurement.

Forward + backward in ms, torch 2.14, heads of 64, batch 24 x 12 heads, SDPA against explicit matrices:

    | processor, threads | precision | 32 queries x 257 image tokens | 52 x 52 with a key mask |
    | AVX2, 1            | fp32      | 73.6 / 71.9                   | 20.1 / 20.8             |
    | AVX2, 2            | fp32      | 42.9 / 36.3                   | 10.9 / 11.6             |
    | AVX2, 1            | bf16      | 320 / 395                     | 66 / 147                |
    | AVX2, 2            | bf16      | 165 / 364                     | 55 / 129                |

Forward alone SDPA is ahead everywhere (fp32 14.8 / 25.3, bf16 16.8 / 218) and keeps no score matrix. The one
exception was measured on a processor with AMX tiles, whose backward of SDPA in bf16 takes 48 ms where
explicit
matrices take 7: low precision under gradient on such processors goes the explicit way.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_lite.common.device import cpu_flags, device_type_of


@functools.cache
def cpu_has_bf16_tiles() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware tiles."""
    return "amx_bf16" in cpu_flags()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head attention softmax(QK^T / sqrt(d)) V of already projected inputs.

    Args:
        query: [B, L, D].
        key, value: [B, S, D].
        mask: bool, broadcastable to [B, heads, L, S]; True where a query may look. No row may be all False.
        dropout: probability of dropping an attention weight.

    Returns: [B, L, D].
    """
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    if _explicit_is_faster(q):
        context = _explicit(q, k, v, mask, dropout)
    else:
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return context.transpose(1, 2).flatten(2)


def _explicit_is_faster(q: Tensor) -> bool:
    low_precision_on_cpu = device_type_of(q) == "cpu" and q.dtype != torch.float32
    return low_precision_on_cpu and q.requires_grad and cpu_has_bf16_tiles()


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    return weights.to(v.dtype) @ v

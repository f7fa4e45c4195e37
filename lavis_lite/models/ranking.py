"""How likely a language model finds each text of a closed list, its beginning read once.

B inputs, A texts of the list, R (input, text) pairs scored at once, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lavis_lite.models.decoding import NEVER, Beginning
from lavis_lite.models.language.adapter import lengths_mask, pad

# Pairs at once: their logits, and copies of their inputs' keys and values, are what takes memory.
PAIRS = 256


def log_likelihoods(
    decoder: Beginning, texts: Sequence[Sequence[Sequence[int]]], *, keep: int, device: torch.device
) -> Tensor:
    """log p(text | input) float32[B, A] of texts [B][A] given as tokens, the one that ends a text included.

    The first token's part of it comes from the input's own logits, so it is known for all texts at no cost; only the
    `keep` texts of an input whose first token is likeliest are scored to their end, the others get -inf.

    Args:
        decoder: with one row an input, not yet started.
    """
    logits = decoder.step(torch.zeros(len(texts), dtype=torch.long, device=device))
    first = torch.tensor([[ids[0] for ids in row] for row in texts], device=device)
    begun = logits.float().log_softmax(-1).gather(1, first)
    kept = begun.topk(min(keep, begun.shape[1]), dim=1).indices
    scores = torch.full_like(begun, NEVER).scatter(1, kept, begun.gather(1, kept))
    pairs = [(row, text) for row, own in enumerate(kept.tolist()) for text in own]
    pairs = [(row, text) for row, text in pairs if len(texts[row][text]) > 1]
    # Texts of like length together, so that little is padded.
    pairs.sort(key=lambda pair: len(texts[pair[0]][pair[1]]))
    for start in range(0, len(pairs), PAIRS):
        rows, places = (list(part) for part in zip(*pairs[start : start + PAIRS], strict=True))
        rest = _rest(
            decoder, rows, [texts[row][text] for row, text in zip(rows, places, strict=True)], device
        )
        scores[rows, places] += rest
    return scores


def _rest(
    decoder: Beginning, rows: Sequence[int], texts: Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    """log p of the tokens behind the first of each text, float32[R]."""
    # The last token predicts nothing, so it is no input. Padding follows all real tokens.
    ids = pad([text[:-1] for text in texts], value=0, device=device)
    logits = decoder.continued(torch.tensor(rows, device=device), ids)
    wanted = pad([text[1:] for text in texts], value=0, device=device)
    losses = cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none")
    return -(losses * lengths_mask([len(text) - 1 for text in texts], device=device)).sum(1)

"""Documents as token ids, each token with its role: the loss gives every role a weight of its own.

Legend: T places of the row (its encoder's in T5), L labels of T5's decoder, W words that share a place.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from lavis_lite.worlds.shapes.lm_documents import BLEND, Document, Reply

# 0 is for padding and whatever is never a target.
ROLES = {"context": 1, "prompt": 2, "text": 3, "answer": 4, "object": 5, "pair": 6}
# The words of an object: size, colour, shape, and two for a corner.
MAX_BLEND = 5


def encode_opt(
    tokenizer: Any, document: Document, rng: random.Random, *, max_length: int
) -> dict[str, Tensor]:
    """The context, then as many replies as fit, each ended by a line break.

    `</s>` comes before everything, or, as when BLIP-2 puts visual prompts before a text, between the context
    and the replies.

    Returns: `input_ids` and `roles`, int64[T], and `blend` int64[T, W-1], see `_places`.
    """
    parts, kinds = [], []
    for reply in document.replies:
        parts += [reply.prompt, f"{reply.text}\n"]
        kinds += [ROLES["prompt"], _role(reply)]
    encoded = tokenizer(parts, add_special_tokens=False)["input_ids"]
    context, blend = _places(tokenizer, document.context)
    start, stop = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(".")
    role = 0 if blend else ROLES["context"]
    if not context:
        ids, roles = [start], [0]
    elif not blend and rng.random() < 0.5:
        ids, roles = [start, *context, stop], [0, *[role] * (len(context) + 1)]
    else:
        # BLIP-2 scores `</s>` after visual prompts too, where a text has no prompt: it must be expected there.
        ids, roles = [*context, start], [*[role] * len(context), ROLES["context"]]
    for number in range(0, len(encoded), 2):
        pair = encoded[number : number + 2]
        if number and len(ids) + sum(map(len, pair)) > max_length:
            break
        for part, kind in zip(pair, kinds[number : number + 2], strict=True):
            ids += part
            roles += [kind] * len(part)
    return {"input_ids": torch.tensor(ids), "roles": torch.tensor(roles), "blend": _pad(blend, len(ids))}


def encode_t5(tokenizer: Any, document: Document, rng: random.Random) -> dict[str, Tensor]:
    """Context and prompt for the encoder, one text for the decoder, or the answers to up to six questions.

    Several questions at once cost little more than one and teach as much as several documents. A caption
    without a prompt is split at a point from its first word to its middle: the encoder reads the part before,
    as in BLIP-2's prefix language modelling.

    Returns: `input_ids` int64[T], `blend` int64[T, W-1], see `_places`; `labels` and `roles` int64[L].
    """
    first = document.replies[0]
    prompt, text = first.prompt, first.text
    if first.kind == "answer":
        several = [reply for reply in document.replies if reply.kind == "answer"][
            : rng.choice((1, 1, 2, 4, 6))
        ]
        prompt = " ".join(reply.prompt for reply in several)
        text = ", ".join(reply.text for reply in several)
    elif not prompt:
        words = text.split()
        cut = rng.randint(1, len(words) // 2)
        prompt, text = " ".join(words[:cut]), " ".join(words[cut:])
    if document.context and BLEND not in document.context and rng.random() < 0.5:
        prompt = f". {prompt}"
    context, blend = _places(tokenizer, document.context)
    read, labels = tokenizer([prompt, text])["input_ids"]
    ids = [*context, *read]
    return {
        "input_ids": torch.tensor(ids),
        "blend": _pad(blend, len(ids)),
        "labels": torch.tensor(labels),
        "roles": torch.full((len(labels),), _role(first)),
    }


def _places(tokenizer: Any, context: str) -> tuple[list[int], list[list[int]]]:
    """The ids of a context and, where words share places, the ids of those that come to the first of each."""
    if BLEND not in context:
        return tokenizer(context, add_special_tokens=False)["input_ids"] if context else [], []
    places = [tokenizer.convert_tokens_to_ids(place.split(BLEND)) for place in context.split()]
    return [ids[0] for ids in places], [ids[1:] for ids in places]


def _pad(blend: list[list[int]], length: int) -> Tensor:
    """int64[length, W-1] with 0 (`<pad>`) where no word comes to a place's first."""
    padded = torch.zeros(length, MAX_BLEND - 1, dtype=torch.long)
    for place, ids in enumerate(blend):
        padded[place, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return padded


def _role(reply: Reply) -> int:
    return ROLES[reply.kind if reply.kind in ROLES else "text"]

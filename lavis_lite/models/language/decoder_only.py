"""Decoder-only language models (OPT and any other causal one): [visual prompt][prompt][target].

B rows, Q visual tokens, D embedding width, T text tokens, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.functional import pad as torch_pad

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models.language.adapter import LanguageModel, lengths_mask, pad
from lavis_lite.models.language.keywords import cache_keyword, forward_keywords


@registry.register_language_model("causal_lm")
@registry.register_language_model("opt")
class DecoderOnlyLM(LanguageModel):
    """Language modelling on the text alone; prompts are padded on the left to be continued (section 3.3)."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    def pretraining_losses(self, visual: Tensor, texts: Sequence[str], *, max_length: int) -> Tensor:
        """Language modelling: every token of the texts, their first special one ([BOS]) included."""
        return self.answer_losses(visual, [""] * len(texts), texts, max_length=max_length)

    def answer_losses(
        self, visual: Tensor, prompts: Sequence[str], targets: Sequence[str], *, max_length: int
    ) -> Tensor:
        """See `LanguageModel`."""
        rows = [
            self._split(prompt, target, max_length) for prompt, target in zip(prompts, targets, strict=True)
        ]
        device, num_visual = visual.device, visual.shape[1]
        # The last token predicts nothing, so it is no input.
        ids = pad([[*prompt, *target[:-1]] for prompt, target in rows], value=0, device=device)
        mask = lengths_mask([num_visual + len(p) + len(t) - 1 for p, t in rows], device=device)
        # Logits only from the place before the first target on: what a place says is about the next one.
        first = num_visual + min(len(prompt) for prompt, _ in rows) - 1
        inputs = torch.cat([visual.to(self.dtype), self.embed(ids)], 1)
        check_positions(self.model, inputs.shape[1])
        kept = inputs.shape[1] - first
        logits = self._logits(inputs, mask, kept)
        scored = torch.zeros(len(rows), kept, dtype=torch.bool)
        for row, (prompt, target) in enumerate(rows):
            start = num_visual + len(prompt) - 1 - first
            scored[row, start : start + len(target)] = True
        wanted = torch.tensor([token for _, target in rows for token in target], device=device)
        return cross_entropy(logits[scored.to(device)].float(), wanted, reduction="none")

    def decoder(
        self, visual: Tensor, prompts: Sequence[str], *, rows_per_input: int, new_tokens: int = 0
    ) -> CausalDecoder:
        """See `LanguageModel`."""
        texts = [self._ids(prompt) for prompt in prompts]
        rows = [
            torch.cat(
                [own.to(self.dtype), self.embed(torch.tensor(text, dtype=torch.long, device=own.device))]
            )
            for own, text in zip(visual, texts, strict=True)
        ]
        mask = lengths_mask([len(row) for row in rows], left=True, device=visual.device)
        longest = mask.shape[1]
        # All at once, before anything is computed; the last new token is never read.
        check_positions(self.model, longest + max(new_tokens - 1, 0))
        inputs = torch.stack([torch_pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        return CausalDecoder(self.model, inputs, mask, rows_per_input=rows_per_input)

    def answer_ids(
        self, prompts: Sequence[str], answers: Sequence[str], *, max_length: int
    ) -> list[list[list[int]]]:
        """See `LanguageModel`."""
        # Tokens of an answer depend on what is before it no further back than the last word.
        tails = [re.search(r"\S*\s*$", prompt)[0] for prompt in prompts]  # type: ignore[index]  # always found
        known = {
            tail: [self._split(tail, answer, max_length)[1] for answer in answers]
            for tail in dict.fromkeys(tails)
        }
        return [known[tail] for tail in tails]

    def _ids(self, text: str) -> list[int]:
        # A chat template writes its special tokens itself.
        encoded = self.tokenizer(text, add_special_tokens=not self.config.chat_template)
        return list(encoded["input_ids"])

    def _split(self, prompt: str, target: str, max_length: int) -> tuple[list[int], list[int]]:
        """Tokens of a prompt and of the target behind it, tokenised in one: a word's token depends on the space
        before it. Without a prompt the tokenizer's first special token belongs to the target."""
        gap = " " if prompt and not prompt[-1].isspace() else ""
        encoded = self.tokenizer(
            prompt + gap + target,
            add_special_tokens=not self.config.chat_template,
            return_offsets_mapping=True,
        )
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        count = 0
        if prompt:
            count = sum(end == 0 or start < len(prompt) for start, end in offsets)
        return ids[:count], [*ids[count:][: max_length - 1], self.end_id]

    def _logits(self, inputs: Tensor, mask: Tensor, kept: int) -> Tensor:
        """Next-token logits [B, kept, V] at the last `kept` places."""
        arguments = {"logits_to_keep": kept} if "logits_to_keep" in forward_keywords(self.model) else {}
        logits: Tensor = self.model(
            inputs_embeds=inputs, attention_mask=mask, use_cache=False, **arguments
        ).logits
        return logits[:, -kept:]


def check_positions(model: Any, number: int) -> None:
    """Raise InputError when so many places of visual prompt and text are more than a language model has a table for.

    Without it, learnt positions end in an index error, or, on a GPU, in one that ends the process. Rotary and relative
    positions are computed, and go on beyond what the model was trained with.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and number > limit and _has_table(model, limit):
        raise InputError(
            f"visual prompt and text take {number} places and the language model has {limit}: shorten the question or "
            "the prompt, or ask for fewer new tokens"
        )


def _has_table(model: Any, limit: int) -> bool:
    """Whether a row of a table stands for each position: an embedding (OPT, GPT-2), or constants (GPT-J)."""
    words = model.get_input_embeddings()
    # OPT's kind keeps two rows more, for padding.
    learnt = any(
        isinstance(module, nn.Embedding) and module is not words and 0 <= module.num_embeddings - limit <= 2
        for module in model.modules()
    )
    return learnt or any(buffer.dim() == 2 and len(buffer) == limit for buffer in model.buffers())


class CausalDecoder:
    """A `decoding.Decoder`: visual prompt and prompt are read once an input, each step adds one token a row.

    Args:
        inputs: [B, S, D], padded on the left. mask: int64[B, S].
    """

    def __init__(self, model: Any, inputs: Tensor, mask: Tensor, *, rows_per_input: int) -> None:
        from lavis_lite.models.language.growing_cache import GrowingCache

        self._model = model
        self._inputs = inputs
        self._mask = mask
        self._rows = rows_per_input
        self._cache: Any = GrowingCache()
        self._started = False
        # Parameters by name: models differ in which they take.
        parameters = forward_keywords(model)
        self._cache_keyword = cache_keyword(parameters)
        self._takes_positions = "position_ids" in parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def step(self, ids: Tensor) -> Tensor:
        """The next token int64[R] of every row (the first call's are ignored) -> logits [R, V]."""
        if self._started:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], 1)
            return self._forward(input_ids=ids[:, None])
        self._started = True
        logits = self._forward(inputs_embeds=self._inputs)
        if self._rows > 1:
            self._cache.batch_repeat_interleave(self._rows)
            self._mask = self._mask.repeat_interleave(self._rows, 0)
        return logits.repeat_interleave(self._rows, 0)

    def reorder(self, rows: Tensor) -> None:
        """Row r goes on from where row `rows[r]` of the same input was."""
        self._cache.reorder_cache(rows)

    def continued(self, rows: Tensor, ids: Tensor) -> Tensor:
        """See `decoding.Beginning`."""
        from lavis_lite.models.language.growing_cache import selected

        mask = torch.cat([self._mask[rows], self._mask.new_ones(ids.shape)], 1)
        check_positions(self._model, mask.shape[1])
        positions = (
            {"position_ids": (mask.cumsum(1) - 1)[:, -ids.shape[1] :]} if self._takes_positions else {}
        )
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            **positions,
            **{self._cache_keyword: selected(self._cache, rows)},
        )
        logits: Tensor = output.logits
        return logits

    def _forward(self, **inputs: Tensor) -> Tensor:
        new = next(iter(inputs.values())).shape[1]
        if self._takes_positions:
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -new:]
        output = self._model(
            **inputs,
            attention_mask=self._mask,
            use_cache=True,
            **{self._cache_keyword: self._cache},
            **self._last_only,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

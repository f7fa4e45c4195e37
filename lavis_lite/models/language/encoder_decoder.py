"""Encoder-decoder language models (FlanT5 and any other seq2seq one): the encoder reads [visual prompt][prompt].

B rows, Q visual tokens, D embedding width, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lavis_lite.common.registry import registry
from lavis_lite.models.language.adapter import LanguageModel, lengths_mask, pad
from lavis_lite.models.language.keywords import cache_keyword, forward_keywords


@registry.register_language_model("seq2seq_lm")
@registry.register_language_model("t5")
class EncoderDecoderLM(LanguageModel):
    """Prefix language modelling: prompt or prefix go into the encoder, the target is the decoder's (section 3.3)."""

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    low_precisions: ClassVar[tuple[str, ...]] = ("bf16",)  # T5 overflows in fp16

    def pretraining_losses(self, visual: Tensor, texts: Sequence[str], *, max_length: int) -> Tensor:
        """Prefix language modelling: each text is split at a token drawn uniformly from 1 to its middle; the prefix
        follows the visual prompt into the encoder, the suffix is the target."""
        rows = [self._ids(text, max_length) for text in texts]
        splits = [_draw_split(len(row)) for row in rows]
        prefixes = [[*row[:at], *self._ending] for row, at in zip(rows, splits, strict=True)]
        return self._losses(visual, prefixes, [row[at:] for row, at in zip(rows, splits, strict=True)])

    def answer_losses(
        self, visual: Tensor, prompts: Sequence[str], targets: Sequence[str], *, max_length: int
    ) -> Tensor:
        """See `LanguageModel`."""
        prefixes = [[*self._ids(text, None), *self._ending] for text in prompts]
        return self._losses(visual, prefixes, [self._ids(target, max_length) for target in targets])

    def decoder(
        self, visual: Tensor, prompts: Sequence[str], *, rows_per_input: int, new_tokens: int = 0
    ) -> Seq2SeqDecoder:
        """See `LanguageModel`."""
        prefixes = [[*self._ids(text, None), *self._ending] for text in prompts]
        inputs, mask = self._encoder_inputs(visual, prefixes)
        return Seq2SeqDecoder(self.model, inputs, mask, rows_per_input=rows_per_input)

    def answer_ids(
        self, prompts: Sequence[str], answers: Sequence[str], *, max_length: int
    ) -> list[list[list[int]]]:
        """See `LanguageModel`."""
        ids = [[*self._ids(answer, max_length), self.end_id] for answer in answers]
        return [ids] * len(prompts)

    @property
    def _ending(self) -> list[int]:
        return [int(self.tokenizer.eos_token_id)]

    def _ids(self, text: str, max_length: int | None) -> list[int]:
        """Tokens without the one that ends a text, for which room is left."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids if max_length is None else ids[: max_length - 1]

    def _encoder_inputs(self, visual: Tensor, prefixes: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        embedded = self.embed(pad(prefixes, value=0, device=visual.device))
        lengths = [visual.shape[1] + len(prefix) for prefix in prefixes]
        return torch.cat([visual.to(self.dtype), embedded], 1), lengths_mask(lengths, device=visual.device)

    def _losses(
        self, visual: Tensor, prefixes: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> Tensor:
        inputs, mask = self._encoder_inputs(visual, prefixes)
        ended = [[*target, self.end_id] for target in targets]
        start = int(self.model.config.decoder_start_token_id)
        decoder_ids = pad([[start, *target[:-1]] for target in ended], value=start, device=visual.device)
        output = self.model(
            inputs_embeds=inputs, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False
        )
        # Padding follows all real tokens, so the decoder's causal mask hides it from them.
        scored = lengths_mask([len(target) for target in ended], device=visual.device).bool()
        wanted = torch.tensor([token for target in ended for token in target], device=visual.device)
        return cross_entropy(output.logits[scored].float(), wanted, reduction="none")


def _draw_split(length: int) -> int:
    """A place from token 1 to the middle, uniformly; 0 for a text too short to leave both parts something."""
    return int(torch.randint(1, length // 2 + 1, ())) if length >= 2 else 0


class Seq2SeqDecoder:
    """A `decoding.Decoder`: encoder and cross-attention's keys and values are computed once an input.

    Args:
        inputs: the encoder's, [B, S, D], padded on the right. mask: int64[B, S].
    """

    def __init__(self, model: Any, inputs: Tensor, mask: Tensor, *, rows_per_input: int) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        from lavis_lite.models.language.growing_cache import GrowingCache

        self._model = model
        self._encoded = model.get_encoder()(inputs_embeds=inputs, attention_mask=mask)
        self._mask = mask
        self._rows = rows_per_input
        self._cache: Any = EncoderDecoderCache(GrowingCache(), DynamicCache())
        self._started = False
        self._cache_keyword = cache_keyword(forward_keywords(model))

    def step(self, ids: Tensor) -> Tensor:
        """The next token int64[R] of every row (the first call's are ignored) -> logits [R, V]."""
        if self._started:
            return self._forward(ids)
        self._started = True
        inputs = len(self._mask)
        start = int(self._model.config.decoder_start_token_id)
        logits = self._forward(torch.full((inputs,), start, device=ids.device))
        if self._rows > 1:
            self._cache.batch_repeat_interleave(self._rows)
            self._mask = self._mask.repeat_interleave(self._rows, 0)
            # From now on only its shape is looked at: keys and values are in the cache.
            states = self._encoded.last_hidden_state
            self._encoded.last_hidden_state = states[:1, :1, :1].expand(
                inputs * self._rows, *states.shape[1:]
            )
        return logits.repeat_interleave(self._rows, 0)

    def reorder(self, rows: Tensor) -> None:
        """Row r goes on from where row `rows[r]` of the same input was."""
        # Rows of one input share its cross-attention, so only the decoder's own past is put in order.
        self._cache.self_attention_cache.reorder_cache(rows)

    def continued(self, rows: Tensor, ids: Tensor) -> Tensor:
        """See `decoding.Beginning`."""
        from transformers import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        from lavis_lite.models.language.growing_cache import selected

        past = (self._cache.self_attention_cache, self._cache.cross_attention_cache)
        states = (
            self._encoded.last_hidden_state
        )  # only its shape is looked at: keys and values are in the cache
        output = self._model(
            encoder_outputs=BaseModelOutput(
                last_hidden_state=states[:1, :1, :1].expand(len(rows), *states.shape[1:])
            ),
            attention_mask=self._mask[rows],
            decoder_input_ids=ids,
            use_cache=True,
            **{self._cache_keyword: EncoderDecoderCache(*(selected(cache, rows) for cache in past))},
        )
        logits: Tensor = output.logits
        return logits

    def _forward(self, ids: Tensor) -> Tensor:
        output = self._model(
            encoder_outputs=self._encoded,
            attention_mask=self._mask,
            decoder_input_ids=ids[:, None],
            use_cache=True,
            **{self._cache_keyword: self._cache},
        )
        logits: Tensor = output.logits[:, -1]
        return logits

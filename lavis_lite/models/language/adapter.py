"""What a language model must offer the model that shows it pictures; which family it is stays in here.

B rows, Q visual tokens, D the language model's embedding width, T text tokens, R rows being decoded (B x beams or
samples), V vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lavis_lite.common.errors import ConfigError
from lavis_lite.models.blocks import Recomputation, recompute_blocks
from lavis_lite.models.decoding import Beginning
from lavis_lite.models.language.loading import LanguageModelConfig, build_llm, load_llm, load_tokenizer
from lavis_lite.models.language.lora import add_lora, lora_dropouts


class LanguageModel(nn.Module, ABC):
    """A frozen large language model: visual prompt and texts in, a loss or new text out.

    Frozen means: no parameter is trained (LoRA's aside) and it is always in eval mode; gradients flow through it to
    the visual prompt.

    auto_class: the class of transformers that builds it. low_precisions: those its weights may have.
    """

    auto_class: ClassVar[str]
    low_precisions: ClassVar[tuple[str, ...]] = ("fp16", "bf16")

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.check_precision(config.precision)
        self.config = config
        self._recomputation = Recomputation()
        self.model: Any = build_llm(self.auto_class, config)
        self._tokenizer: Any = None
        self._end_id: int | None = None
        self._prepare()

    @classmethod
    def check_precision(cls, precision: str) -> None:
        """Raise ConfigError for a precision this family doesn't work in."""
        if precision not in ("auto", "fp32", *cls.low_precisions):
            raise ConfigError(
                f"model.language_model.precision: this family overflows in {precision}; use "
                f"{' or '.join(cls.low_precisions)} (as the paper), fp32 or auto"
            )

    def load_pretrained(self) -> None:
        """Load the weights that the config asked for, if any; strict. Raises CheckpointError."""
        if not self.config.pretrained:
            return
        built = self.width
        self.model = load_llm(self.auto_class, self.config)
        if self.width != built:
            raise ConfigError(
                f"model.language_model: '{self.config.model_name}' has width {self.width}, but `config` describes one "
                f"of width {built}; set language_model.config to null or to that model's sizes"
            )
        self._prepare()

    def _prepare(self) -> None:
        self.model.requires_grad_(False)
        if self.config.lora is not None:
            self.model = add_lora(self.model, self.config.lora)
        # transformers' own checkpointing works in training mode alone, in which this model never is.
        if self.config.grad_checkpointing and not recompute_blocks(self.model, self._recomputation):
            raise ConfigError(
                "model.language_model.grad_checkpointing: this model has no blocks to recompute"
            )
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Only LoRA's dropout and recomputation follow the mode: a frozen model stays in eval mode."""
        super().train(False)
        self._recomputation.on = mode
        for dropout in lora_dropouts(self.model):
            dropout.train(mode)
        self.training = mode
        return self

    @property
    def tokenizer(self) -> Any:
        """The model's own tokenizer, loaded when it is first needed; ConfigError when it can't be."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.config)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def width(self) -> int:
        """D, the width of the token embeddings."""
        width: int = self.model.get_input_embeddings().embedding_dim
        return width

    @property
    def dtype(self) -> torch.dtype:
        """What visual prompts are cast to: the type of the token embeddings."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    def arithmetic(self) -> AbstractContextManager[object]:
        """What to call this model's methods in: weights in low precision compute in it, whatever autocast surrounds.

        bf16 around fp16 weights would copy all of them at every step, and their embeddings can't be joined with its
        results.
        """
        place, own = self.model.get_input_embeddings().weight.device.type, self.dtype
        if own == torch.float32 or not torch.is_autocast_enabled(place):
            return contextlib.nullcontext()
        return torch.autocast(place, dtype=own)

    @property
    def end_id(self) -> int:
        """The token that ends a text: that of `end_of_text` if set, else the tokenizer's own."""
        if self._end_id is None:
            text = self.config.end_of_text
            if text is None:
                self._end_id = int(self.tokenizer.eos_token_id)
            else:
                self._end_id = int(self.tokenizer(text, add_special_tokens=False)["input_ids"][-1])
        return self._end_id

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [..., D] of int64[...]."""
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        return embedded

    @abstractmethod
    def pretraining_losses(self, visual: Tensor, texts: Sequence[str], *, max_length: int) -> Tensor:
        """Stage 2's loss (section 3.3) of every scored token, float32[N], of texts [B] after visual prompts [B, Q, D].

        Decoder-only: language modelling. Encoder-decoder: prefix language modelling.
        max_length: of a text in tokens; the one that ends it is never cut off.
        """

    @abstractmethod
    def answer_losses(
        self, visual: Tensor, prompts: Sequence[str], targets: Sequence[str], *, max_length: int
    ) -> Tensor:
        """Cross-entropy of every token of the targets, float32[N], given visual prompts [B, Q, D] and prompts.

        max_length: of a target, in tokens; the one that ends it is never cut off. Prompts are read whole, as in
        generation.
        """

    @abstractmethod
    def answer_ids(
        self, prompts: Sequence[str], answers: Sequence[str], *, max_length: int
    ) -> list[list[list[int]]]:
        """The tokens of each of the answers [A] behind each of the prompts [B], as `answer_losses` scores them."""

    @abstractmethod
    def decoder(
        self, visual: Tensor, prompts: Sequence[str], *, rows_per_input: int, new_tokens: int = 0
    ) -> Beginning:
        """Decodes what follows visual prompts [B, Q, D] and prompts [B]: rows_per_input rows for each.

        Whatever doesn't depend on the row (the states of visual prompt and prompt) is computed once an input.
        Raises InputError where the language model has no room for up to `new_tokens` steps.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of new tokens, up to the one that ends it."""
        end, said = self.end_id, list(ids)
        if end in said:
            said = said[: said.index(end)]
        return str(self.tokenizer.decode(said, skip_special_tokens=True)).strip()

    def wrapped(self, prompts: Sequence[str]) -> list[str]:
        """Prompts in the chat format, where `chat_template` is set; all other methods take them as they are."""
        return [self.conversation([], prompt) if self.config.chat_template else prompt for prompt in prompts]

    def conversation(self, history: Sequence[tuple[str, str]], message: str) -> str:
        """The prompt that asks for the answer to `message` after earlier (message, answer) turns.

        In the model's chat format where `chat_template` is set; else as BLIP-2 is prompted (figure 4):
        "Question: ... Answer: ... Question: ... Answer:".
        """
        if not self.config.chat_template:
            turns = [f"Question: {asked} Answer: {answered}." for asked, answered in history]
            return " ".join([*turns, f"Question: {message} Answer:"])
        messages = []
        for asked, answered in history:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": message})
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def pad(rows: Sequence[Sequence[int]], *, value: int, left: bool = False, device: torch.device) -> Tensor:
    """Rows of ids as one int64[B, longest], filled up with `value` on one side."""
    longest = max(map(len, rows))
    filled = [
        [*[value] * (longest - len(row)), *row] if left else [*row, *[value] * (longest - len(row))]
        for row in rows
    ]
    return torch.tensor(filled, dtype=torch.int64, device=device).reshape(len(rows), longest)


def lengths_mask(lengths: Sequence[int], *, left: bool = False, device: torch.device) -> Tensor:
    """int64[B, longest]: 1 at the places of real tokens."""
    return pad([[1] * length for length in lengths], value=0, left=left, device=device)

"""BLIP-2 stage 2: what the Q-Former sees becomes a soft visual prompt for a frozen language model (section 3.3).

B rows, Q queries, P image tokens, D Q-Former width, L language-model width, N scored text tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavis_lite.common import dist
from lavis_lite.common.binding import bind
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.models.base import SECTION_KEYS
from lavis_lite.models.blip2_base import Blip2Base
from lavis_lite.models.decoding import DecodingRules, Search, decode
from lavis_lite.models.language.adapter import LanguageModel
from lavis_lite.models.language.loading import LanguageModelConfig
from lavis_lite.models.qformer import QFormerConfig
from lavis_lite.models.vision.tower import validate_vision_config
from lavis_lite.samples import complete_samples, image_of, prompts_of

# What a stage-1 checkpoint holds that stage 2 has no place for: the heads, and all that only text needs.
STAGE1_ONLY = (
    r"^(vision_proj|text_proj|itm_head)\.",
    r"^temp$",
    r"^Qformer\.cls\.",
    r"^Qformer\.bert\.embeddings\.(word|position)_embeddings\.",
    r"^Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.",
)


@dataclass(frozen=True)
class Generated:
    """texts: B * num_captions, an image's together, best first. scores: float[B * num_captions], see `Decoded`."""

    texts: list[str]
    scores: Tensor


@registry.register_model("blip2_opt")
@registry.register_model("blip2_t5")
@registry.register_model("blip2_lm")
class Blip2Generative(Blip2Base):
    """Frozen image encoder, Q-Former, one linear layer, frozen language model of either family.

    Trained are the Q-Former (without what only text needs) and the layer, by the language model's loss on text.

    Args:
        vision_encoder: `name` of a registered encoder and its keywords, `freeze`, `precision`, `pretrained`.
        language_model: the keys of `LanguageModelConfig`.
        qformer: the Q-Former's shape.
        max_txt_len: prompts and targets are cut to so many of the language model's tokens.
        prompt: what every text follows. Empty: pre-training (language modelling, or prefix language modelling).
            Else: only the text behind it is scored, as in caption fine-tuning ("a photo of").
    """

    optional_keys: ClassVar[tuple[str, ...]] = (r"^visual_encoder\.", r"^language_model\.")

    def __init__(
        self,
        *,
        vision_encoder: Mapping[str, Any],
        language_model: Mapping[str, Any],
        qformer: QFormerConfig | None = None,
        max_txt_len: int = 32,
        prompt: str = "",
    ) -> None:
        config = qformer or QFormerConfig()
        super().__init__(
            vision_encoder=vision_encoder, qformer=config, tokenizer=None, max_txt_len=max_txt_len
        )
        self.prompt = prompt
        self.language_model = build_language_model(language_model)
        self.llm_proj = nn.Linear(config.hidden_size, self.language_model.width)

    @classmethod
    def validate_config(cls, cfg: Mapping[str, Any], *, where: str = "model") -> None:
        """Check a model section with its encoder's and language model's; raises ConfigError."""
        keywords = bind(cls, cfg, where=where, skip=SECTION_KEYS)
        validate_vision_config(keywords["vision_encoder"], where=f"{where}.vision_encoder")
        section = f"{where}.language_model"
        config = LanguageModelConfig(**bind(LanguageModelConfig, keywords["language_model"], where=section))
        registry.get_language_model_class(config.name).check_precision(config.precision)
        if keywords.get("max_txt_len", 32) < 2:
            raise ConfigError(f"{where}.max_txt_len: must be at least 2, got {keywords['max_txt_len']}")

    def load_backbones(self) -> None:
        """Load the encoder's and the language model's pretrained weights, where the config asked for them."""
        super().load_backbones()
        self.language_model.load_pretrained()

    def select_weights(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """A stage-2 checkpoint whole; of a stage-1 checkpoint what stage 2 goes on with.

        A prediction head in a stage-2 checkpoint tells that it kept stage 1's text side, which nothing reads.
        """
        kept, optional = super().select_weights(tensors)
        stage1 = "itm_head.weight" in tensors
        if stage1 or "Qformer.cls.predictions.bias" in tensors:
            left = [re.compile(pattern) for pattern in STAGE1_ONLY]
            kept = {name: tensor for name, tensor in kept.items() if not any(p.search(name) for p in left)}
        return kept, (*optional, r"^llm_proj\.") if stage1 else optional

    @property
    def language_model_type(self) -> str | None:
        """The family of the frozen language model by transformers' name, such as opt or t5."""
        return str(self.language_model.model.config.model_type)

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The language model's loss on a batch's texts.

        Returns: loss, the mean over the text tokens of all ranks' joined batch.
        """
        batch = complete_samples(samples)
        visual = self.visual_prompt(batch["image"])
        texts = batch["text_input"]
        if self.prompt:
            prompts = self.language_model.wrapped([self.prompt]) * len(texts)
            losses = self.language_model.answer_losses(visual, prompts, texts, max_length=self.max_txt_len)
        else:
            losses = self.language_model.pretraining_losses(visual, texts, max_length=self.max_txt_len)
        count = torch.tensor([losses.numel()], device=losses.device)
        if self.training and dist.world_size() > 1:
            count = dist.all_gather(count)
        # A mean over the joined batch is the ranks' average of sums divided by this.
        return {"loss": losses.sum() / count.float().mean()}

    def visual_prompt(self, image: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> [B, Q, L], in the place of so many token embeddings."""
        queries = self.encode_queries(self.project_image(self.encode_image(image)))
        prompt: Tensor = self.llm_proj(queries.output)
        return prompt

    @torch.no_grad()
    def generate(
        self,
        samples: Mapping[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
        *,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """Texts for images: B * num_captions of them, an image's together; never with the prompt in them.

        Args:
            samples: {"image": [B, 3, H, W], "prompt": one string, or one an image; by default the model's own}.
            use_nucleus_sampling: draw from the nucleus of `top_p` at `temperature`; else beam search, greedy with
                one beam.
            max_length, min_length: of new tokens, without the end. max_new_tokens: the same as max_length.
            length_penalty: beams are ranked by log-probability / length ** length_penalty.
            num_captions: per image; above 1 it needs sampling or at least as many beams.

        Raises ValueError for prompts that don't fit the images, or impossible settings.
        """
        return self.generate_with_scores(
            samples,
            use_nucleus_sampling=use_nucleus_sampling,
            num_beams=num_beams,
            max_length=max_length,
            min_length=min_length,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            num_captions=num_captions,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
        ).texts

    @torch.no_grad()
    def generate_with_scores(
        self,
        samples: Mapping[str, Any],
        *,
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
    ) -> Generated:
        """`generate` with each text's score: log-probability / length ** length_penalty of a beam, the mean
        log-probability of a token otherwise."""
        prompts = prompts_of(samples, batch=len(image_of(samples)), default=self.prompt)
        search = Search(num_beams, num_captions, use_nucleus_sampling)
        rules = DecodingRules.for_search(
            search,
            end_id=self.language_model.end_id,
            max_length=max_length if max_new_tokens is None else max_new_tokens,
            min_length=min_length,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
        )
        return self._continue(samples, self.language_model.wrapped(prompts), rules, search)

    @torch.no_grad()
    def chat(
        self,
        image: Tensor,
        history: Sequence[tuple[str, str]],
        message: str,
        *,
        num_beams: int = 5,
        max_new_tokens: int = 50,
        length_penalty: float = 1.0,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Instructed generation in turns (section 4.1, figure 4): the answer to a message about one image.

        Args:
            image: [3, H, W] or [1, 3, H, W], processed.
            history: earlier (message, answer) pairs; each call returns the one to go on with.

        Returns: the answer, and the history with it.
        """
        rules = DecodingRules(
            end_id=self.language_model.end_id, max_length=max_new_tokens, length_penalty=length_penalty
        )
        samples = {"image": image if image.dim() == 4 else image[None]}
        prompt = self.language_model.conversation(history, message)
        answer = self._continue(samples, [prompt], rules, Search(num_beams)).texts[0]
        return answer, [*history, (message, answer)]

    def _continue(
        self, samples: Mapping[str, Any], prompts: Sequence[str], rules: DecodingRules, search: Search
    ) -> Generated:
        """What the language model says after the images' visual prompts and these texts."""
        visual = self.visual_prompt(image_of(samples).to(self.device))
        decoder = self.language_model.decoder(visual, prompts, rows_per_input=search.rows)
        start = torch.zeros(len(visual), dtype=torch.long, device=visual.device)  # the prompt is read already
        decoded = decode(decoder, start, rules, search)
        texts = [self.language_model.decode(row) for row in decoded.ids.flatten(0, 1).tolist()]
        return Generated(texts, decoded.scores.flatten())


def build_language_model(section: Mapping[str, Any]) -> LanguageModel:
    """The frozen language model of a `language_model` section, at random or as a shape to be filled."""
    config = LanguageModelConfig(**bind(LanguageModelConfig, section, where="model.language_model"))
    model: LanguageModel = registry.get_language_model_class(config.name)(config)
    return model

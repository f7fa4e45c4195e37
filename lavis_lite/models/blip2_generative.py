"""BLIP-2 stage 2: what the Q-Former sees becomes a soft visual prompt for a frozen language model (section 3.3).

B rows, F frames of a clip, Q queries, P image tokens, D Q-Former width, L language-model width, N scored text tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavis_lite.common import dist
from lavis_lite.common.binding import bind
from lavis_lite.common.errors import CheckpointError, ConfigError, InputError
from lavis_lite.common.registry import registry
from lavis_lite.models.answers import QUESTION, Asked, Generated, QuestionAnswering, asked_of, fill
from lavis_lite.models.base import SECTION_KEYS
from lavis_lite.models.blip2_base import Blip2Base
from lavis_lite.models.decoding import DecodingRules, Search, decode
from lavis_lite.models.frames import FrameJoin, VideoConfig, split_frames
from lavis_lite.models.language.adapter import LanguageModel
from lavis_lite.models.language.loading import LanguageModelConfig
from lavis_lite.models.qformer import QFormerConfig
from lavis_lite.models.text_side import TEXT_SIDE, has_text_side, load_text_side
from lavis_lite.models.vision.tower import validate_vision_config
from lavis_lite.samples import Images, complete_questions, complete_samples, visual_of

# What a stage-1 checkpoint holds that stage 2 has no place for; where no question is read, the text side neither.
STAGE1_HEADS = (r"^(vision_proj|text_proj|itm_head)\.", r"^temp$", r"^Qformer\.cls\.")


@registry.register_model("blip2_opt")
@registry.register_model("blip2_t5")
@registry.register_model("blip2_lm")
class Blip2Generative(Blip2Base, QuestionAnswering):
    """Frozen image encoder, Q-Former, one linear layer, frozen language model of either family.

    Trained are the Q-Former (without what only text needs, unless it reads questions) and the layer, by the language
    model's loss on text.

    Args:
        vision_encoder: `name` of a registered encoder and its keywords, `freeze`, `precision`, `pretrained`.
        language_model: the keys of `LanguageModelConfig`.
        qformer: the Q-Former's shape.
        max_txt_len: targets are cut to so many of the language model's tokens, questions to so many of the Q-Former's.
        prompt: what every text follows. Empty: pre-training (language modelling, or prefix language modelling).
            Else: only the text behind it is scored, as in caption fine-tuning ("a photo of"). With a place for a
            question ("Question: {} Answer:") the model learns answers: see `QuestionSamples`.
        qformer_text_input: the question's tokens enter the Q-Former too and meet the queries in its self-attention
            (section 4.3, figure 7), so that the queries fetch what the question is about.
        qformer_text_from: a stage-1 run or checkpoint to take the Q-Former's text side from, where `pretrained` has
            none, as all stage-2 checkpoints.
        tokenizer: of the questions that the Q-Former reads; as of stage 1.
        video: how the frames of clips are joined; see `VideoConfig`.
    """

    # Frame embeddings begin at zero, which is what a checkpoint of pictures means by having none.
    optional_keys: ClassVar[tuple[str, ...]] = (
        r"^visual_encoder\.",
        r"^language_model\.",
        r"^frame_join\.embeddings$",
    )
    untrained_remedies: ClassVar[Mapping[str, str]] = {
        "llm_proj": "the weights are of stage 1: train stage 2 from them (model.pretrained), or give a run or "
        "checkpoint of stage 2"
    }

    def __init__(
        self,
        *,
        vision_encoder: Mapping[str, Any],
        language_model: Mapping[str, Any],
        qformer: QFormerConfig | None = None,
        max_txt_len: int = 32,
        prompt: str = "",
        qformer_text_input: bool = False,
        qformer_text_from: str | None = None,
        tokenizer: str = "bert-base-uncased",
        video: VideoConfig | None = None,
    ) -> None:
        config = qformer or QFormerConfig()
        super().__init__(
            vision_encoder=vision_encoder,
            qformer=config,
            tokenizer=tokenizer if qformer_text_input else None,
            max_txt_len=max_txt_len,
            language_head=False,
        )
        self.prompt = prompt
        self.qformer_text_input = qformer_text_input
        self.qformer_text_from = qformer_text_from
        if qformer_text_input:
            self._text_ffn_that_nobody_reads().requires_grad_(False)
        self.frame_join = FrameJoin(video or VideoConfig(), config.hidden_size)
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
        _check_question_keys(keywords, where)
        (keywords.get("video") or VideoConfig()).check(f"{where}.video")

    @property
    def takes_questions(self) -> bool:
        """Whether the prompt has a place for a question, so that the texts learnt are answers."""
        return QUESTION in self.prompt

    def load_backbones(self) -> None:
        """Load the encoder's and the language model's pretrained weights, and the Q-Former's text side, where the
        config asked for them."""
        super().load_backbones()
        self.language_model.load_pretrained()
        if self.qformer_text_from:
            load_text_side(self, self.qformer_text_from)

    def is_of_backbones(self, name: str) -> bool:
        """As of `Blip2Base`; the language model's where `language_model.pretrained` is set."""
        if name.startswith("language_model."):
            return bool(self.language_model.config.pretrained)
        return super().is_of_backbones(name)

    def no_weight_decay(self) -> set[str]:
        """The queries and the frame embeddings: pulling them to zero means nothing."""
        return super().no_weight_decay() | {"frame_join.embeddings"}

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """As of `BaseModel`; the Q-Former's text side whole, as other projects' checkpoints have it."""
        kept = super().trainable_state_dict()
        if self.qformer_text_input:
            last = f"Qformer.bert.encoder.layer.{len(self.Qformer.layers) - 1}"
            names = (f"{last}.{name}" for name, _ in self._text_ffn_that_nobody_reads().named_parameters())
            own = self.state_dict()
            kept |= {name: own[name] for name in names}
        return kept

    def _text_ffn_that_nobody_reads(self) -> nn.ModuleDict:
        # The last block's output is read at the queries alone. Trained in name only, it would keep DDP waiting.
        last = self.Qformer.layers[-1]
        assert last.intermediate is not None and last.output is not None
        return nn.ModuleDict({"intermediate": last.intermediate, "output": last.output})

    def select_weights(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """A stage-2 checkpoint whole; of a stage-1 checkpoint what stage 2 goes on with.

        A prediction head in a stage-2 checkpoint tells that it kept stage 1's text side, which nothing reads.
        """
        kept, optional = super().select_weights(tensors)
        stage1 = "itm_head.weight" in tensors
        dropped: tuple[str, ...] = ()
        if stage1 or "Qformer.cls.predictions.bias" in tensors:
            dropped = STAGE1_HEADS if self.qformer_text_input else (*STAGE1_HEADS, *TEXT_SIDE)
        left = [re.compile(pattern) for pattern in dropped]
        kept = {name: tensor for name, tensor in kept.items() if not any(p.search(name) for p in left)}
        if self.qformer_text_input and not has_text_side(kept):
            if self.qformer_text_from is None:
                raise CheckpointError(
                    "model.qformer_text_input: the checkpoint's Q-Former reads no text, as in all of stage 2; set "
                    "model.qformer_text_from to the stage-1 run that it goes back to"
                )
            optional = (*optional, *TEXT_SIDE)
        return kept, (*optional, r"^llm_proj\.") if stage1 else optional

    def needs_no_checkpoint(self) -> tuple[str, ...]:
        """As of every BLIP-2, with what begins at zero: frame embeddings and LoRA's additions."""
        text_side = TEXT_SIDE if self.qformer_text_from else ()
        return (*super().needs_no_checkpoint(), *text_side, r"^frame_join\.embeddings$", r"\.lora_")

    @property
    def language_model_type(self) -> str | None:
        """The family of the frozen language model by transformers' name, such as opt or t5."""
        return str(self.language_model.model.config.model_type)

    def check_rows(self, dataset: Any) -> None:
        """Raise ConfigError for captions where the prompt asks questions, and for questions where it has no place for
        them."""
        texts, out = getattr(dataset, "texts", None), f"leave it out with datasets.{dataset.name}=null"
        if self.takes_questions and texts == "captions":
            raise ConfigError(
                f"dataset '{dataset.name}' has captions and no answers, and model.prompt '{self.prompt}' asks "
                f"questions: {out}, or train on captions in a run of its own"
            )
        if not self.takes_questions and texts == "questions":
            raise ConfigError(
                f"dataset '{dataset.name}' has questions, for which model.prompt '{self.prompt}' has no place: set it "
                f"to what asks one, with {QUESTION} in its place, such as 'Question: {QUESTION} Answer:', or {out}"
            )

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The language model's loss on a batch's texts, or on its answers where the prompt takes questions.

        Returns: loss, the mean over the scored tokens of all ranks' joined batch.
        """
        losses = self._answer_losses(samples) if self.takes_questions else self._text_losses(samples)
        count = torch.tensor([losses.numel()], device=losses.device)
        if self.training and dist.world_size() > 1:
            count = dist.all_gather(count)
        # A mean over the joined batch is the ranks' average of sums divided by this.
        return {"loss": losses.sum() / count.float().mean()}

    def _text_losses(self, samples: Mapping[str, Any]) -> Tensor:
        batch = complete_samples(samples, clips=True)
        if samples.get("text_output") is not None:
            raise InputError(
                "these samples are questions with answers, and the model would learn to say the questions; set "
                "model.prompt to what asks one, with {} in its place, such as 'Question: {} Answer:'"
            )
        visual, texts = self.visual_prompt(batch["image"]), batch["text_input"]
        with self.language_model.arithmetic():
            if not self.prompt:
                return self.language_model.pretraining_losses(visual, texts, max_length=self.max_txt_len)
            prompts = self.language_model.wrapped([self.prompt]) * len(texts)
            return self.language_model.answer_losses(visual, prompts, texts, max_length=self.max_txt_len)

    def _answer_losses(self, samples: Mapping[str, Any]) -> Tensor:
        batch = complete_questions(samples)
        questions = batch["text_input"]
        visual = self.visual_prompt(batch["image"], questions)
        prompts = self.language_model.wrapped([fill(self.prompt, question) for question in questions])
        with self.language_model.arithmetic():
            return self.language_model.answer_losses(
                visual, prompts, batch["text_output"], max_length=self.max_txt_len
            )

    def visual_prompt(self, image: Images, questions: Sequence[str] | None = None) -> Tensor:
        """Images [B, 3, H, W], or stored features of them -> [B, Q, L], in the place of so many token embeddings.

        Clips [B, F, 3, H, W] -> [B, F * Q, L] or [B, Q, L], as `video.join` says: every frame is seen by itself, with
        the question, and their query outputs are joined.

        Args:
            questions: B texts for a Q-Former that reads them; others overlook them.

        Raises ValueError when they are needed and absent, InputError for clips of too many frames.
        """
        pictures, count = split_frames(image)
        image_embeds = self.encode_image(pictures)
        batch = len(image)
        if not self.qformer_text_input:
            queries = self.encode_queries(image_embeds).output
        elif questions is None:
            raise ValueError("the Q-Former of this model reads questions: give one for each image")
        else:
            asked = self.tokenize(questions)[torch.arange(batch).repeat_interleave(count)]
            queries = self.Qformer.encode_pairs(self.query_tokens, image_embeds, asked)
        prompt: Tensor = self.llm_proj(self.frame_join(queries.unflatten(0, (batch, count))))
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
        draws: Tensor | None = None,
    ) -> list[str]:
        """Texts for images or clips: B * num_captions of them, an image's together; never with the prompt in them.

        Args:
            samples: {"image": [B, 3, H, W] or "video": [B, F, 3, H, W], "prompt": one string, or one an image; by
                default the model's own, "text_input": the questions, where its own prompt or its Q-Former takes
                some}. A Q-Former that gets no question reads the prompt.
            use_nucleus_sampling: draw from the nucleus of `top_p` at `temperature`; else beam search, greedy with
                one beam.
            max_length, min_length: of new tokens, without the end. max_new_tokens: the same as max_length.
            length_penalty: beams are ranked by log-probability / length ** length_penalty.
            num_captions: per image; above 1 it needs sampling or at least as many beams.
            draws: what decides when sampling, see `Search`; without it torch's generator does.

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
            draws=draws,
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
        draws: Tensor | None = None,
    ) -> Generated:
        """`generate` with each text's score: log-probability / length ** length_penalty of a beam, the mean
        log-probability of a token otherwise; and with its plain log p."""
        asked = asked_of(samples, template=self.prompt)
        search = Search(num_beams, num_captions, use_nucleus_sampling, draws)
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
        return self._continue(samples, self._wrapped(asked), rules, search)

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
            image: [3, H, W] or [1, 3, H, W], processed; of a clip [1, F, 3, H, W].
            history: earlier (message, answer) pairs; each call returns the one to go on with.

        Returns: the answer, and the history with it.
        """
        rules = DecodingRules(
            end_id=self.language_model.end_id, max_length=max_new_tokens, length_penalty=length_penalty
        )
        samples = (
            {"video": image} if image.dim() == 5 else {"image": image if image.dim() == 4 else image[None]}
        )
        prompt = self.language_model.conversation(history, message)
        answer = self._continue(samples, Asked([prompt], [message]), rules, Search(num_beams)).texts[0]
        return answer, [*history, (message, answer)]

    def _continue(
        self, samples: Mapping[str, Any], asked: Asked, rules: DecodingRules, search: Search
    ) -> Generated:
        """What the language model says after the images' visual prompts and these texts."""
        visual = self.visual_prompt(visual_of(samples).to(self.device), asked.questions)
        start = torch.zeros(len(visual), dtype=torch.long, device=visual.device)  # the prompt is read already
        with self.language_model.arithmetic():
            decoder = self.language_model.decoder(
                visual, asked.prompts, rows_per_input=search.rows, new_tokens=rules.max_length
            )
            decoded = decode(decoder, start, rules, search)
        texts = [self.language_model.decode(row) for row in decoded.ids.flatten(0, 1).tolist()]
        return Generated(texts, decoded.scores.flatten(), decoded.log_likelihoods.flatten())


def _check_question_keys(keywords: Mapping[str, Any], where: str) -> None:
    if not keywords.get("qformer_text_input"):
        if keywords.get("qformer_text_from"):
            raise ConfigError(
                f"{where}.qformer_text_from: the Q-Former reads no text without {where}.qformer_text_input=true"
            )
        return
    if QUESTION not in keywords.get("prompt", ""):
        raise ConfigError(
            f"{where}.qformer_text_input: set {where}.prompt to what asks a question, with {{}} in its place, such as "
            f"'Question: {{}} Answer:'; got '{keywords.get('prompt', '')}'"
        )
    longest = (keywords.get("qformer") or QFormerConfig()).max_position_embeddings
    if not 3 <= keywords.get("max_txt_len", 32) <= longest:
        raise ConfigError(
            f"{where}.max_txt_len: the Q-Former reads questions of 3 to qformer.max_position_embeddings = {longest} "
            f"tokens, got {keywords.get('max_txt_len', 32)}"
        )


def build_language_model(section: Mapping[str, Any]) -> LanguageModel:
    """The frozen language model of a `language_model` section, at random or as a shape to be filled."""
    config = LanguageModelConfig(**bind(LanguageModelConfig, section, where="model.language_model"))
    model: LanguageModel = registry.get_language_model_class(config.name)(config)
    return model

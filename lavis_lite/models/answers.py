"""What a model that generates text is asked about a picture: prompts from questions, answers from texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lavis_lite.common.errors import InputError
from lavis_lite.models.decoding import DecodingRules, Search
from lavis_lite.models.language.adapter import LanguageModel
from lavis_lite.models.ranking import log_likelihoods
from lavis_lite.samples import Images, prompts_of, texts_of, visual_of

QUESTION = "{}"  # a template's place for the question


@dataclass(frozen=True)
class Asked:
    """What goes with B images: the language model's prompts, and the texts that a Q-Former reads."""

    prompts: list[str]
    questions: list[str]


@dataclass(frozen=True)
class Generated:
    """texts: B * num_captions, an image's together, best first. scores, log_likelihoods: float[B * num_captions], see
    `Decoded`."""

    texts: list[str]
    scores: Tensor
    log_likelihoods: Tensor

    @property
    def confidences(self) -> list[float]:
        """p(text), from 0 to 1; unlike scores comparable between texts of any length."""
        return [float(value) for value in self.log_likelihoods.double().exp().tolist()]


def fill(template: str, question: str) -> str:
    """The prompt that asks a question; other braces in a template stay as they are."""
    return template.replace(QUESTION, question)


def asked_of(samples: Mapping[str, Any], *, template: str) -> Asked:
    """What a caller's dictionary asks: prompts as given, else the questions (`text_input`) in the template.

    With a prompt and no question the Q-Former reads the prompt, as in InstructBLIP. A template without a place for a
    question is the prompt itself.

    Raises InputError when a question is needed and absent, or for texts that don't fit the images.
    """
    batch = len(visual_of(samples))
    given = samples.get("text_input") is not None
    if QUESTION in template and samples.get("prompt") is None:
        if not given:
            raise InputError(
                f"samples['text_input']: the question is missing, which this model's prompt '{template}' asks"
            )
        questions = texts_of(samples, "text_input", batch=batch)
        return Asked([fill(template, question) for question in questions], questions)
    prompts = prompts_of(samples, batch=batch, default=template)
    return Asked(prompts, texts_of(samples, "text_input", batch=batch) if given else prompts)


def questions_in(samples: Mapping[str, Any], *, template: str, own: str) -> Asked:
    """The questions of `samples["text_input"]` in a template; an empty one stands for the model's own.

    Raises InputError for a template without a place for the question.
    """
    template = template or (own if QUESTION in own else QUESTION)
    if QUESTION not in template:
        raise InputError(
            f"prompt '{template}' has no {QUESTION}, the question's place: 'Question: {{}} Answer:'"
        )
    questions = texts_of(samples, "text_input", batch=len(visual_of(samples)))
    return Asked([fill(template, question) for question in questions], questions)


def check_list(answer_list: Sequence[str] | None, keep: int | None) -> list[str]:
    """The closed list to rank, without blanks at the ends of its answers.

    Raises InputError where there is none, for an answer that is no text or an empty one, which would be likely to win,
    and where nothing would be left of the list.
    """
    if isinstance(answer_list, str) or not answer_list:
        raise InputError("inference_method 'rank' needs answer_list, the answers to choose from")
    for place, answer in enumerate(answer_list):
        if not isinstance(answer, str) or not answer.strip():
            raise InputError(f"answer_list[{place}] must be a text with something in it, got {answer!r}")
    if keep is not None and keep < 1:
        raise InputError(f"num_ans_candidates must be at least 1, got {keep}")
    return [answer.strip() for answer in answer_list]


class QuestionAnswering(ABC):
    """What a generative model offers to whoever asks questions, with LAVIS's names; mixed into `Blip2Generative`."""

    prompt: str
    max_txt_len: int
    language_model: LanguageModel

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the parameters are."""

    @abstractmethod
    def visual_prompt(self, image: Images, questions: Sequence[str] | None = None) -> Tensor:
        """See `Blip2Generative`."""

    @abstractmethod
    def _continue(
        self, samples: Mapping[str, Any], asked: Asked, rules: DecodingRules, search: Search
    ) -> Generated:
        """What the language model says after the images and what is asked of them."""

    @torch.no_grad()
    def predict_answers(
        self,
        samples: Mapping[str, Any],
        num_beams: int = 5,
        inference_method: Literal["generate", "rank"] = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: Sequence[str] | None = None,
        prompt: str = "",
        length_penalty: float = -1.0,
    ) -> list[str]:
        """Answers to questions about pictures (section 4.1): one text an image.

        Args:
            samples: {"image": [B, 3, H, W] or "video": [B, F, 3, H, W], "text_input": one question, or one an image}.
            inference_method: "generate" searches with `num_beams`; "rank" chooses the likeliest of a closed list.
            max_len, min_len: of generated answers in new tokens, without the end.
            num_ans_candidates: so many answers of the list, those with the likeliest first token, are scored whole.
            answer_list: what "rank" chooses from.
            prompt: a template such as "Question: {} Short answer:"; by default the model's own, and without a place
                for a question in that the question alone.
            length_penalty: of "generate": beams are ranked by log-probability / length ** length_penalty, so that -1
                prefers short answers.

        Raises InputError for questions that don't fit the images, a template without a place for them, or "rank"
        without a list or with an empty answer in it.
        """
        return self.predict_answers_with_scores(
            samples,
            num_beams=num_beams,
            inference_method=inference_method,
            max_len=max_len,
            min_len=min_len,
            num_ans_candidates=num_ans_candidates,
            answer_list=answer_list,
            prompt=prompt,
            length_penalty=length_penalty,
        ).texts

    @torch.no_grad()
    def predict_answers_with_scores(
        self,
        samples: Mapping[str, Any],
        *,
        num_beams: int = 5,
        inference_method: Literal["generate", "rank"] = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: Sequence[str] | None = None,
        prompt: str = "",
        length_penalty: float = -1.0,
    ) -> Generated:
        """`predict_answers` with each answer's log p, generated or ranked, and `confidences`, which are p.

        scores: what answers were ranked by, not comparable between images: as of `generate_with_scores`, or log p.
        """
        if inference_method not in ("generate", "rank"):
            raise InputError(f"inference_method '{inference_method}' is neither generate nor rank")
        if inference_method == "rank":
            answers = check_list(answer_list, num_ans_candidates)
            ranked = self.score_answers(
                samples, answers, prompt=prompt, num_ans_candidates=num_ans_candidates
            )
            best = ranked.max(1)
            return Generated([answers[place] for place in best.indices.tolist()], best.values, best.values)
        asked = questions_in(samples, template=prompt, own=self.prompt)
        search = Search(num_beams)
        rules = DecodingRules.for_search(
            search,
            end_id=self.language_model.end_id,
            max_length=max_len,
            min_length=min_len,
            length_penalty=length_penalty,
        )
        return self._continue(samples, self._wrapped(asked), rules, search)

    @torch.no_grad()
    def score_answers(
        self,
        samples: Mapping[str, Any],
        answer_list: Sequence[str],
        *,
        prompt: str = "",
        num_ans_candidates: int | None = None,
    ) -> Tensor:
        """log p(answer | image, question) float32[B, A] of A listed answers, each with the token that ends it.

        Visual prompt and question are read once an image, whatever the number of answers. Arguments and errors as of
        `predict_answers`, but for num_ans_candidates: None scores all answers; else those that are no candidates get
        -inf.
        """
        answers = check_list(answer_list, num_ans_candidates)
        asked = self._wrapped(questions_in(samples, template=prompt, own=self.prompt))
        visual = self.visual_prompt(visual_of(samples).to(self.device), asked.questions)
        ids = self.language_model.answer_ids(asked.prompts, answers, max_length=self.max_txt_len)
        with self.language_model.arithmetic():
            decoder = self.language_model.decoder(visual, asked.prompts, rows_per_input=1)
            keep = len(answers) if num_ans_candidates is None else num_ans_candidates
            return log_likelihoods(decoder, ids, keep=keep, device=visual.device)

    def _wrapped(self, asked: Asked) -> Asked:
        """With the language model's prompts in its chat format, where it has one; a Q-Former knows none."""
        return Asked(self.language_model.wrapped(asked.prompts), asked.questions)

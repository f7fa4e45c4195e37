"""What a model that generates text is asked about a picture: prompts from questions, answers from texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lavis_lite.common.errors import InputError
from lavis_lite.samples import image_of, prompts_of, texts_of

QUESTION = "{}"  # a template's place for the question


@dataclass(frozen=True)
class Asked:
    """What goes with B images: the language model's prompts, and the texts that a Q-Former reads."""

    prompts: list[str]
    questions: list[str]


def fill(template: str, question: str) -> str:
    """The prompt that asks a question; other braces in a template stay as they are."""
    return template.replace(QUESTION, question)


def asked_of(samples: Mapping[str, Any], *, template: str) -> Asked:
    """What a caller's dictionary asks: prompts as given, else the questions (`text_input`) in the template.

    With a prompt and no question the Q-Former reads the prompt, as in InstructBLIP. A template without a place for a
    question is the prompt itself.

    Raises InputError when a question is needed and absent, or for texts that don't fit the images.
    """
    batch = len(image_of(samples))
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
    questions = texts_of(samples, "text_input", batch=len(image_of(samples)))
    return Asked([fill(template, question) for question in questions], questions)


def check_list(answer_list: Sequence[str] | None, keep: int) -> list[str]:
    """The closed list to rank; InputError where there is none or nothing of it would be left."""
    if isinstance(answer_list, str) or not answer_list:
        raise InputError("inference_method 'rank' needs answer_list, the answers to choose from")
    if keep < 1:
        raise InputError(f"num_ans_candidates must be at least 1, got {keep}")
    return list(answer_list)

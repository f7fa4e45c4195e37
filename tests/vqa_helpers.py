"""Tiny models that answer questions about noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from generative_helpers import tiny_generative_config
from stage1_helpers import enlarge_weights, tiny_samples, write_tokenizer

from lavis_lite.models.blip2_generative import Blip2Generative

PROMPT = "question: {} answer:"
QUESTIONS = ["what color is the dog", "is there a cat on the mat", "how big", "a"]
ANSWERS = ["red", "yes", "a small blue cat", "two"]


def question_config(folder: Path, family: str = "opt", **changes: Any) -> dict[str, Any]:
    """A model section whose Q-Former reads questions, unless `changes` say otherwise."""
    settings = {"prompt": PROMPT, "qformer_text_input": True, **changes}
    return {
        **tiny_generative_config(folder / "llm", family, **settings),
        "tokenizer": write_tokenizer(folder / "bert"),
    }


def question_model(folder: Path, family: str = "opt", *, std: float = 0.2, **changes: Any) -> Blip2Generative:
    torch.manual_seed(0)
    model = Blip2Generative.from_config(question_config(folder, family, **changes))
    enlarge_weights(model, std=std)
    return model.eval()


def question_samples(batch: int = 4) -> dict[str, Any]:
    image = tiny_samples(batch)["image"]
    return {"image": image, "text_input": QUESTIONS[:batch], "text_output": ANSWERS[:batch]}

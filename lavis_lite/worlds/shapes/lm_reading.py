"""What a language model makes of a full description of a scene: answers and copies, by greedy generation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from lavis_lite.worlds.shapes.captions import describe
from lavis_lite.worlds.shapes.lm_documents import DESCRIBE_PROMPT, question_prompt
from lavis_lite.worlds.shapes.lm_tokenizers import NEWLINE
from lavis_lite.worlds.shapes.questions import TYPES, ask
from lavis_lite.worlds.shapes.scene import Scene

# New tokens at most; the longest description has 45 and an answer 2.
ANSWER_LENGTH, DESCRIPTION_LENGTH = 6, 60


def reading_scores(
    lm: Any, tokenizer: Any, scenes: Sequence[Scene], *, batch_size: int = 100
) -> dict[str, float]:
    """Fractions that are right, word for word: of each question type, and "copy" of the descriptions.

    Every scene is asked one question of every type that it allows, in the two prompts by turns.

    Args:
        lm: an `OPTForCausalLM` or `T5ForConditionalGeneration` in eval mode. tokenizer: its tokenizer.
    """
    asked = []
    for number, scene in enumerate(scenes):
        rng = random.Random(f"reading/{number}/{scene.key}")
        found = [question for kind in TYPES if (question := ask(scene, kind, rng)) is not None]
        asked += [(q.type, f"{describe(scene)}. {question_prompt(q.text, rng)}", q.answer) for q in found]
    replies = replies_to(
        lm, tokenizer, [text for _, text, _ in asked], max_new_tokens=ANSWER_LENGTH, batch_size=batch_size
    )
    right: dict[str, list[bool]] = {kind: [] for kind in TYPES}
    for (kind, _, answer), reply in zip(asked, replies, strict=True):
        right[kind].append(reply == answer)
    descriptions = [describe(scene) for scene in scenes]
    copies = replies_to(
        lm,
        tokenizer,
        [f"{text}. {DESCRIBE_PROMPT}" for text in descriptions],
        max_new_tokens=DESCRIPTION_LENGTH,
        batch_size=batch_size,
    )
    right["copy"] = [copy == text for copy, text in zip(copies, descriptions, strict=True)]
    return {name: sum(values) / len(values) for name, values in right.items() if values}


@torch.no_grad()
def replies_to(
    lm: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """What a model says after each prompt, greedily, up to its end of text.

    A decoder-only model says it after the prompt, so prompts are padded on the left there.
    """
    decoder_only = not lm.config.is_encoder_decoder
    end = tokenizer.convert_tokens_to_ids(NEWLINE) if decoder_only else tokenizer.eos_token_id
    replies = []
    for start in range(0, len(prompts), batch_size):
        encoded = tokenizer(
            list(prompts[start : start + batch_size]),
            padding=True,
            padding_side="left" if decoder_only else "right",
            return_tensors="pt",
        ).to(lm.device)
        ids = lm.generate(
            **encoded, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=end
        )
        new = ids[:, encoded["input_ids"].shape[1] :] if decoder_only else ids
        replies += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return replies

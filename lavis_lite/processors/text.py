"""Captions and questions as the models of BLIP's family were trained on them: lower case, little punctuation.

The rules are those of the published checkpoints' training; other text meets the same tokenizer with other
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Self

from lavis_lite.common.registry import registry

# What the published models never saw inside a text. Commas, hyphens, slashes, quotes and apostrophes stay.
_DROPPED = '.!"()*#:;~'
_TO_SPACE = str.maketrans(dict.fromkeys(_DROPPED, " "))
_TO_NOTHING = str.maketrans(dict.fromkeys(_DROPPED, ""))


class _TextProcessor:
    """Shared by the text processors: LAVIS's `from_config`."""

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> Self:
        """The processor with the keywords of a mapping; None gives the defaults."""
        return cls(**dict(cfg or {}))


@registry.register_processor("blip_caption")
class BlipCaption(_TextProcessor):
    """Lower-cases a caption, turns punctuation into spaces, keeps `max_words` words, and puts `prompt` before
    it.
    """

    def __init__(self, prompt: str = "", *, max_words: int = 50) -> None:
        self.prompt = prompt
        self.max_words = max_words

    def __call__(self, caption: str) -> str:
        words = caption.lower().translate(_TO_SPACE).split()
        return self.prompt + " ".join(words[: self.max_words])


@registry.register_processor("blip_question")
class BlipQuestion(_TextProcessor):
    """Lower-cases a question, drops punctuation (the question mark stays), and keeps `max_words` words."""

    def __init__(self, max_words: int = 50) -> None:
        self.max_words = max_words

    def __call__(self, question: str) -> str:
        words = question.lower().translate(_TO_NOTHING).split()
        return " ".join(words[: self.max_words])

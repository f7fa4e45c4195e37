"""The tokenizers of the world's two language models: one token a word, the words of `vocabulary.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavis_lite.common.errors import ConfigError
from lavis_lite.worlds.shapes.vocabulary import SPECIAL, vocabulary

LANGUAGE = Path(__file__).resolve().parent / "language"
FAMILIES = ("opt", "t5")
PAD, END, UNKNOWN, NEWLINE = "<pad>", "</s>", "<unk>", "\n"
MAX_LENGTH = 256
# Words of the prompts that only language models get.
_PROMPT_WORDS = ["describe", "description", "caption", "this", "it", "briefly"]


def tokens(family: str) -> list[str]:
    """All tokens of a family in the order of their ids, special ones first.

    OPT has a token for a line break, which ends a text there; for T5 line breaks are blanks.
    """
    if family not in FAMILIES:
        raise ConfigError(f"no language family '{family}' in the shapes world; one of {', '.join(FAMILIES)}")
    special = [PAD, END, UNKNOWN, NEWLINE] if family == "opt" else [PAD, END, UNKNOWN]
    words = {word for word in vocabulary() if word not in SPECIAL} | set(_PROMPT_WORDS)
    return [*special, *sorted(words)]


def build_tokenizer(family: str) -> Any:
    """The tokenizer of a family ("opt" or "t5"), as a transformers tokenizer.

    OPT's puts `</s>` before every text, as the real one does; T5's puts `</s>` after it. Texts are lower-cased,
    words it doesn't know become `<unk>`, and decoding gives a text of this world back exactly.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    ids = {token: number for number, token in enumerate(tokens(family))}
    inner = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated"),
    ])  # fmt: skip
    # Words are joined by blanks; then the blanks that no text of this world has are taken out again.
    glued = [decoders.Replace(f" {mark}", mark) for mark in (*",.:?!", NEWLINE)]
    inner.decoder = decoders.Sequence([
        decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), *glued,
        decoders.Replace(f"{NEWLINE} ", NEWLINE),
    ])  # fmt: skip
    if family == "opt":
        # Not special: decoding shows it, as it shows the real OPT's.
        inner.add_tokens([AddedToken(NEWLINE, normalized=False)])
    pattern = f"{END} $A" if family == "opt" else f"$A {END}"
    inner.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=[(END, ids[END])])
    named = {"bos_token": END} if family == "opt" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **named,
    )

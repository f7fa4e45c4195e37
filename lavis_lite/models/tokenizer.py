"""Text in and out of the Q-Former: BERT's WordPiece tokens plus [DEC], which starts a text to be decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_lite.common.errors import ConfigError
from lavis_lite.models.rows import take_rows

DEC = "[DEC]"
SHAPES_FOLDER = Path(__file__).resolve().parent.parent / "worlds" / "shapes" / "tokenizer"


@dataclass(frozen=True)
class TextTokens:
    """A batch of tokenised texts, padded on the right to its longest.

    input_ids: int64[B, T], beginning with [CLS] and ending with [SEP].
    attention_mask: bool[B, T], True at real tokens.
    words, dec_word: float[B, T, D] and [D], the embeddings of the tokens and of [DEC], once `QFormer.look_up` found
        them; else they are looked up where they are needed.
    """

    input_ids: Tensor
    attention_mask: Tensor
    words: Tensor | None = None
    dec_word: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> TextTokens:
        """The chosen rows, in that order, at the same width."""
        words = None if self.words is None else take_rows(self.words, rows)
        return replace(
            self, input_ids=self.input_ids[rows], attention_mask=self.attention_mask[rows], words=words
        )

    def to(self, device: torch.device | str) -> TextTokens:
        """The same tokens on another device, to be looked up there."""
        return TextTokens(self.input_ids.to(device), self.attention_mask.to(device))

    def padded(self, length: int) -> TextTokens:
        """At least `length` wide, to be looked up: ranks that exchange texts need one width."""
        more = max(0, length - self.input_ids.shape[1])
        return TextTokens(F.pad(self.input_ids, (0, more)), F.pad(self.attention_mask, (0, more)))

    def trimmed(self) -> TextTokens:
        """Without the columns that are padding in every row."""
        longest = int(self.attention_mask.sum(1).max())
        words = None if self.words is None else self.words[:, :longest]
        ids, mask = self.input_ids[:, :longest], self.attention_mask[:, :longest]
        return replace(self, input_ids=ids, attention_mask=mask, words=words)

    def for_decoding(self, dec_id: int) -> tuple[TextTokens, Tensor]:
        """What the decoder reads, ([DEC] w1 .. wn), and the next tokens it shall say, (w1 .. wn [SEP]).

        The last token predicts nothing and nothing before it may look at it, so it isn't read at all.

        Returns: tokens [B, T-1] and the targets int64[N] of their N real tokens, row after row.
        """
        ids, mask = self.input_ids[:, :-1].clone(), self.attention_mask[:, 1:]
        ids[:, 0] = dec_id
        words = None
        if self.words is not None and self.dec_word is not None:
            words = torch.cat([self.dec_word.expand(len(self), 1, -1), self.words[:, 1:-1]], 1)
        return TextTokens(ids, mask, words), self.input_ids[:, 1:][mask]


@dataclass(frozen=True)
class Word:
    """A word as it stands in a text, and the places of its tokens, [CLS] being at 0."""

    text: str
    places: tuple[int, ...]


class TextTokenizer:
    """A BERT tokenizer with [DEC] added, as LAVIS adds it: the last id of the vocabulary.

    Args:
        source: a hub name such as `bert-base-uncased`, a local folder, or `shapes` for the embedded world's.

    Raises ConfigError when it can't be loaded from there.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._tokenizer = _load(source)
        self._tokenizer.add_special_tokens({"bos_token": DEC})
        special = ("cls_token_id", "sep_token_id", "pad_token_id", "bos_token_id")
        missing = [
            name.removesuffix("_id") for name in special if getattr(self._tokenizer, name, None) is None
        ]
        if missing:
            raise ConfigError(
                f"model.tokenizer '{source}' has no {', '.join(missing)}; a BERT tokenizer is needed"
            )
        self.cls_id, self.sep_id, self.pad_id, self.dec_id = (
            int(getattr(self._tokenizer, name)) for name in special
        )

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, texts: Sequence[str], *, max_length: int) -> TextTokens:
        """Tokens of the texts, each of at most `max_length` tokens with [CLS] and [SEP]."""
        encoded = self._tokenizer(
            list(texts), padding="longest", truncation=True, max_length=max_length, return_tensors="pt"
        )
        return TextTokens(encoded["input_ids"], encoded["attention_mask"].bool())

    def words(self, text: str, *, max_length: int) -> list[Word]:
        """The words of a text that is cut to `max_length` tokens, as the tokenizer splits it; punctuation is none."""
        encoded = self._tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
        spans: dict[int, list[int]] = {}
        for place, number in enumerate(encoded.word_ids()):
            if number is not None:
                spans.setdefault(number, []).append(place)
        offsets = encoded["offset_mapping"]
        found = [
            Word(text[offsets[places[0]][0] : offsets[places[-1]][1]], tuple(places))
            for places in spans.values()
        ]
        return [word for word in found if any(letter.isalnum() for letter in word.text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row of ids, without special tokens and surrounding blanks."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def has_words(tokenizer: Any) -> bool:
    """Whether a tokenizer of transformers knows any text.

    Of a name or folder without a vocabulary it may make one of special tokens (and the mark of a blank) alone, to which
    every text is unknown.
    """
    ordinary = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    return any(letter.isalnum() for token in ordinary for letter in token)


def _load(source: str) -> Any:
    from transformers import BertTokenizer  # seconds to import, and only texts need it

    folder = SHAPES_FOLDER if source == "shapes" else Path(source).expanduser()
    local = folder.is_dir()
    try:
        tokenizer = BertTokenizer.from_pretrained(str(folder) if local else source)
        if not has_words(tokenizer):
            raise ValueError("found no vocab.txt or tokenizer.json with words")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = (
            "is a folder without a tokenizer"
            if local
            else "is no local folder and can't be loaded from the hub"
        )
        raise ConfigError(
            f"model.tokenizer: '{source}' {what} ({reason}); give the folder of a saved BERT tokenizer, or 'shapes' "
            "for the embedded world's"
        ) from error
    return tokenizer

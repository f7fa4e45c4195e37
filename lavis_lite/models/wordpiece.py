"""Learns a BERT tokenizer from one's own captions, for other languages or machines without network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def train_wordpiece(texts: Iterable[str], folder: str | Path, *, vocab_size: int = 30_000) -> int:
    """Learn a lower-case WordPiece vocabulary from `texts` and save it as a tokenizer folder.

    Args:
        folder: where `model.tokenizer` will find it.
        vocab_size: at most so many tokens, the five special ones included.

    Returns: the number of tokens.
    """
    from tokenizers import BertWordPieceTokenizer  # comes with transformers
    from transformers import BertTokenizer

    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(texts, vocab_size=vocab_size, min_frequency=1, show_progress=False)
    vocabulary = learner.get_vocab()
    BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=512).save_pretrained(str(folder))
    return len(vocabulary)

"""The world's own BERT tokenizer: every word of its captions, questions and answers, as a folder of files."""

from __future__ import annotations

import re
from pathlib import Path

from lavis_lite.worlds.shapes.questions import answers
from lavis_lite.worlds.shapes.scene import BACKGROUNDS, CELLS, COLOURS, SHAPES, SIZES
from lavis_lite.worlds.shapes.words import NUMBERS, PLURALS, RELATIONS

FOLDER = Path(__file__).resolve().parent / "tokenizer"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# All other words of the phrases in captions.py and questions.py, and those of the usual prompts.
_PHRASES = """
a an and the there is are on of at in with no none one them only object objects shape shapes background
nothing beside what color where how many small or large yes
question answer short picture photo image
, . : ? !
"""


def vocabulary() -> list[str]:
    """All tokens, special ones first, then in alphabetical order."""
    groups = (
        *CELLS,
        *RELATIONS,
        *COLOURS,
        *BACKGROUNDS,
        *SHAPES,
        *PLURALS.values(),
        *SIZES,
        *NUMBERS,
        *answers(),
    )
    words = {word for text in (_PHRASES, *groups) for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text)}
    return [*SPECIAL, *sorted(words)]


def write_tokenizer(folder: Path = FOLDER) -> Path:
    """Write the tokenizer's files, which `AutoTokenizer.from_pretrained(folder)` reads offline; returns the
    folder.

    `python -c "from lavis_lite.worlds.shapes.vocabulary import write_tokenizer; write_tokenizer()"` makes
    the files in the package; a test compares them.
    """
    from transformers import BertTokenizerFast  # heavy, and only needed here

    folder.mkdir(parents=True, exist_ok=True)
    tokens = {token: number for number, token in enumerate(vocabulary())}
    BertTokenizerFast(vocab=tokens, do_lower_case=True, model_max_length=512).save_pretrained(folder)
    return folder

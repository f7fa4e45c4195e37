"""Several answers in one text: a JSON list in a cell of csv and tsv, or texts between separators."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from lavis_lite.common.errors import DataError

# What people put between answers, in a file whose cells hold one text each.
JOINERS = ("|", ";")


def split_answers(value: Any, separator: str | None, *, is_cell: bool, about: str, where: str) -> Any:
    """The answers that a text holds; a value that is no text, or holds one answer, as it is.

    separator: declared, it alone parts answers. is_cell: of a file without types, where a list can only be JSON text.
    about: file and place, where: YAML path of the split, for messages.
    Raises DataError for a cell that begins as a list of texts does and is no JSON.
    """
    if not isinstance(value, str):
        return value
    if separator is not None:
        return [answer for answer in map(str.strip, value.split(separator)) if answer]
    text = value.strip()
    if text.startswith('"[') and text.endswith(']"'):  # a tsv's cell that was quoted as csv's are
        text = text[1:-1].replace('""', '"')
    if not is_cell or not text.startswith("["):
        return value
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Python's own spelling of lists, say. Other text in brackets, such as "[unclear]", is an answer.
        if not re.match(r"\[\s*['\"]", text):
            return value
        raise DataError(
            f'{about}: the answers {value!r:.80} are no JSON list; write them as ["red", "blue"], or with a '
            f"separator and {where}.fields.answer_separator"
        ) from error
    return found if isinstance(found, list) else value


def joiner_of(answers: Sequence[str]) -> str | None:
    """The sign between what may be several answers in a single text; None where there is none."""
    if len(answers) != 1:
        return None
    return next(
        (sign for sign in JOINERS if len([part for part in answers[0].split(sign) if part.strip()]) > 1), None
    )

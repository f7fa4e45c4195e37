"""What a table of questions may not have been meant to be.

A table is made once and read at every start; what is doubtful about it is told at every start too.
"""

from __future__ import annotations

from collections.abc import Iterator

from lavis_lite.datasets.answer_cells import joiner_of
from lavis_lite.datasets.questions import USUAL_NAMES, QuestionSource
from lavis_lite.datasets.records import RecordTable

LOOKED_AT = 16  # rows, the first


def doubts(records: RecordTable, source: QuestionSource) -> Iterator[str]:
    """Lines for the log: answers in a field that nothing reads, several answers that were taken as one."""
    asked = [records[row].question for row in range(min(LOOKED_AT, len(records)))]
    answers = [question.answers for question in asked if question is not None]
    unread = [] if any(answers) else source.unread()
    if unread:
        yield (
            f"{source.path}: no field {', '.join(USUAL_NAMES['answer'])}, so its questions can be answered but not "
            f"scored; nothing reads {', '.join(unread)}: if one of these holds the answers, set "
            f"{source.where}.fields.answer to its name"
        )
    if source.has_cells and source.names.answer_separator is None:
        joined = next((texts[0] for texts in answers if joiner_of(texts)), None)
        if joined is not None:
            yield (
                f"{source.path}: an answer such as '{joined:.80}' is taken as one; if these are several, set "
                f"{source.where}.fields.answer_separator to '{joiner_of([joined])}'"
            )

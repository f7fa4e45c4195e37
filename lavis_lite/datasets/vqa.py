"""The map-style dataset of questions: a row is a question about a picture with the answers people gave."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch

from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.image_text import ImageTextDataset
from lavis_lite.datasets.readers import Asked
from lavis_lite.datasets.records import Record


class QuestionDataset(ImageTextDataset):
    """Pictures with a question each; arguments as of `ImageTextDataset`, `text_processor` is of questions.

    Answers are learnt, and scored against, as their file has them.
    """

    texts: ClassVar[str] = "questions"

    @property
    def answered(self) -> bool:
        """Whether the rows have answers, as far as the first of every part tells."""
        firsts = (part.records[0].question for part in self.parts if len(part.records))
        return any(asked is not None and asked.answers for asked in firsts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row as a person looks at it: the unprocessed picture, question, all answers, both numbers.

        Raises IndexError, or UnreadableSample. Training reads rows with `load`.
        """
        record, part = self._record(index)
        asked = self._asked(record, part)
        return {
            "image": self._picture(self._path(record, part)),
            "text_input": asked.text,
            "answers": asked.answers,
            "question_id": json.loads(asked.id),
            "image_id": record.image_id,
        }

    def _draw_texts(self, index: int, record: Record, part: int) -> dict[str, Any]:
        """What `load` gives besides the image: text_input (the question), text_output (the answer), question_id,
        image_id, index.

        Each of the answers people gave is drawn as often as the others, so that one that five of ten gave comes half
        of the time. text_output is empty where the file has no answers. Raises UnreadableSample.
        """
        asked = self._asked(record, part)
        answers = [answer for answer in asked.answers if answer] or [""]
        answer = answers[int(torch.randint(len(answers), ()))]
        return {
            "text_input": self.text_processor(asked.text),
            "text_output": answer,
            "question_id": json.loads(asked.id),
            "image_id": self._image_id(index, record),
            "index": index,
        }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """image float32[B, 3, H, W] or features; text_input, text_output and question_id (B each); image_id and index
        int64[B]."""
        batch = super().collate(samples)
        lists = {key: [sample[key] for sample in samples] for key in ("text_output", "question_id")}
        return {**batch, **lists}

    def captions(self, index: int) -> list[str]:
        """The answers to a row's question."""
        record, _ = self._record(index)
        return list(record.question.answers) if record.question else []

    def _asked(self, record: Record, part: int) -> Asked:
        if record.problem is not None or record.question is None:
            raise UnreadableSample(self._path(record, part), record.problem or "it has no question")
        return record.question

"""From a `datasets` entry with `builder: vqa` to datasets of questions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lavis_lite.common import dist
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import MapDataset
from lavis_lite.datasets.builders import ImageTextBuilder, check_limit, selection
from lavis_lite.datasets.question_doubts import doubts
from lavis_lite.datasets.questions import QuestionFields, QuestionSource
from lavis_lite.datasets.records import RecordTable, Source
from lavis_lite.datasets.vqa import QuestionDataset

logger = logging.getLogger(__name__)

Format = Literal["auto", "vqa", "gqa", "json", "jsonl", "csv", "tsv", "parquet"]


@dataclass(frozen=True)
class QuestionSplitConfig:
    """One source of a split's questions.

    annotations: the file of questions and answers; with `questions`, that of the answers (VQAv2, OK-VQA).
    questions: VQAv2's file of questions; without `annotations` they can be asked, not scored.
    images: the folder that picture paths start from; by default the dataset's root.
    image_name: the path for a picture's number, such as "val2014/COCO_val2014_{image_id:012}.jpg".
    pictures: instead, a file of COCO's format whose `images` tell the path for a number.
    format: `auto` goes by suffix and content. fields: the names that a row's fields have.
    where: field -> value or values: takes only such rows. limit: only the first rows.
    """

    annotations: str | None = None
    questions: str | None = None
    images: str | None = None
    image_name: str | None = None
    pictures: str | None = None
    format: Format = "auto"
    fields: QuestionFields | None = None
    where: Mapping[str, Any] | None = None
    limit: int | None = None

    def check(self, where: str) -> None:
        """Raise ConfigError for keys that don't go together."""
        if self.annotations is None and self.questions is None:
            raise ConfigError(
                f"{where}: set {where}.annotations to a file of questions and answers, or {where}.questions and "
                f"{where}.annotations to VQAv2's two files"
            )
        if self.format == "vqa" and self.questions is None:
            raise ConfigError(f"{where}.format: 'vqa' is a pair of files: set {where}.questions too")
        if self.questions is not None and self.format not in ("auto", "vqa"):
            raise ConfigError(
                f"{where}.questions: a second file belongs to format 'vqa', not '{self.format}'; set "
                f"{where}.questions=null"
            )
        if self.image_name is not None and self.pictures is not None:
            raise ConfigError(
                f"{where}: {where}.image_name and {where}.pictures both name pictures: keep one"
            )
        if self.fields is not None and self.fields.answer_separator == "":
            raise ConfigError(
                f"{where}.fields.answer_separator is empty; set it to what parts answers, such as '|' (in quotes), or "
                "to null"
            )
        check_limit(self.limit, where)


@registry.register_builder("vqa")
class VqaBuilder(ImageTextBuilder):
    """Questions about pictures; making one checks the configuration, reads no file.

    Args:
        name, root, vis_processor, ratio, limit: as of `ImageTextBuilder`. text_processor: of questions.
        train, val, test: keys and values of `QuestionSplitConfig`, or a list of such; null leaves a split out.
        format, fields, image_name: defaults of the splits' own.

    Raises ConfigError with the YAML path of what is wrong.
    """

    split_class: ClassVar[type] = QuestionSplitConfig
    dataset_class: ClassVar[Callable[..., MapDataset]] = QuestionDataset
    default_text: ClassVar[Mapping[str, Any]] = {
        "train": {"name": "blip_question"},
        "eval": {"name": "blip_question"},
    }

    def __init__(
        self,
        *,
        name: str,
        root: str | None = None,
        train: Mapping[str, Any] | Sequence[Any] | None = None,
        val: Mapping[str, Any] | Sequence[Any] | None = None,
        test: Mapping[str, Any] | Sequence[Any] | None = None,
        format: Format = "auto",
        fields: QuestionFields | None = None,
        image_name: str | None = None,
        vis_processor: Mapping[str, Any] | None = None,
        text_processor: Mapping[str, Any] | None = None,
        ratio: float | None = None,
        limit: int | None = None,
    ) -> None:
        self._set_up(
            name,
            root,
            {"train": train, "val": val, "test": test},
            {"format": format, "fields": fields, "image_name": image_name, "limit": limit},
            vis_processor,
            text_processor,
            ratio,
        )

    def _source(self, config: Any, split: str, where: str) -> Source:
        return QuestionSource(
            annotations=self._file(config.annotations, f"{where}.annotations"),
            questions=self._file(config.questions, f"{where}.questions"),
            pictures=self._file(config.pictures, f"{where}.pictures"),
            images=self._images(config.images, where),
            image_name=config.image_name,
            format=config.format,
            names=config.fields or QuestionFields(),
            select=selection(config.where),
            limit=config.limit,
            where=where,
            needs_answers=split == "train",
        )

    def _probe(self, records: RecordTable, source: Source) -> None:
        super()._probe(records, source)
        assert isinstance(source, QuestionSource)
        if dist.is_main():
            for doubt in doubts(records, source):
                logger.warning("%s", doubt)

"""Captions and questions of clips: the files of MSR-VTT and MSVD as published, beside the formats of pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lavis_lite.common.errors import DataError
from lavis_lite.datasets.folder import Kind
from lavis_lite.datasets.questions import QuestionSource
from lavis_lite.datasets.readers import Row, is_selected, load_json, need_field, numbered, read_text
from lavis_lite.datasets.records import Source
from lavis_lite.processors.video import SUFFIXES

logger = logging.getLogger(__name__)

CLIPS = Kind("clips", "clip", SUFFIXES)
CLIP_NAME = "{video_id}.mp4"


@dataclass(frozen=True)
class ClipSource(Source):
    """What a table of captioned clips is made from.

    names_file: the clips' names, one a line: rows of others are left out. video_name: a clip's path from its
    `video_id`, of formats that tell no path.
    """

    kind: ClassVar[Kind] = CLIPS

    names_file: Path | None = None
    video_name: str = CLIP_NAME

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that decide the rows."""
        return (*super().files, *([self.names_file] if self.names_file else []))

    def rows(self) -> Iterator[Row]:
        """One row a clip (`msrvtt`, `msvd`), else as of `Source`. Raises DataError with file, place and remedy."""
        own = {"msrvtt": self._msrvtt, "msvd": self._msvd}.get(self.format)
        rows = own() if own else super().rows()
        return rows if self.names_file is None else _named(rows, self.names_file, self.where)

    def _msrvtt(self) -> Iterator[Row]:
        """MSR-VTT's `videos` (video_id, split, category) and `sentences` (video_id, caption)."""
        assert self.annotations is not None
        path = self.annotations
        videos, sentences = _lists_of(path, load_json(path, lines_too=False))
        captions: dict[Any, list[str]] = {}
        for place, sentence in numbered(path, sentences):
            place = f"sentences, {place}"
            number = need_field(path, place, sentence, "video_id")
            captions.setdefault(number, []).append(str(need_field(path, place, sentence, "caption")).strip())
        for place, video in numbered(path, videos):
            place = f"videos, {place}"
            if is_selected(path, place, video, self.select, self.where):
                number = need_field(path, place, video, "video_id")
                yield self._row(number, captions.get(number, []))

    def _msvd(self) -> Iterator[Row]:
        """MSVD's AllVideoDescriptions.txt: a clip's name, a blank, a caption; clips by first appearance."""
        assert self.annotations is not None
        captions: dict[str, list[str]] = {}
        for line in read_text(self.annotations).splitlines():
            name, blank, caption = line.strip().partition(" ")
            if blank and not name.startswith("#"):
                captions.setdefault(name, []).append(caption.strip())
        for name, texts in captions.items():
            yield self._row(name, texts)

    def _row(self, number: Any, captions: list[str]) -> Row:
        try:
            name = self.video_name.format(video_id=number)
        except (ValueError, LookupError) as error:
            raise DataError(
                f"{self.where}.video_name: '{self.video_name}' can't name clip '{number}' ({error}); write "
                f"'{CLIP_NAME}', say"
            ) from error
        return Row(name, captions, number, None if captions else f"{self.path}: clip {number} has no caption")


@dataclass(frozen=True)
class ClipQuestionSource(QuestionSource):
    """What a table of questions about clips is made from.

    names_file: as of `ClipSource`. image_name: a clip's path from its `video_id` or `image_id`.
    """

    name_example: ClassVar[str] = "video{video_id}.mp4"

    names_file: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that decide the rows."""
        return (*super().files, *([self.names_file] if self.names_file else []))

    def rows(self) -> Iterator[Row]:
        """One row a question, as of `QuestionSource`."""
        rows = super().rows()
        return rows if self.names_file is None else _named(rows, self.names_file, self.where)


def _named(rows: Iterator[Row], names_file: Path, where: str) -> Iterator[Row]:
    """The rows whose clip a file names, one a line: by its path or its file name, with or without suffix."""
    wanted = {line.strip() for line in read_text(names_file).splitlines()} - {""}
    missing = set(wanted)
    for row in rows:
        clip = Path(row.image)
        found = wanted & {row.image, row.image.removesuffix(clip.suffix), clip.name, clip.stem}
        missing -= found
        if found:
            yield row
    if missing:
        logger.warning(
            "%s: %d of %d names are of no clip that %s tells of, for example '%s'",
            *(names_file, len(missing), len(wanted), where, min(missing)),
        )


def _lists_of(path: Path, content: Any) -> tuple[list[Any], list[Any]]:
    videos, sentences = (
        content.get(name) if isinstance(content, dict) else None for name in ("videos", "sentences")
    )
    if not isinstance(videos, list) or not isinstance(sentences, list):
        raise DataError(
            f"{path}: no lists 'videos' and 'sentences', as MSR-VTT's videodatainfo.json has them"
        )
    return videos, sentences

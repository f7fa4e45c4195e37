"""Writes the world's clips as ordinary files: AVI, captions a clip a line, questions a line each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lavis_lite.common.io import atomic_dir
from lavis_lite.common.logging import get_logger
from lavis_lite.worlds.shapes.avi import avi, jpeg
from lavis_lite.worlds.shapes.clip_texts import CLIP_TYPES, clip_captions, clip_questions
from lavis_lite.worlds.shapes.clips import FPS, FRAMES, Clip, sample_clip
from lavis_lite.worlds.shapes.render import render
from lavis_lite.worlds.shapes.scene import SPLITS, Scene, Split
from lavis_lite.worlds.shapes.spec import ID_STRIDE, FileSpec
from lavis_lite.worlds.shapes.writer import ANSWERS_PER_QUESTION

logger = get_logger(__name__)


@dataclass(frozen=True)
class ClipSpec(FileSpec):
    """What is written: clips per split, their side in pixels, questions per clip, the seed."""

    kind: ClassVar[str] = "shapes_video"
    version: ClassVar[int] = 1
    bounds: ClassVar[dict[str, tuple[int, int]]] = {
        **FileSpec.bounds,
        "questions_per_clip": (1, len(CLIP_TYPES)),
    }

    train: int = 3000
    val: int = 300
    test: int = 300
    questions_per_clip: int = 4


def write_clips(spec: ClipSpec) -> Path:
    """The folder with the clips' files, written now unless it is there: complete or not at all.

    Layout: clips/<split>/000000.avi and annotations/{captions,questions}_<split>.jsonl.
    """
    folder = spec.folder
    if folder.is_dir():
        return folder
    logger.info("drawing %d clips of the shapes world into %s", sum(map(spec.size, SPLITS)), folder)
    with atomic_dir(folder) as temporary:
        (temporary / "annotations").mkdir()
        for split in SPLITS:
            _write_split(spec, split, temporary)
    return folder


def _write_split(spec: ClipSpec, split: Split, root: Path) -> None:
    (root / "clips" / split).mkdir(parents=True)
    captions, questions = [], []
    for index in range(spec.size(split)):
        clip = sample_clip(seed=spec.seed, split=split, index=index)
        name, number = f"{index:06d}.avi", SPLITS.index(split) * ID_STRIDE + index
        (root / "clips" / split / name).write_bytes(draw_clip(clip, size=spec.image_size))
        captions.append({"video": name, "video_id": number, "captions": clip_captions(clip)})
        questions += [
            {"video": name, "video_id": number, **row} for row in _questions(spec, split, number, clip)
        ]
    for kind, rows in (("captions", captions), ("questions", questions)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "annotations" / f"{kind}_{split}.jsonl").write_text(lines, encoding="utf-8")


def _questions(spec: ClipSpec, split: Split, number: int, clip: Clip) -> Iterator[dict[str, Any]]:
    """As of pictures: one right answer, in val and test as often as VQAv2's accuracy wants it."""
    voices = 1 if split == "train" else ANSWERS_PER_QUESTION
    for place, question in enumerate(clip_questions(clip, count=spec.questions_per_clip)):
        yield {
            "question_id": number * len(CLIP_TYPES) + place,
            "question": question.text,
            "answers": [question.answer] * voices,
            "question_type": question.type,
            "answer_type": question.answer_type,
        }


def draw_clip(clip: Clip, *, size: int = 64) -> bytes:
    """The clip as an AVI file of `FRAMES` frames; the same bytes for the same clip and size."""
    drawn: dict[Scene, bytes] = {}  # frames at rest are alike
    frames = []
    for number in range(FRAMES):
        scene = clip.frame(number)
        if scene not in drawn:
            drawn[scene] = jpeg(render(scene, size=size))
        frames.append(drawn[scene])
    return avi(frames, size=(size, size), fps=FPS)

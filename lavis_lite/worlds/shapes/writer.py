"""Writes the world as ordinary files: pictures, COCO captions and instances, VQAv2 questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

from lavis_lite.common.errors import DataError
from lavis_lite.common.io import atomic_dir
from lavis_lite.common.logging import get_logger
from lavis_lite.worlds.shapes.captions import STYLES, captions, describe
from lavis_lite.worlds.shapes.questions import TYPES, questions
from lavis_lite.worlds.shapes.render import render
from lavis_lite.worlds.shapes.scene import SHAPES, SPLITS, Scene, Split, sample_scene
from lavis_lite.worlds.shapes.spec import ID_STRIDE, FileSpec

logger = get_logger(__name__)

VERSION = 1
ANSWERS_PER_QUESTION = 10
# Below so many pictures starting other processes takes longer than it saves.
PARALLEL_FROM = 2000


@dataclass(frozen=True)
class WorldSpec(FileSpec):
    """What is written: pictures per split, their side in pixels, texts per picture, the seed."""

    kind: ClassVar[str] = "shapes"
    version: ClassVar[int] = VERSION
    bounds: ClassVar[dict[str, tuple[int, int]]] = {
        **FileSpec.bounds,
        "captions_per_image": (1, len(STYLES)),
        # The types that every scene has something to ask of.
        "questions_per_image": (0, len(TYPES) - 1),
    }

    train: int = 20_000
    val: int = 500
    test: int = 500
    captions_per_image: int = 2
    questions_per_image: int = 4


def write_world(spec: WorldSpec, *, processes: int | None = None) -> Path:
    """The folder with the world's files, written now unless it is there: complete or not at all.

    The same spec gives the same bytes on every machine with the same versions of Python, NumPy and Pillow.
    Two
    processes may call this at the same time: both write, one folder is kept.

    Layout: images/<split>/000000.jpg and annotations/{captions,instances,questions,answers}_<split>.json.
    """
    folder = spec.folder
    if folder.is_dir():
        return folder
    total = sum(spec.size(split) for split in SPLITS)
    logger.info("drawing %d pictures of the shapes world into %s", total, folder)
    with atomic_dir(folder) as temporary:
        for split in SPLITS:
            (temporary / "images" / split).mkdir(parents=True)
        with _drawing(spec, temporary, total, processes):
            _write_annotations(spec, temporary)
        _dump(temporary / "world.json", {"version": VERSION, **asdict(spec)})
    return folder


@contextmanager
def _drawing(spec: WorldSpec, root: Path, total: int, processes: int | None) -> Iterator[None]:
    """Draw all pictures while the block runs; DataError at its end when drawing failed."""
    wanted = min(4, os.cpu_count() or 1) if processes is None else processes
    count = wanted if total >= PARALLEL_FROM else 1
    if count == 1:
        yield
        draw(spec, root)
        return
    # Plain child commands, not `multiprocessing`: that would run a user's unguarded script again, or fork
    # threads.
    parts = [
        json.dumps({"spec": asdict(spec), "root": str(root), "part": k, "parts": count}) for k in range(count)
    ]
    command = [sys.executable, "-c", f"from {__name__} import draw_part; import sys; draw_part(sys.argv[1])"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    children = [subprocess.Popen([*command, part], env=environment) for part in parts]
    try:
        yield
        codes = [child.wait() for child in children]
        if any(codes):
            raise DataError(
                f"drawing the shapes world into {root} failed (exit codes {codes}), see the messages above"
            )
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()


def draw_part(job: str) -> None:
    """Draw one process's share; `job` is the JSON that `_drawing` makes."""
    content = json.loads(job)
    draw(WorldSpec(**content["spec"]), Path(content["root"]), part=content["part"], parts=content["parts"])


def draw(spec: WorldSpec, root: Path, *, part: int = 0, parts: int = 1) -> None:
    """Write every `parts`-th picture, beginning with number `part`, into root/images/<split>/."""
    for split in SPLITS:
        for index in range(part, spec.size(split), parts):
            data = BytesIO()
            image = render(sample_scene(seed=spec.seed, split=split, index=index), size=spec.image_size)
            # Full-resolution colour at quality 95: artefacts stay below the noise. PNG took 6 times as long
            # and twice the space, for the noise's sake.
            image.save(data, "JPEG", quality=95, subsampling=0)
            (root / "images" / split / _file_name(index)).write_bytes(data.getvalue())


def _write_annotations(spec: WorldSpec, root: Path) -> None:
    (root / "annotations").mkdir()
    for split in SPLITS:
        scenes = [sample_scene(seed=spec.seed, split=split, index=index) for index in range(spec.size(split))]
        if scenes:
            for kind, content in _annotations(spec, split, scenes):
                _dump(root / "annotations" / f"{kind}_{split}.json", content)


def _file_name(index: int) -> str:
    return f"{index:06d}.jpg"


def _annotations(spec: WorldSpec, split: Split, scenes: list[Scene]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind of file, content) for each annotation file of a split."""
    info = {"description": "lavis_lite shapes world", "version": str(VERSION), "split": split}
    first = SPLITS.index(split) * ID_STRIDE
    images = [
        {"id": first + i, "file_name": _file_name(i), "width": spec.image_size, "height": spec.image_size}
        for i in range(len(scenes))
    ]
    yield "captions", {"info": info, "images": images, "annotations": _caption_rows(spec, first, scenes)}
    described = [{**row, "description": describe(scene)} for row, scene in zip(images, scenes, strict=True)]
    categories = [{"id": number, "name": shape} for number, shape in enumerate(SHAPES, start=1)]
    instances = _instance_rows(spec, first, scenes)
    yield "instances", {"info": info, "images": described, "categories": categories, "annotations": instances}
    if spec.questions_per_image:
        asked, answered = _question_rows(spec, split, first, scenes)
        head = {"info": info, "data_type": "shapes", "data_subtype": split}
        yield "questions", {**head, "task_type": "Open-Ended", "questions": asked}
        yield "answers", {**head, "annotations": answered}


def _caption_rows(spec: WorldSpec, first: int, scenes: list[Scene]) -> list[dict[str, Any]]:
    count = spec.captions_per_image
    return [
        {"id": first + i * count + k, "image_id": first + i, "caption": caption}
        for i, scene in enumerate(scenes)
        for k, caption in enumerate(captions(scene, count=count))
    ]


def _instance_rows(spec: WorldSpec, first: int, scenes: list[Scene]) -> list[dict[str, Any]]:
    """COCO instances: `bbox` is (x, y, width, height) in pixels; attributes are the object's words."""
    rows: list[dict[str, Any]] = []
    for i, scene in enumerate(scenes):
        for item in scene.objects:
            bbox = [round(value * spec.image_size, 2) for value in item.box]
            rows.append(
                {
                    "id": first + len(rows) + 1,
                    "image_id": first + i,
                    "category_id": SHAPES.index(item.shape) + 1,
                    "bbox": bbox,
                    "area": round(bbox[2] * bbox[3], 2),
                    "iscrowd": 0,
                    "attributes": {"color": item.colour, "size": item.size, "cell": item.cell},
                }
            )
    return rows


def _question_rows(
    spec: WorldSpec, split: Split, first: int, scenes: list[Scene]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """VQAv2 questions and annotations. There is one right answer; val and test repeat it ten times, as
    VQAv2's accuracy wants at least three people to agree, and train gives it once."""
    asked, answered = [], []
    voices = 1 if split == "train" else ANSWERS_PER_QUESTION
    for i, scene in enumerate(scenes):
        for k, question in enumerate(questions(scene, count=spec.questions_per_image)):
            key = {"image_id": first + i, "question_id": first + i * len(TYPES) + k}
            asked.append({**key, "question": question.text})
            answered.append(
                {
                    **key,
                    "question_type": question.type,
                    "answer_type": question.answer_type,
                    "multiple_choice_answer": question.answer,
                    "answers": [
                        {"answer": question.answer, "answer_confidence": "yes", "answer_id": n + 1}
                        for n in range(voices)
                    ],
                }
            )
    return asked, answered


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")

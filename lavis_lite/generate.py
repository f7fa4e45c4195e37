"""`lavis-lite generate` and `lavis-lite answer`: what a model says of picture files, as lines of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from rich.progress import track

from lavis_lite.api import load_model_and_preprocess
from lavis_lite.common.device import choose_device
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.logging import console
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.images import SUFFIXES, read_image
from lavis_lite.tasks.answers import read_answer_list

# A model and images [B, 3, H, W] -> what to write of each image: one row or several.
Say = Callable[[Any, torch.Tensor], list[list[dict[str, str]]]]


@dataclass(frozen=True)
class Place:
    """Where a model comes from and where its words go.

    out: the file to write; standard output without one.
    """

    out: str | None = None
    checkpoint: str | None = None
    device: str = "auto"
    batch_size: int = 16


def generate_files(
    model: str, images: Sequence[str], place: Place, *, prompt: str | None = None, **settings: Any
) -> int:
    """Write {"image", "text"} of every picture, in order; of one that can't be read {"image", "error"}.

    Args:
        model: name/type, e.g. "blip2_t5/shapes".
        images: files, and folders whose pictures are taken in alphabetical order.
        settings: of the model's `generate`.

    Returns: how many pictures couldn't be read.
    Raises ConfigError for a model without `generate` or a malformed name, DataError when there is no picture.
    """
    prompted = {} if prompt is None else {"prompt": prompt}

    def say(built: Any, image: torch.Tensor) -> list[list[dict[str, str]]]:
        said = built.generate({"image": image, **prompted}, **settings)
        each = len(said) // len(image)
        return [[{"text": text} for text in said[i * each : (i + 1) * each]] for i in range(len(image))]

    return _write_lines(model, images, place, say, needs="generate")


def answer_files(
    model: str,
    images: Sequence[str],
    questions: Sequence[str],
    place: Place,
    *,
    answer_list: str | None = None,
    **settings: Any,
) -> int:
    """Write {"image", "question", "answer"} for every question about every picture; else as `generate_files`.

    Args:
        answer_list: a file with the answers to choose from, see `read_answer_list`; without one they are generated.
        settings: of the model's `predict_answers`.
    """
    if answer_list is not None:
        settings |= {
            "inference_method": "rank",
            "answer_list": read_answer_list(answer_list, where="--answer-list"),
        }

    def say(built: Any, image: torch.Tensor) -> list[list[dict[str, str]]]:
        rows: list[list[dict[str, str]]] = [[] for _ in image]
        for question in questions:
            answers = built.predict_answers({"image": image, "text_input": question}, **settings)
            for own, answer in zip(rows, answers, strict=True):
                own.append({"question": question, "answer": answer})
        return rows

    return _write_lines(model, images, place, say, needs="predict_answers")


def _write_lines(model: str, images: Sequence[str], place: Place, say: Say, *, needs: str) -> int:
    name, model_type = name_and_type(model)
    paths = list(_files(images))
    device = str(choose_device(place.device))
    built, processors, _ = load_model_and_preprocess(name, model_type, True, device, place.checkpoint)
    if not hasattr(built, needs):
        raise ConfigError(f"--model '{model}': this model generates no text")
    bad = 0
    with ExitStack() as stack:
        file: IO[str] = (
            stack.enter_context(open(place.out, "w", encoding="utf-8")) if place.out else sys.stdout
        )
        batches = range(0, len(paths), place.batch_size)
        shown = console().is_terminal and place.out is not None
        for start in track(batches, needs.replace("_", " "), console=console(), disable=not shown):
            for row in _rows(built, processors["eval"], paths[start : start + place.batch_size], say):
                bad += "error" in row
                print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
    return bad


def name_and_type(model: str) -> tuple[str, str]:
    """The two halves of what --model names; ConfigError for anything but name/type."""
    name, slash, model_type = model.partition("/")
    if not slash:
        raise ConfigError(
            f"--model '{model}': give a name and a type, e.g. blip2_t5/shapes (see lavis-lite names model)"
        )
    return name, model_type


def _files(images: Sequence[str]) -> Iterator[Path]:
    for name in images:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"no picture in the folder '{path}'")
            yield from found
        else:
            yield path


def _rows(
    model: Any, processor: Callable[..., torch.Tensor], paths: Sequence[Path], say: Say
) -> Iterator[dict[str, str]]:
    """One batch's rows, in order; the readable pictures go through the model together."""
    read: dict[Path, torch.Tensor] = {}
    errors: dict[Path, str] = {}
    for path in paths:
        try:
            read[path] = processor(read_image(path))
        except UnreadableSample as error:
            errors[path] = error.reason
    said: dict[Path, list[dict[str, str]]] = {}
    if read:
        said = dict(zip(read, say(model, torch.stack(list(read.values())).to(model.device)), strict=True))
    for path in paths:
        if path in errors:
            yield {"image": str(path), "error": errors[path]}
        for row in said.get(path, ()):
            yield {"image": str(path), **row}

"""`lavis-lite generate` and `lavis-lite answer`: what a model says of pictures or clips, as lines of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from rich.progress import track

from lavis_lite.api import load_model_and_preprocess
from lavis_lite.common.device import choose_device
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.io import check_writable
from lavis_lite.common.logging import console, get_logger
from lavis_lite.common.model_recipe import model_recipe
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.images import SUFFIXES, read_image
from lavis_lite.processors.text import BlipCaption, BlipQuestion
from lavis_lite.processors.video import NUM_FRAMES, UnreadableClip, VideoProcessor
from lavis_lite.processors.video import SUFFIXES as CLIP_SUFFIXES
from lavis_lite.tasks.answers import answers_of, read_answer_list

logger = get_logger(__name__)

# A speaker and {"image": [B, 3, H, W]} or {"video": [B, F, 3, H, W]} -> what to write of each file: one row or several.
Row: TypeAlias = dict[str, Any]
Say = Callable[["Speaker", dict[str, torch.Tensor]], list[list[Row]]]


# Of a clip, for a model that no run on clips has trained.
FRAMES = 4


@dataclass(frozen=True)
class Place:
    """Where a model comes from and where its words go.

    out: the file to write; standard output without one. num_frames: of clips, where the files are clips.
    """

    out: str | None = None
    checkpoint: str | None = None
    device: str = "auto"
    batch_size: int = 16
    num_frames: int | None = None


@dataclass(frozen=True)
class Speaker:
    """A model, and what prepares questions for it."""

    model: Any
    ask: Callable[[str], str]


def generate_files(
    model: str, images: Sequence[str], place: Place, *, prompt: str | None = None, **settings: Any
) -> int:
    """Write {"image", "text"} of every picture, in order; of one that can't be read {"image", "error"}. Of clips, where
    `place` says how many frames of them to look at, {"video", ...}.

    Args:
        model: name/type, e.g. "blip2_t5/shapes".
        images: files, and folders whose pictures or clips are taken in alphabetical order.
        settings: of the model's `generate`.

    Returns: how many pictures couldn't be read.
    Raises ConfigError for a model without `generate`, a prompt for one that takes none, a malformed name, a batch size
    below 1 and a file that can't be written, DataError when there is no picture.
    """
    prompted = {} if prompt is None else {"prompt": prompt}

    def check(built: Any) -> None:
        if not hasattr(built, "generate"):
            raise ConfigError(f"--model '{model}': this model generates no text")
        if prompt and not getattr(built, "takes_prompt", True):
            raise ConfigError(
                f"--prompt: model '{model}' takes none: leave it out, or use a stage-2 model, such as blip2_opt/shapes"
            )

    def say(speaker: Speaker, shown: dict[str, torch.Tensor]) -> list[list[Row]]:
        said, number = speaker.model.generate({**shown, **prompted}, **settings), _count(shown)
        each = len(said) // number
        return [[{"text": text} for text in said[i * each : (i + 1) * each]] for i in range(number)]

    return _write_lines(model, images, place, check, say, label="generate")


def answer_files(
    model: str,
    images: Sequence[str],
    questions: Sequence[str],
    place: Place,
    *,
    answer_list: str | None = None,
    num_ans_candidates: int = 128,
    confidence: bool = False,
    **settings: Any,
) -> int:
    """Write {"image", "question", "answer"} for every question about every picture; else as `generate_files`.

    Questions go through the model's text processor, as in training and evaluation; they are written as they were given.

    Args:
        answer_list: a file with the answers to choose from, see `read_answer_list`; without one they are generated.
        num_ans_candidates: of a list, so many with the likeliest first token are scored whole; of a longer one a line
            on stderr tells it.
        confidence: write p(answer) by the language model beside each answer.
        settings: of the model's `predict_answers`.

    Raises ConfigError too for num_ans_candidates below 1, DataError for a list that can't be read or is empty.
    """
    if num_ans_candidates < 1:
        raise ConfigError(f"--num-ans-candidates must be at least 1, got {num_ans_candidates}")
    if answer_list is not None:
        answers = read_answer_list(answer_list, where="--answer-list")
        settings |= {
            "inference_method": "rank",
            "answer_list": answers,
            "num_ans_candidates": num_ans_candidates,
        }
        if len(answers) > num_ans_candidates:
            logger.info(
                "of %d answers the %d whose first token is likeliest are scored whole, for every picture and question: "
                "see --num-ans-candidates",
                len(answers),
                num_ans_candidates,
            )

    def check(built: Any) -> None:
        if not hasattr(built, "predict_answers"):
            raise ConfigError(
                f"--model '{model}': this model answers no questions; use a stage-2 model, such as blip2_opt/shapes"
            )

    def say(speaker: Speaker, shown: dict[str, torch.Tensor]) -> list[list[Row]]:
        rows: list[list[Row]] = [[] for _ in range(_count(shown))]
        for question in questions:
            samples = {**shown, "text_input": speaker.ask(question)}
            for own, said in zip(rows, answers_of(speaker.model, samples, settings, confidence), strict=True):
                told = {"confidence": said.confidence} if confidence else {}
                own.append({"question": question, "answer": said.text, **told})
        return rows

    return _write_lines(model, images, place, check, say, label="predict answers")


def default_frames(model: str) -> int:
    """How many frames of a clip a model is shown where nobody says: as in its run's evaluation, else as many as it has
    frame embeddings, else 4."""
    recipe = model_recipe(model)
    if recipe.video:
        return int(recipe.video.get("num_frames", NUM_FRAMES))
    return int((recipe.model.get("video") or {}).get("frame_embeddings") or FRAMES)


def _write_lines(
    model: str,
    images: Sequence[str],
    place: Place,
    check: Callable[[Any], None],
    say: Say,
    *,
    label: str,
) -> int:
    """check: raises ConfigError for a model that can't say it. label: of the progress display."""
    if place.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {place.batch_size}")
    medium = Medium.of(place)
    paths = list(_files(images, medium))
    if (
        place.out
    ):  # before the model, which takes minutes; opened after it, so that an old file is not lost to a mistake
        check_writable(place.out, where="--out")
    device = str(choose_device(place.device, where="--device"))
    built, processors, texts = load_model_and_preprocess(model, None, True, device, place.checkpoint)
    speaker = Speaker(built, _question_processor(texts.get("eval")))
    check(built)
    read = medium.reader(processors["eval"])
    bad = 0
    with ExitStack() as stack:
        file: IO[str] = (
            stack.enter_context(open(place.out, "w", encoding="utf-8")) if place.out else sys.stdout
        )
        batches = range(0, len(paths), place.batch_size)
        shown = console().is_terminal and place.out is not None
        for start in track(batches, label, console=console(), disable=not shown):
            for row in _rows(speaker, medium.key, read, paths[start : start + place.batch_size], say):
                bad += "error" in row
                print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
    return bad


def _question_processor(own: Callable[[str], str] | None) -> Callable[[str], str]:
    """A model's own text processor; where it has none, or one of captions, that of all data sets of questions."""
    return BlipQuestion() if own is None or isinstance(own, BlipCaption) else own


@dataclass(frozen=True)
class Medium:
    """Pictures or clips: the batch's key, the word for one, its files' suffixes, frames of a clip."""

    key: str
    word: str
    suffixes: tuple[str, ...]
    num_frames: int = 0

    @classmethod
    def of(cls, place: Place) -> Medium:
        """Clips where so many frames of them are to be seen, else pictures."""
        if place.num_frames is None:
            return cls("image", "picture", SUFFIXES)
        if place.num_frames < 1:
            raise ConfigError(f"--num-frames must be at least 1, got {place.num_frames}")
        return cls("video", "clip", CLIP_SUFFIXES, place.num_frames)

    def reader(self, processor: Callable[..., torch.Tensor]) -> Callable[[Path], torch.Tensor]:
        """A file as the model sees it, given the processor of pictures; raises UnreadableSample or UnreadableClip."""
        if self.key == "image":
            return lambda path: processor(read_image(path))
        return VideoProcessor.around(processor, self.num_frames)


def _count(shown: dict[str, torch.Tensor]) -> int:
    (visual,) = shown.values()
    return len(visual)


def _files(images: Sequence[str], medium: Medium) -> Iterator[Path]:
    for name in images:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in medium.suffixes)
            if not found:
                raise DataError(f"no {medium.word} in the folder '{path}'")
            yield from found
        else:
            yield path


def _rows(
    speaker: Speaker, key: str, reader: Callable[[Path], torch.Tensor], paths: Sequence[Path], say: Say
) -> Iterator[Row]:
    """One batch's rows, in order; the readable files go through the model together."""
    read: dict[Path, torch.Tensor] = {}
    errors: dict[Path, str] = {}
    for path in paths:
        try:
            read[path] = reader(path)
        except (UnreadableSample, UnreadableClip) as error:
            errors[path] = error.reason
    said: dict[Path, list[Row]] = {}
    if read:
        shown = {key: torch.stack(list(read.values())).to(speaker.model.device)}
        said = dict(zip(read, say(speaker, shown), strict=True))
    for path in paths:
        if path in errors:
            yield {key: str(path), "error": errors[path]}
        for row in said.get(path, ()):
            yield {key: str(path), **row}

"""The captions that a model gives the images of a split, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lavis_lite.tasks.predictions import predict_rows, write_list
from lavis_lite.tasks.so_far import SoFar


class CaptioningModel(Protocol):
    """What a model must offer to be evaluated on captions."""

    def generate(
        self, samples: Mapping[str, Any], *, num_beams: int, max_length: int, min_length: int
    ) -> list[str]:
        """One text per image of {"image": float[B, 3, H, W], "prompt": str}, without the prompt; or per clip of
        {"video": float[B, F, 3, H, W], "prompt": str}.

        max_length, min_length: of new tokens. A model that declares `takes_prompt` false gets no prompt.
        """


@dataclass(frozen=True)
class Captioned:
    """One image's caption, and the references as they stand in its annotation file.

    row: its (first) row of the dataset. image_id: the number its file declares; without one the picture's
    path. group: see `Fields.group`.
    """

    row: int
    image_id: int | str
    prediction: str
    references: list[str]
    group: str | None


@dataclass(frozen=True)
class Decoding:
    """How captions are generated: the text before them, beams, and new tokens at most and at least."""

    prompt: str
    num_beams: int
    max_new_tokens: int
    min_length: int


def caption_images(
    model: CaptioningModel,
    dataset: Any,
    rows: Sequence[int],
    decoding: Decoding,
    loader_args: Any,
    so_far: SoFar,
) -> list[Captioned]:
    """Captions of the rows whose picture can be read, in their order; the same on every rank."""

    prompted = {"prompt": decoding.prompt} if getattr(model, "takes_prompt", True) else {}

    def say(visual: Mapping[str, Tensor], _: Mapping[str, Any]) -> list[str]:
        return model.generate(
            {**visual, **prompted},
            num_beams=decoding.num_beams,
            max_length=decoding.max_new_tokens,
            min_length=decoding.min_length,
        )

    def keep(texts: Sequence[tuple[int, str]]) -> None:
        so_far.add(_result(_captioned(dataset, row, text)) for row, text in texts)

    predictions = predict_rows(dataset, rows, loader_args, say, keep)
    return [_captioned(dataset, row, text) for row, text in predictions.items()]


def _captioned(dataset: Any, row: int, prediction: str) -> Captioned:
    record = dataset.record(row)
    image_id = record.image if record.image_id is None else record.image_id
    return Captioned(row, image_id, prediction, record.captions, record.group)


def join_images(rows: Sequence[Captioned]) -> list[Captioned]:
    """Rows with equal image_id as one image: the first row's caption, the references of all."""
    images: dict[int | str, Captioned] = {}
    for item in rows:
        known = images.get(item.image_id)
        images[item.image_id] = (
            replace(known, references=[*known.references, *item.references]) if known else item
        )
    return list(images.values())


def write_predictions(path: Path, rows: Sequence[Captioned]) -> None:
    """Write captions in COCO's results format: [{"image_id": 42, "caption": "a dog"}, ...]."""
    write_list(path, [_result(item) for item in rows])


def _result(item: Captioned) -> dict[str, int | str]:
    return {"image_id": item.image_id, "caption": item.prediction}

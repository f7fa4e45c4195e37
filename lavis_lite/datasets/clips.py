"""The map-style datasets of clips: as those of pictures, but a row shows frames of a clip."""

from __future__ import annotations

from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.image_text import ImageTextDataset
from lavis_lite.datasets.vqa import QuestionDataset
from lavis_lite.processors.video import UnreadableClip, read_frames

SHOWN = 4  # frames in the picture that stands for a clip


class ClipDataset(ImageTextDataset):
    """Clips with one or more captions each; `vis_processor` takes a clip's path and gives float32[F, 3, H, W].

    Rows and batches are those of `ImageTextDataset` with `video` float32[B, F, 3, H, W] in place of `image`. A clip
    that can't be decoded is an unreadable row; one with fewer than F frames shows some of them repeatedly.
    """

    visual: ClassVar[str] = "video"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As of `ImageTextDataset`: `image` shows frames of the clip side by side, `video` is its path."""
        return {**super().__getitem__(index), "video": self.image_path(index)}

    def _picture(self, path: str) -> Image.Image:
        try:
            return contact_sheet(read_frames(path, SHOWN))
        except UnreadableClip as error:
            raise UnreadableSample(path, error.reason) from error

    def _see(self, path: str) -> Tensor:
        try:
            frames: Tensor = self.vis_processor(path)  # type: ignore[arg-type]
            return frames
        except UnreadableClip as error:
            raise UnreadableSample(path, error.reason) from error


class ClipQuestionDataset(ClipDataset, QuestionDataset):
    """Clips with a question each; the methods of `QuestionDataset`, the frames of `ClipDataset`."""


def contact_sheet(frames: list[Image.Image]) -> Image.Image:
    """Four frames as one picture in reading order, two rows of two."""
    width, height = frames[0].size
    sheet = Image.new("RGB", (2 * width, 2 * height))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % 2 * width, number // 2 * height))
    return sheet

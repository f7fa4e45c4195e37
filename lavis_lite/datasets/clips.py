"""The datasets of clips: as those of pictures, but a row shows frames of a clip."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.clip_sources import CLIPS
from lavis_lite.datasets.folder import Kind
from lavis_lite.datasets.image_text import ImageTextDataset
from lavis_lite.datasets.shard_stream import ShardStream
from lavis_lite.datasets.tar_members import Address, read_member
from lavis_lite.datasets.vqa import QuestionDataset
from lavis_lite.processors.video import UnreadableClip, read_frames

SHOWN = 4  # frames in the picture that stands for a clip


class ClipDataset(ImageTextDataset):
    """Clips with one or more captions each; `vis_processor` takes a clip's path, or of one in a shard what is in
    its file (io.BytesIO), and gives float32[F, 3, H, W].

    Rows and batches are those of `ImageTextDataset` with `video` float32[B, F, 3, H, W] in place of `image`. A clip
    that can't be decoded is an unreadable row; one with fewer than F frames shows some of them repeatedly.
    """

    visual: ClassVar[str] = "video"
    kind: ClassVar[Kind] = CLIPS

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As of `ImageTextDataset`: `image` shows frames of the clip side by side, `video` is its path."""
        return {**super().__getitem__(index), "video": self.image_path(index)}

    def _picture(self, path: str) -> Image.Image:
        return contact_sheet(decode_clip(_opened(path), path, SHOWN))

    def _see(self, path: str) -> Tensor:
        return _seen(self.vis_processor, _opened(path), path)


class ClipQuestionDataset(ClipDataset, QuestionDataset):
    """Clips with a question each; the methods of `QuestionDataset`, the frames of `ClipDataset`."""


class ClipStream(ShardStream):
    """Clips with captions from shards that are read in a stream; rows and batches are those of `ClipDataset`."""

    visual: ClassVar[str] = "video"

    def _see(self, content: io.BytesIO, place: str) -> Tensor:
        return _seen(self.vis_processor, content, place)


def decode_clip(clip: str | io.BytesIO, name: str, count: int) -> list[Image.Image]:
    """Evenly spaced frames of a clip in RGB; UnreadableSample with its name where it gives none."""
    try:
        return read_frames(clip, count)
    except UnreadableClip as error:
        raise UnreadableSample(name, error.reason) from error


def _opened(path: str) -> str | io.BytesIO:
    """A clip's path; of one in a shard what is in its file."""
    address = Address.parse(path)
    return path if address is None else io.BytesIO(read_member(address))


def _seen(vis_processor: Callable[[Any], Tensor], clip: str | io.BytesIO, name: str) -> Tensor:
    try:
        return vis_processor(clip)
    except UnreadableClip as error:
        raise UnreadableSample(name, error.reason) from error


def contact_sheet(frames: list[Image.Image]) -> Image.Image:
    """Four frames as one picture in reading order, two rows of two."""
    width, height = frames[0].size
    sheet = Image.new("RGB", (2 * width, 2 * height))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % 2 * width, number // 2 * height))
    return sheet

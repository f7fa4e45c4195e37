"""Clips to normalised frames: which frames, decoded by decord, each through one image processor."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from lavis_lite.common.errors import ConfigError, MissingDependencyError, closest
from lavis_lite.common.registry import registry
from lavis_lite.processors import build_processor

Sampling = Literal["uniform", "random", "headtail"]
SAMPLINGS: tuple[Sampling, ...] = ("uniform", "random", "headtail")
PathLike = str | os.PathLike[str]
# Of files that a folder of clips is searched for.
SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp")
NUM_FRAMES = 8
# Bytes at the beginning of a clip's file.
HEAD = 4096


class UnreadableClip(Exception):
    """A file that gives no frames. reason: what is wrong with it, in a few words."""

    def __init__(self, path: PathLike, reason: str) -> None:
        super().__init__(f"{os.fspath(path)}: {reason}")
        self.reason = reason


@registry.register_processor("video")
class VideoProcessor:
    """A clip to float32[F, 3, H, W]; all frames get the same crop, mirroring and change of light.

    A clip is its path, or what is in its file (io.BytesIO).

    Args:
        num_frames: F.
        sampling: see `frame_numbers`.
        frames: the image processor of the frames, a `name` and its keywords; by default `blip_image_eval`. Its random
            choices must come from torch's global generator, as those of all shipped ones do: every frame begins
            from the same state of it.

    Raises ConfigError for an unknown sampling; from a call UnreadableClip, and MissingDependencyError without
    decord.
    """

    def __init__(
        self,
        num_frames: int = NUM_FRAMES,
        *,
        sampling: Sampling = "uniform",
        frames: Mapping[str, Any] | None = None,
    ) -> None:
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        _check(sampling)
        self.num_frames = num_frames
        self.sampling: Sampling = sampling
        self.frames = build_processor(
            {"name": "blip_image_eval"} if frames is None else frames, where="frames"
        )

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> Self:
        """The processor with the keywords of a mapping; None gives the defaults."""
        return cls(**dict(cfg or {}))

    @classmethod
    def around(cls, frames: Callable[[Image.Image], Tensor], num_frames: int) -> Self:
        """Evenly spaced frames through an image processor that is there already, such as a model's own."""
        processor = cls(num_frames)
        processor.frames = frames
        return processor

    def __call__(self, clip: PathLike | io.BytesIO) -> Tensor:
        return self.process(read_frames(clip, self.num_frames, self.sampling))

    def process(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Decoded frames -> float32[F, 3, H, W], whatever their number."""
        state = torch.get_rng_state()
        processed = []
        for picture in pictures:
            torch.set_rng_state(state)
            processed.append(self.frames(picture))
        return torch.stack(processed)


def read_frames(clip: PathLike | io.BytesIO, count: int, sampling: Sampling = "uniform") -> list[Image.Image]:
    """`count` frames of a clip in RGB, in their order in time; only these are decoded.

    clip: a path, or what is in a clip's file.

    Raises UnreadableClip: no file, no video stream, broken content, no frame.
    """
    decord = _decord()
    name = "a clip in memory" if isinstance(clip, io.BytesIO) else os.fspath(clip)
    try:
        reader = decord.VideoReader(_checked(clip), num_threads=1)
        total = len(reader)
        if total == 0:
            raise UnreadableClip(name, "it has no frames")
        numbers = frame_numbers(total, count, sampling)
        decoded = sorted(set(numbers))
        pixels = reader.get_batch(decoded).asnumpy()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnreadableClip(name, "no such file") from error
    except OSError as error:
        raise UnreadableClip(name, str(error.strerror)) from error
    except (RuntimeError, decord.DECORDError) as error:
        raise UnreadableClip(name, "not a clip that can be decoded") from error
    frames = {number: Image.fromarray(frame) for number, frame in zip(decoded, pixels, strict=True)}
    return [frames[number] for number in numbers]


def _checked(clip: PathLike | io.BytesIO) -> str | io.BytesIO:
    """What decord opens; raises UnreadableClip for what is empty or text, OSError for a file that can't be read."""
    if not isinstance(clip, io.BytesIO):
        if os.stat(clip).st_size == 0:
            raise UnreadableClip(clip, "the file is empty")
        return os.fspath(clip)
    content = clip.getvalue()
    # decord prints what it can't open up to the first zero, which containers have soon and a page of text never.
    if b"\0" not in content[:HEAD]:
        reason = "not a clip that can be decoded" if content else "the file is empty"
        raise UnreadableClip("a clip in memory", reason)
    return io.BytesIO(content)  # read from its beginning, wherever the caller is


def frame_numbers(total: int, count: int, sampling: Sampling = "uniform") -> list[int]:
    """Which of `total` frames are shown, in ascending order; a clip with fewer than `count` shows some repeatedly.

    sampling:
        uniform: the middle of each of `count` equal parts; nothing random.
        random: any frame of each of `count` equal parts.
        headtail: half of them (the larger half) anywhere in the clip's first half, the rest anywhere in its second.

    Random choices come from torch's global generator. Raises ConfigError for another sampling.
    """
    _check(sampling)
    if sampling == "headtail":
        middle = (total + 1) // 2
        head = (count + 1) // 2
        tail = _anywhere(middle, total, count - head) if total > 1 else [0] * (count - head)
        return _anywhere(0, middle, head) + tail
    place = torch.full((count,), 0.5) if sampling == "uniform" else torch.rand(count)
    return [
        min(total - 1, int((part + within) * total / count)) for part, within in enumerate(place.tolist())
    ]


def _check(sampling: str) -> None:
    if sampling not in SAMPLINGS:
        hint = closest(sampling, SAMPLINGS)
        raise ConfigError(
            f"sampling: '{sampling}' is none of {', '.join(SAMPLINGS)}" + (f"; {hint}" if hint else "")
        )


def _anywhere(first: int, end: int, count: int) -> list[int]:
    """`count` of the frames from `first` to before `end`, without repetition while there are enough."""
    frames = end - first
    rounds = [torch.randperm(frames)[: count - start] for start in range(0, count, frames)]
    return sorted((torch.cat(rounds) + first).tolist()) if rounds else []


def _decord() -> Any:
    """decord, imported when the first clip is read and never before torch: the other order crashes."""
    try:
        import decord
    except ImportError as error:
        raise MissingDependencyError(
            "clips are read with decord: pip install 'lavis-lite[video]' (it has wheels for Linux and Windows on "
            "x86-64 alone; for macOS and ARM build it from source, or take the frames out of the clips and train on "
            "pictures)"
        ) from error
    # ffmpeg's own complaints about broken clips: the error that is raised says which clip it is.
    decord.logging.set_level(decord.logging.QUIET)
    return decord

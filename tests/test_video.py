"""Which frames of a clip are shown, what is done to them, and what becomes of clips that can't be read."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_helpers import frame_values, save_clip
from mp4_clips import save_mp4
from packaging.requirements import Requirement
from PIL import Image
from torch import Tensor

from lavis_lite.common.errors import ConfigError, MissingDependencyError
from lavis_lite.common.registry import registry
from lavis_lite.processors import build_processor
from lavis_lite.processors.image import Blip2ImageTrain, BlipImageEval
from lavis_lite.processors.video import SAMPLINGS, UnreadableClip, VideoProcessor, frame_numbers, read_frames

EVAL = {"name": "blip_image_eval", "image_size": 16}


# --- which frames -------------------------------------------------------------------------------------------


def test_uniform_frames_are_the_middles_of_equal_parts() -> None:
    assert frame_numbers(15, 1) == [7]
    assert frame_numbers(15, 4) == [1, 5, 9, 13]
    assert frame_numbers(300, 3) == [50, 150, 250]
    assert frame_numbers(8, 8) == list(range(8))


def test_random_frames_are_one_of_each_part() -> None:
    torch.manual_seed(0)
    drawn = [frame_numbers(12, 4, "random") for _ in range(600)]
    counts = Counter(number for numbers in drawn for number in numbers)
    assert all(number // 3 == part for numbers in drawn for part, number in enumerate(numbers))
    assert set(counts) == set(range(12)) and min(counts.values()) > 140  # 200 each, standard deviation 12


def test_headtail_frames_are_of_both_halves() -> None:
    torch.manual_seed(0)
    drawn = [frame_numbers(11, 5, "headtail") for _ in range(200)]
    for numbers in drawn:
        assert numbers == sorted(set(numbers)), "without repetition"
        assert sum(number < 6 for number in numbers) == 3, "the larger half is the head's"
    assert {number for numbers in drawn for number in numbers} == set(range(11))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("total", [1, 2, 3, 5])
def test_a_short_clip_shows_frames_repeatedly_in_order(sampling: str, total: int) -> None:
    torch.manual_seed(0)
    for count in (1, 4, 9):
        numbers = frame_numbers(total, count, sampling)  # type: ignore[arg-type]
        assert len(numbers) == count and numbers == sorted(numbers)
        assert all(0 <= number < total for number in numbers)
        if count >= 2 * total:
            assert set(numbers) == set(range(total)), "all that there is"


# --- what is read -------------------------------------------------------------------------------------------


def test_the_frames_are_those_that_were_written(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "a.avi", frames=10)
    frames = read_frames(clip, 5)
    assert [frame.mode for frame in frames] == ["RGB"] * 5 and frames[0].size == (32, 24)
    assert frame_values(frames) == [1, 3, 5, 7, 9]
    assert frame_values(read_frames(clip, 20)) == [number // 2 for number in range(20)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"RIFF nothing of the kind", "not a clip that can be decoded"),
    ],
)
def test_what_is_no_clip_says_so(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "a.avi"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableClip, match=reason):
        read_frames(path, 4)


def test_a_clip_cut_off_in_its_header_is_unreadable_and_in_its_frames_shorter_or_unreadable(
    tmp_path: Path,
) -> None:
    whole = save_clip(tmp_path / "a.avi", frames=10).read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole[:250])
    with pytest.raises(UnreadableClip):
        read_frames(cut, 4)
    cut.write_bytes(whole[: len(whole) * 6 // 10])
    try:
        frames = read_frames(cut, 4)
    except UnreadableClip:
        return
    assert len(frames) == 4 and frame_values(frames)[-1] < 7


def test_without_decord_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = save_clip(tmp_path / "a.avi")
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lavis-lite\[video\]'.*macOS"):
        VideoProcessor(frames=EVAL)(clip)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("count", [1, 3, 10, 14])
def test_h264_in_mp4_is_read_to_the_frame(tmp_path: Path, sampling: Any, count: int) -> None:
    """Also frames that only those since the key frame before them tell: their right half is that one's."""
    clip = save_mp4(tmp_path / "a.mp4", frames=10, every=4)
    torch.manual_seed(3)
    numbers = frame_numbers(10, count, sampling)
    torch.manual_seed(3)
    frames = read_frames(clip, count, sampling)
    width, height = frames[0].size
    assert frame_values([frame.crop((0, 0, width // 2, height)) for frame in frames]) == numbers
    right = frame_values([frame.crop((width // 2, 0, width, height)) for frame in frames])
    assert right == [number // 4 * 4 for number in numbers]
    clip.write_bytes(clip.read_bytes()[:-500])
    with pytest.raises(UnreadableClip, match="not a clip that can be decoded"):
        read_frames(clip, count, sampling)


@pytest.mark.parametrize(
    ("system", "machine", "wanted"),
    [
        ("linux", "x86_64", True),
        ("win32", "AMD64", True),
        ("linux", "aarch64", False),
        ("darwin", "x86_64", False),
        ("darwin", "arm64", False),
    ],
)
def test_the_extra_asks_for_decord_only_where_it_has_wheels(system: str, machine: str, wanted: bool) -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (written,) = re.findall(r'^video = \["(.*)"\]$', project, re.MULTILINE)
    marker = Requirement(written).marker
    assert marker and marker.evaluate({"sys_platform": system, "platform_machine": machine}) == wanted


def test_decord_is_imported_by_the_first_clip_alone() -> None:
    import subprocess

    code = (
        "import sys, lavis_lite.processors.video as v; v.VideoProcessor(); assert 'decord' not in sys.modules;"
        "v._decord(); names = list(sys.modules); assert names.index('torch') < names.index('decord')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- what is done to them -----------------------------------------------------------------------------------


def test_each_frame_is_processed_as_a_picture_is(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "a.avi", frames=6)
    video = VideoProcessor(3, frames=EVAL)(clip)
    assert video.shape == (3, 3, 16, 16) and video.dtype == torch.float32
    image = BlipImageEval(16)
    expected = torch.stack([image(frame) for frame in read_frames(clip, 3)])
    assert torch.equal(video, expected)


@pytest.mark.parametrize("name", ["blip2_image_train", "blip_image_train", "shapes_image_train"])
def test_all_frames_get_the_same_random_change(name: str) -> None:
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    still = [Image.fromarray(noise)] * 4
    processor = VideoProcessor(4, frames={"name": name, "image_size": 32})
    seen: list[Tensor] = []
    for seed in range(6):
        torch.manual_seed(seed)
        frames = processor.process(still)
        assert all(torch.equal(frames[0], frame) for frame in frames[1:])
        seen.append(frames[0])
    different = [not torch.equal(seen[0], other) for other in seen[1:]]
    assert all(different), "and every clip one of its own"


def test_a_crop_is_of_the_same_place_in_every_frame() -> None:
    shades = [Image.new("RGB", (40, 40), (value, 0, 255 - value)) for value in (10, 120, 250)]
    for shade in shades:
        shade.paste((255, 255, 255), (4, 26, 16, 38))  # a mark at one place, the only green
    processor = VideoProcessor(3, frames={"name": "blip2_image_train", "image_size": 40, "min_scale": 0.6})
    torch.manual_seed(1)
    frames = processor.process(shades)
    torch.manual_seed(1)
    assert torch.equal(frames[2], Blip2ImageTrain(40, min_scale=0.6)(shades[2]))
    marks = [frame[1] > 0 for frame in frames]
    assert marks[0].any() and torch.equal(marks[0], marks[1]) and torch.equal(marks[0], marks[2])


def test_the_generator_moves_on_as_by_one_picture() -> None:
    still = [Image.new("RGB", (20, 20))] * 5
    processor = VideoProcessor(5, frames={"name": "blip2_image_train", "image_size": 8})
    torch.manual_seed(0)
    processor.process(still)
    after = torch.rand(3)
    torch.manual_seed(0)
    Blip2ImageTrain(8)(still[0])
    assert torch.equal(after, torch.rand(3))


def test_an_unknown_sampling_is_refused_without_a_configuration_too() -> None:
    message = "sampling: 'headtails' is none of uniform, random, headtail; did you mean 'headtail'"
    with pytest.raises(ConfigError, match=message):
        VideoProcessor(sampling="headtails", frames=EVAL)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        frame_numbers(10, 2, "headtails")  # type: ignore[arg-type]


def test_configuration_mistakes_name_the_key() -> None:
    assert registry.get_processor_class("video") is VideoProcessor
    for section, message in (
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"sampling": "headtails"}, "at.sampling: 'headtails'"),
        ({"frames": {"name": "blip_image_evl"}}, "blip_image_eval"),
        ({"frames": {"name": "blip_image_eval", "image_sz": 3}}, "unknown key 'frames.image_sz'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_processor({"name": "video", **section}, where="at")

"""The embedded world's clips: what moves, what is asked, and that one frame can't tell."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from lavis_lite.common.config import load_dataset_preset, merge
from lavis_lite.common.errors import ConfigError
from lavis_lite.datasets.builders import build_datasets
from lavis_lite.processors.video import frame_numbers, read_frames
from lavis_lite.worlds.shapes.clip_texts import CLIP_TYPES, clip_captions, clip_questions
from lavis_lite.worlds.shapes.clip_writer import ClipSpec, draw_clip
from lavis_lite.worlds.shapes.clips import APPEARS, FRAMES, Clip, sample_clip
from lavis_lite.worlds.shapes.lm_tokenizers import tokens
from lavis_lite.worlds.shapes.render import render
from lavis_lite.worlds.shapes.scene import CELLS, GAP
from lavis_lite.worlds.shapes.vocabulary import vocabulary

CLIPS = [sample_clip(seed=0, split="train", index=index) for index in range(300)]


def cell_of(x: float, y: float) -> str:
    return CELLS[3 * int(3 * y) + int(3 * x)]


def test_objects_rest_in_their_cells_in_the_first_and_last_quarter_and_move_between() -> None:
    for clip in CLIPS:
        quarters = [range(int(q * FRAMES / 4 + 0.99), int((q + 1) * FRAMES / 4 + 0.99)) for q in range(4)]
        assert sum(map(len, quarters)) == FRAMES
        for mover in clip.movers:
            places = [mover.at(number / (FRAMES - 1)) for number in range(FRAMES)]
            for quarter, end in ((quarters[0], mover.first), (quarters[3], mover.last)):
                assert {cell_of(places[n].x, places[n].y) for n in quarter} == {CELLS[end.cell]}
                assert all((places[n].x, places[n].y) == pytest.approx((end.x, end.y)) for n in quarter)
            assert mover.first.row == mover.last.row or mover.first.column == mover.last.column
            assert mover.first.cell != mover.last.cell
            middle = mover.at(0.5)
            assert middle.x == pytest.approx((mover.first.x + mover.last.x) / 2)
            assert middle.y == pytest.approx((mover.first.y + mover.last.y) / 2)


def test_objects_never_touch_nor_leave_and_the_second_comes_later() -> None:
    for clip in CLIPS:
        for number in range(FRAMES):
            early, late = clip.frame(number).objects
            seen = [early] if number < APPEARS else [early, late]
            assert (late.x < 0) == (number < APPEARS)
            for item in seen:
                assert item.radius <= item.x <= 1 - item.radius and item.radius <= item.y <= 1 - item.radius
            if len(seen) == 2:
                apart = ((early.x - late.x) ** 2 + (early.y - late.y) ** 2) ** 0.5
                assert apart >= early.radius + late.radius + GAP - 1e-9
        assert (
            clip.early.first.colour != clip.late.first.colour
            and clip.early.first.shape != clip.late.first.shape
        )


def test_clips_are_a_function_of_their_number_and_splits_share_none() -> None:
    assert sample_clip(seed=0, split="val", index=3) == sample_clip(seed=0, split="val", index=3)
    keys = {
        split: {
            sample_clip(seed=seed, split=split, index=index).key for index in range(100) for seed in (0, 1)
        }
        for split in ("train", "val", "test")
    }
    assert (
        not keys["train"] & keys["val"]
        and not keys["train"] & keys["test"]
        and not keys["val"] & keys["test"]
    )
    assert len(keys["train"]) > 195


# --- texts --------------------------------------------------------------------------------------------------


def answer(clip: Clip, question: str) -> str:
    """An independent reader: from the pictures' positions and not from what the asker knew."""
    start, end = clip.frame(1).objects, clip.frame(FRAMES - 2).objects
    if match := re.fullmatch(r"where is the (\w+) (\w+) in picture (one|four)\?", question):
        items = start if match[3] == "one" else end
        (found,) = [item for item in items if (item.colour, item.shape) == (match[1], match[2])]
        return cell_of(found.x, found.y)
    if match := re.fullmatch(r"what (shape|color) is the object in picture one\?", question):
        (found,) = [item for item in start if item.x >= 0]
        return found.shape if match[1] == "shape" else found.colour
    if match := re.fullmatch(r"what color is the (\w+)\?", question):
        (found,) = [item for item in end if item.shape == match[1]]
        return found.colour
    match = re.fullmatch(
        r"is the (\w+) (\w+) in picture four (left or right of|above or below) the one in picture one\?",
        question,
    )
    assert match, question
    before, after = (
        next(item for item in items if (item.colour, item.shape) == (match[1], match[2]))
        for items in (start, end)
    )
    if match[3].startswith("left"):
        return "left" if after.x < before.x else "right"
    return "above" if after.y < before.y else "below"


def test_every_question_is_answered_by_the_clip() -> None:
    kinds = Counter()
    for clip in CLIPS:
        asked = clip_questions(clip, count=len(CLIP_TYPES))
        assert {question.type for question in asked} == set(CLIP_TYPES)
        for question in asked:
            assert answer(clip, question.text) == question.answer, question
            kinds[question.type] += 1
    assert set(kinds.values()) == {len(CLIPS)}


def test_every_word_is_known_to_the_tokenizers_and_the_language_models() -> None:
    known = set(vocabulary()) & set(tokens("opt")) & set(tokens("t5"))
    texts = [text for clip in CLIPS for text in clip_captions(clip)]
    for clip in CLIPS:
        for question in clip_questions(clip, count=5):
            texts += [question.text, question.answer]
    assert {word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)} <= known


def test_captions_tell_both_ways() -> None:
    clip = CLIPS[0]
    early, late = clip.early, clip.late
    for caption in clip_captions(clip):
        for words in (
            f"{early.first.colour} {early.first.shape}",
            f"{late.first.colour} {late.first.shape}",
            CELLS[early.first.cell],
            CELLS[early.last.cell],
            CELLS[late.last.cell],
            "in picture one",
            "in picture four",
        ):
            assert words in caption
    assert len(clip_captions(clip)) == 2


def test_the_middle_frame_tells_neither_direction_nor_order() -> None:
    """What a reader of that frame could know at best: guesses from the objects' exact places."""
    assert frame_numbers(FRAMES, 1) == [FRAMES // 2] and FRAMES // 2 >= APPEARS
    ways: dict[tuple[bool, float], list[float]] = defaultdict(list)
    first = []
    for index in range(2000):
        clip = sample_clip(seed=1, split="train", index=index)
        early, late = clip.frame(FRAMES // 2).objects
        along = clip.early.direction in ("left", "right")
        place = early.x if along else early.y
        ways[along, round(place * 6)].append(clip.early.direction in ("right", "below"))
        first.append(early.x + early.y > late.x + late.y)
    best = sum(max(mean(way), 1 - mean(way)) * len(way) for way in ways.values()) / 2000
    assert best < 0.56, "of places in sixths of the side; 0.5 and what maxima over small samples add"
    assert abs(mean(first) - 0.5) < 0.05


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path))
    return tmp_path


SMALL = {"train": 6, "val": 3, "test": 2}


def test_files_hold_what_the_clips_are(cache: Path) -> None:
    section = merge(load_dataset_preset("shapes_video_vqa"), SMALL)
    splits = build_datasets({"shapes_video_vqa": section})["shapes_video_vqa"]
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 24, "val": 12, "test": 8}
    rows = splits["val"]
    clip = sample_clip(seed=0, split="val", index=1)
    asked = [rows.record(row).question for row in range(4, 8)]
    assert [(item.text, item.question_type) for item in asked] == [
        (question.text, question.type) for question in clip_questions(clip)
    ]
    assert len(asked[0].answers) == 10 and len(splits["train"].record(0).question.answers) == 1
    assert rows.load(4, seed=0)["video"].shape == (4, 3, 64, 64)
    captions = merge(load_dataset_preset("shapes_video_caption"), SMALL)
    told = build_datasets({"shapes_video_caption": captions})["shapes_video_caption"]["val"]
    assert [told.record(1).captions, len(told)] == [clip_captions(clip), 3]
    assert len(list((cache / "shapes_video").iterdir())) == 1, "both share their files"


def test_a_drawn_clip_is_read_as_it_was_rendered(tmp_path: Path) -> None:
    clip = CLIPS[5]
    path = tmp_path / "clip.avi"
    path.write_bytes(draw_clip(clip))
    assert draw_clip(clip) == path.read_bytes()
    frames = read_frames(path, FRAMES)
    for number, frame in enumerate(frames):
        drawn = np.asarray(render(clip.frame(number)), dtype=int)
        # JPEG at quality 90 loses 2 of 255 on average of the renderer's noise of 5.
        assert np.abs(np.asarray(frame, dtype=int) - drawn).mean() < 3
    assert np.abs(np.asarray(frames[0], dtype=int) - np.asarray(frames[-1], dtype=int)).mean() > 5


def test_impossible_sizes_are_told() -> None:
    with pytest.raises(ConfigError, match="shapes_video: questions_per_clip must be from 1 to 5, got 9"):
        ClipSpec(questions_per_clip=9)

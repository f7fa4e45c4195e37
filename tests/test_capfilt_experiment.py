"""The experiment on CapFilt: what it calls true is, and its figures count what they say."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from lavis_lite.worlds.shapes.captions import captions
from lavis_lite.worlds.shapes.scene import sample_scene

EXPERIMENTS = Path(__file__).resolve().parents[1] / "run_scripts" / "experiments"


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("capfilt")


def test_truth_is_told_of_all_styles_with_and_without_their_colon(experiment: Any) -> None:
    scenes = [sample_scene(seed=0, split="train", index=index) for index in range(40)]
    told = [captions(scene, count=4) for scene in scenes]
    for row, own in enumerate(told):
        for text in own:
            assert experiment.is_true(text, scenes[row])
            assert experiment.is_true(text.replace(":", ""), scenes[row])
    crossed = [experiment.is_true(text, scenes[row - 1]) for row, own in enumerate(told) for text in own]
    assert sum(crossed) < 0.05 * len(crossed)
    assert not experiment.is_true("a dog on a sofa", scenes[0]) and not experiment.is_true("", scenes[0])


def test_figures_count_what_they_say(experiment: Any, tmp_path: Path) -> None:
    scenes = [sample_scene(seed=0, split="train", index=index) for index in range(4)]
    true = [captions(scene) for scene in scenes]
    # Rows 0 and 1 have true captions from the web, 2 and 3 each other's.
    web = [true[0][0], true[1][0], true[3][0], true[2][0]]
    rows = [{"image": f"{row}.jpg", "caption": text, "image_id": row} for row, text in enumerate(web)]
    noisy = experiment.Noisy(tmp_path, tmp_path, rows, [own[0] for own in true], scenes)
    wrong = "a dog"
    candidates = [
        {
            "captions": [web[0], true[0][1], wrong],
            "source": ["web", "synthetic", "synthetic"],
            "scores": [0.9, 0.5, 0.1],
        },
        {
            "captions": [true[1][1], wrong, web[1]],
            "source": ["synthetic", "synthetic", "web"],
            "scores": [0.8, 0.7, 0.3],
        },
        {
            "captions": [true[2][1], wrong, web[2]],
            "source": ["synthetic", "synthetic", "web"],
            "scores": [0.8, 0.7, 0.4],
        },
        {
            "captions": [true[3][1], web[3], wrong],
            "source": ["synthetic", "web", "synthetic"],
            "scores": [0.8, 0.2, 0.1],
        },
    ]
    figures = experiment.measure(noisy, candidates, 2)
    assert figures["web captions that are true"] == 0.5
    assert figures["sampled captions that are true"] == 0.5
    assert figures["kept captions that are true"] == 5 / 8
    assert figures["wrong web captions left out (recall)"] == 0.5
    assert figures["left out web captions that are wrong (precision)"] == 0.5
    assert figures["true web captions kept"] == 0.5 and figures["true web captions ranked first"] == 0.5
    # Of the four pairs of true (0.9, 0.3) and wrong (0.4, 0.2) web captions one is the wrong way round.
    assert figures["ranker: a true web caption scores above a wrong one"] == 0.75
    assert figures["best caption is true"] == 1.0
    assert figures["kept captions: objects that are there"] < 1.0
    experiment.write_arms(noisy, candidates, 2)
    filtered = (tmp_path / "filtered.jsonl").read_text().splitlines()
    assert len(filtered) == 4 and wrong not in filtered[0] and wrong in filtered[1]


def test_noise_is_another_pictures_caption(
    experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    small = experiment.WorldSpec(train=60, val=0, test=0)
    monkeypatch.setattr(experiment, "WorldSpec", lambda: small)
    noisy = experiment.write_noisy(tmp_path / "a", 0, 60, 0.5)
    changed = [row["caption"] != own for row, own in zip(noisy.rows, noisy.true_captions, strict=True)]
    assert 15 < sum(changed) < 45
    assert {row["caption"] for row in noisy.rows} <= set(noisy.true_captions)
    assert all((noisy.images / row["image"]).is_file() for row in noisy.rows)
    again = experiment.write_noisy(tmp_path / "b", 0, 60, 0.5)
    assert again.rows == noisy.rows and experiment.write_noisy(tmp_path / "c", 1, 60, 0.5).rows != noisy.rows

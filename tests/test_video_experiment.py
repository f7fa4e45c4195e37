"""The experiment on clips: valid arms, the majority's accuracies, and a run of the configuration from end to end."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import warm_python
from majority import asked, majority
from runner_helpers import environment

from lavis_lite.common.config import load_config, load_dataset_preset, merge
from lavis_lite.datasets.builders import build_datasets
from lavis_lite.worlds.shapes.clip_texts import CLIP_TYPES

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = {"train": 60, "val": 4, "test": 40}


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(REPOSITORY / "run_scripts" / "experiments"))
    return importlib.import_module("video")


def test_arms_are_valid_and_differ_in_what_they_see(experiment: Any) -> None:
    frames, joins = {}, {}
    for name, arm in experiment.ARMS.items():
        config = load_config(REPOSITORY / arm.cfg_path, arm.with_seed(0))
        seen = config.datasets[experiment.DATASET]["vis_processor"]
        frames[name] = (seen["train"]["num_frames"], seen["eval"]["num_frames"])
        joins[name] = (config.model["video"]["join"], config.model["video"]["frame_embeddings"])
    assert frames == {"clip": (4, 4), "mean": (4, 4), "frame": (1, 1)}
    assert joins == {"clip": ("concat", 4), "mean": ("mean", 0), "frame": ("concat", 0)}


def test_the_majority_is_by_the_form_of_a_question(experiment: Any) -> None:
    section = merge(load_dataset_preset(experiment.DATASET), SMALL)
    splits = build_datasets({experiment.DATASET: section})[experiment.DATASET]
    scores = majority(splits)
    assert set(scores) == {"all", *CLIP_TYPES}
    # The words of a question tell which two answers there are, and no more.
    assert 0.35 < scores["direction"] < 0.65
    assert all(scores[kind] < 0.45 for kind in CLIP_TYPES if kind != "direction")
    forms = {(kind, form) for kind, form, _ in asked(splits["train"])}
    assert len(forms) == 7 and sum(kind == "direction" for kind, _ in forms) == 2


@pytest.mark.slow
def test_the_configuration_trains_and_evaluates_on_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    options = ["model.pretrained=null", "model.qformer_text_from=null", f"run.output_dir={tmp_path / 'run'}"]
    data = [
        f"datasets.shapes_video_vqa.{name}={size}" for name, size in (("train", 12), ("val", 4), ("test", 0))
    ]
    steps = ["run.max_steps=2", "run.batch_size_train=4", "run.warmup_steps=1", "task.num_beams=1"]
    command = ["train.py", "--cfg-path", "projects/blip2/video_ft.yaml", "--options"]
    done = warm_python.run([*command, *options, *data, *steps], env=environment(), cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert metrics["val/num_questions"] == 16 and "val/question_type/order" in metrics
    predictions = json.loads((tmp_path / "run" / "predictions_val.json").read_text())
    assert all(row["image"].endswith(".avi") for row in predictions)
    assert "<img" in (tmp_path / "run" / "report.html").read_text()

"""Experiments with arms, on VQA and retrieval: valid configurations, and a table and picture of what was measured."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python

EXPERIMENTS = Path(__file__).resolve().parents[1] / "run_scripts" / "experiments"
# In a process of its own: the configuration registers a model.
BLIND = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from vqa_helpers import question_config, question_samples
from lavis_lite.common.config import load_config
from lavis_lite.common.registry import registry
config = load_config(sys.argv[1])
ending = "_t5" if sys.argv[4] == "t5" else ""
assert config.model["arch"] == f"blip2_{sys.argv[4]}_blind"
assert config.model["pretrained"] == "output/pretrain_stage2" + ending
assert config.model["prompt"] == ("Question: {} Short answer:" if ending else "Question: {} Answer:")
model = registry.get_model_class(config.model["arch"]).from_config(question_config(Path(sys.argv[3]), sys.argv[4]))
samples = question_samples()
visual = model.visual_prompt(samples["image"], samples["text_input"])
assert visual.shape == (4, 5, 24) and not visual.any()
"""


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("vqa")


@pytest.mark.parametrize("ending", ["", "_t5"])
def test_arms_are_run_and_reported(
    ending: str,
    experiment: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands: list[list[str]] = []

    def call(command: list[str]) -> None:
        commands.append(command)
        folder = Path(command[-1].removeprefix("run.output_dir=")) / "evaluation"
        folder.mkdir(parents=True, exist_ok=True)
        score = {"blind": 0.3, "zero_shot": 0.4, "0": 0.5, "1": 0.7}[folder.parent.name]
        (folder / "metrics.json").write_text(
            json.dumps({"metrics": dict.fromkeys([*experiment.METRICS, f"{experiment.TYPE}count"], score)})
        )

    monkeypatch.setattr(importlib.import_module("seeds"), "call", call)
    monkeypatch.setattr(sys, "argv", ["vqa.py", "--seeds", "0", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(experiment, "majority", lambda _: {"all": 0.2, "count": 0.25})
    monkeypatch.setattr(experiment, "build_dataset_from_preset", lambda _: None)
    experiment.main(experiment.experiment(ending), None)
    scripts = [Path(command[1]).name for command in commands]
    assert scripts == ["evaluate.py"] * 2 + ["train.py", "evaluate.py"] * 4
    assert all(Path(command[3]).is_file() and Path(command[3]).stem.endswith(ending) for command in commands)
    without = next(command for command in commands if "model.qformer_text_input=false" in command)
    assert "run.seed=0" in without and Path(without[1]).name == "train.py"
    assert f"model.pretrained={tmp_path / 'conditioned' / '1'}" in commands[-1]
    printed = capsys.readouterr().out
    assert "blind " in printed and "0.600 ± 0.141" in printed
    assert printed.splitlines()[-1].split() == ["count", "0.300", "0.400", "0.500", "0.500", "0.250"]
    assert (tmp_path / f"vqa{ending}.svg").read_text().lstrip().startswith("<?xml")
    assert json.loads((tmp_path / f"vqa{ending}.json").read_text())["arms"]["conditioned"].keys() == {
        "0",
        "1",
    }


def test_an_arm_that_is_only_evaluated_may_differ_by_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    retrieval = importlib.import_module("retrieval")
    commands: list[list[str]] = []

    def call(command: list[str]) -> None:
        commands.append(command)
        folder = Path(command[-1].removeprefix("run.output_dir=")) / "evaluation"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps({"metrics": dict.fromkeys(retrieval.METRICS, 0.5)}))

    monkeypatch.setattr(importlib.import_module("seeds"), "call", call)
    assert retrieval.EXPERIMENT.run("stage1", [3, 4], tmp_path, []).keys() == {"3", "4"}
    assert [Path(command[1]).name for command in commands] == ["evaluate.py"] * 2
    assert "model.pretrained=output/stage1/4" in commands[1]
    retrieval.EXPERIMENT.run("without_itg", [3], tmp_path, [])
    train, test = commands[2:]
    assert {"model.itg_weight=0", "run.seed=3", "model.pretrained=output/stage1/3"} <= set(train)
    assert test[-2] == f"model.pretrained={tmp_path / 'without_itg' / '3'}"


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_the_blind_model_gets_an_empty_visual_prompt(tmp_path: Path, family: str) -> None:
    tests, config = str(Path(__file__).parent), "vqa_blind_t5.yaml" if family == "t5" else "vqa_blind.yaml"
    command = ["-c", BLIND, str(EXPERIMENTS / config), tests, str(tmp_path), family]
    done = warm_python.run(command, env=os.environ, cwd=EXPERIMENTS.parents[1])
    assert done.returncode == 0, done.stderr


def test_redundancy_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    redundancy = importlib.import_module("query_redundancy").redundancy
    pictures = torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, -1, 0, 0]])
    same = redundancy(torch.stack([pictures, pictures, 2 * pictures], 1) + 7)
    assert same["cosine"] == pytest.approx(1) and same["effective_rank"] == pytest.approx(2)
    different = redundancy(torch.stack([pictures, pictures[:, [2, 3, 0, 1]]], 1))
    assert different["cosine"] == pytest.approx(0) and different["effective_rank"] == pytest.approx(2)
    one_sees_more = redundancy(torch.stack([pictures, pictures.roll(1, 0)], 1))
    assert one_sees_more["effective_rank"] > 2 - 1e-6 and one_sees_more["cosine"] < 1


def test_an_experiment_ends_as_the_command_that_failed_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    seeds = importlib.import_module("seeds")
    seeds.call([sys.executable, "-c", ""])
    with pytest.raises(SystemExit) as ended:
        seeds.call([sys.executable, "-c", "raise SystemExit(3)"])
    assert ended.value.code == 3

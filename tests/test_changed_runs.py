"""A run goes on with other settings than it began with: what may change is said, what may not is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_helpers import warnings_logged
from runner_helpers import config

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.errors import CheckpointError, ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.runners.resume import fingerprint
from lavis_lite.runners.runner import Runner
from lavis_lite.tasks.base import Evaluation

SHORT = {"max_steps": 2, "save_every": 1}


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"features": {"max_bytes": "1GB"}}, {"features": {"max_bytes": "2GB", "folder": "f"}}, []),
        ({}, {"features": {"evaluation": True}}, ["run.features.evaluation is now True (was False)"]),
        ({"init_lr": 0.02}, {"init_lr": 0.03}, ["run.init_lr is now 0.03 (was 0.02)"]),
    ],
)
def test_a_setting_that_may_change_is_said(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], told: list[str]
) -> None:
    Runner(config(tmp_path, **SHORT, **before)).train()
    with warnings_logged(logging.INFO) as said:
        assert Runner(config(tmp_path, **{**SHORT, "max_steps": 3}, **after)).train().step == 3
    assert [line for line in said if " is now " in line] == ["run.max_steps is now 3 (was 2)", *told]


def test_options_of_a_strategy_come_and_go(tmp_path: Path) -> None:
    """Of a run in one process they are written by hand: a strategy with options needs several."""
    Runner(config(tmp_path, **SHORT)).train()
    saved = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(saved.read_text())
    content["run"].update(strategy="fsdp2", strategy_options={"cpu_offload": True})
    saved.write_text(yaml.safe_dump(content))
    with warnings_logged(logging.INFO) as said:
        Runner(config(tmp_path, max_steps=3)).train()
    assert "run.strategy_options.cpu_offload is now unset (was True)" in said


def test_a_finished_run_stays_finished_where_only_what_is_free_changes(tmp_path: Path) -> None:
    one = fingerprint(config(tmp_path, features={"folder": "a", "max_bytes": "1GB"}))
    assert one == fingerprint(config(tmp_path, features={"folder": "b"}))
    assert one != fingerprint(config(tmp_path, features={"views": 3}))


def test_a_best_by_another_metric_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, accuracies = iter([0.9, 0.8, 0.7, 0.6]), iter([0.1, 0.2, 0.3, 0.25])

    def evaluate(self: Any, model: Any, dataset: Any, *, loader_args: Any, final: bool = True) -> Any:
        return Evaluation({"loss": next(losses), "accuracy": next(accuracies)})

    monkeypatch.setattr(registry.get_task_class("fake_loss"), "evaluate", evaluate)
    run = {"save_every": 1, "eval_every": 1, "keep_last": 5}
    Runner(config(tmp_path, **run, max_steps=2, best_metric="val/accuracy")).train()
    by_loss = config(tmp_path, **run, max_steps=4, best_metric="val/loss", best_mode="min")
    with warnings_logged(logging.INFO) as said:
        Runner(by_loss).train()
    assert any(line.startswith("step 2 was the best by val/accuracy") for line in said), said
    state = ckpt.load_state(tmp_path / "run/checkpoints/step_000004")
    assert state["best"] == {"metric": "val/loss", "mode": "min", "value": 0.6, "step": 4}


def test_a_run_beyond_its_length_says_so(tmp_path: Path) -> None:
    Runner(config(tmp_path, **SHORT)).train()
    with warnings_logged() as said:
        Runner(config(tmp_path, max_steps=1)).train()
    assert "the run is 1 steps beyond its length of 1" in said


def test_a_checkpoint_of_another_run_is_taken_with_a_warning(tmp_path: Path) -> None:
    Runner(config(tmp_path / "one", **SHORT)).train()
    other = config(tmp_path / "two", max_steps=3, batch_size_train=2, resume=str(tmp_path / "one/run"))
    with warnings_logged() as said:
        assert Runner(other).train().step == 3
    assert any("differs in run.batch_size_train; its optimiser" in line for line in said), said
    with warnings_logged() as said:
        Runner(config(tmp_path / "three", max_steps=3, resume=str(tmp_path / "one/run"))).train()
    assert not any("differs" in line for line in said)


EDITS: dict[str, Any] = {
    "nothing": {"run": None},
    "a list": {"run": [1]},
    "no features": {"run": {"cache_features": True}},
    "features null": {"run": {"cache_features": True, "features": None}},
    "an older version's": {"run": {"cache_features": True, "features": {"views": 2}}},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_configuration_that_was_edited_is_compared_as_far_as_it_goes(tmp_path: Path, edit: Any) -> None:
    Runner(config(tmp_path, **SHORT)).train()
    saved = tmp_path / "run" / "config.yaml"
    content = {**yaml.safe_load(saved.read_text()), **edit}
    saved.write_text(yaml.safe_dump(content))
    changed = Runner(config(tmp_path, max_steps=3))
    if isinstance(edit["run"], dict):
        with pytest.raises(ConfigError, match=r"differs in .*run\.cache_features"):
            changed.train()
    else:  # all settings that were to be kept have their defaults, for all that is known
        with pytest.raises(ConfigError, match=r"differs in run\.batch_size_train"):
            changed.train()


def test_a_state_that_was_edited_is_one_line(tmp_path: Path) -> None:
    Runner(config(tmp_path, **SHORT)).train()
    state = tmp_path / "run/checkpoints/step_000002/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "means": None}))
    with pytest.raises(CheckpointError, match=r"step_000002/state.json' is not as training writes it"):
        Runner(config(tmp_path, max_steps=3)).train()

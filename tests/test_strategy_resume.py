"""Checkpoints of sharded runs: the same files as of any other run, which continue under any strategy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from runner_helpers import assert_same_bits, logged, start, weights
from strategy_resume_scenario import CHANGES, HALF, STEPS
from torch import Tensor

from lavis_lite.common.checkpoint import load_state, step_dir

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    process = start([sys.executable, "-m", "tests.strategy_resume_scenario", str(folder)])
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return folder


def at(folder: Path, step: int) -> dict[str, Tensor]:
    return weights(step_dir(folder / "run" / "checkpoints", step))


@pytest.mark.parametrize(("first", "second"), CHANGES)
def test_a_run_goes_on_under_another_strategy(
    runs: Path, first: tuple[str, int], second: tuple[str, int]
) -> None:
    whole = runs / "".join(map(str, first))
    changed = runs / f"{whole.name}-{second[0]}{second[1]}"
    one, other = at(whole, STEPS), at(changed, STEPS)
    assert load_state(step_dir(changed / "run" / "checkpoints", STEPS))["world_size"] == second[1]
    assert [row["step"] for row in logged(changed / "run") if row["kind"] == "eval"] == list(
        range(1, STEPS + 1)
    )
    if first == second:
        assert_same_bits(one, other)
        return
    assert {name: x.shape for name, x in one.items()} == {name: x.shape for name, x in other.items()}
    if first[1] == second[1]:  # else its global batch is another
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_checkpoints_are_the_same_under_every_strategy(runs: Path) -> None:
    ddp = at(runs / "ddp2", HALF)
    for name in ("fsdp22", "fairscale2"):
        sharded = at(runs / name, HALF)
        assert sharded.keys() == ddp.keys()
        for key, tensor in ddp.items():
            torch.testing.assert_close(sharded[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


def test_nothing_frozen_is_in_a_sharded_checkpoint(runs: Path) -> None:
    assert not [name for name in at(runs / "fsdp22", STEPS) if name.startswith("frozen")]

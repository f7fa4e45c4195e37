"""Checkpoints of sharded runs: the same tensors as of any other run, which continue under any strategy."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runner_helpers import assert_same_bits, logged, start, weights
from strategy_resume_scenario import (
    BEHIND,
    CHANGES,
    DDP,
    FAIRSCALE,
    FSDP2,
    HALF,
    PARTS,
    STEPS,
    WHOLE,
    Way,
)
from torch import Tensor

from lavis_lite.common.checkpoint import MODEL, load_state, load_tensors, step_dir
from lavis_lite.models.convert.command import convert

pytestmark = pytest.mark.slow

IN_PARTS = (BEHIND[0], PARTS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    process = start([sys.executable, "-m", "tests.strategy_resume_scenario", str(folder)])
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return folder


def at(folder: Path, step: int) -> dict[str, Tensor]:
    return weights(step_dir(folder / "run" / "checkpoints", step))


@pytest.mark.parametrize(("first", "second"), CHANGES, ids=lambda way: way.name)
def test_a_run_goes_on_under_another_strategy(runs: Path, first: Way, second: Way) -> None:
    whole, changed = runs / first.name, runs / f"{first.name}-{second.name}"
    one, other = at(whole, STEPS), at(changed, STEPS)
    assert load_state(step_dir(changed / "run" / "checkpoints", STEPS))["world_size"] == second.world
    assert [row["step"] for row in logged(changed / "run") if row["kind"] == "eval"] == list(
        range(1, STEPS + 1)
    )
    if (first.strategy, first.world) == (second.strategy, second.world):
        assert_same_bits(one, other)
        return
    assert {name: x.shape for name, x in one.items()} == {name: x.shape for name, x in other.items()}
    if first.world == second.world:  # else its global batch is another
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_checkpoints_are_the_same_under_every_strategy(runs: Path) -> None:
    ddp = at(runs / DDP.name, HALF)
    for way in (FSDP2, FAIRSCALE):
        sharded = at(runs / way.name, HALF)
        assert sharded.keys() == ddp.keys()
        for key, tensor in ddp.items():
            torch.testing.assert_close(sharded[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("way", [*WHOLE, *BEHIND, PARTS], ids=lambda way: way.name)
def test_how_a_checkpoint_is_written_changes_nothing_in_it(runs: Path, way: Way) -> None:
    plain = runs / replace(way, save_format="auto", save_async=False).name
    for step in (HALF, STEPS):
        assert_same_bits(at(plain, step), at(runs / way.name, step))
    files = {path.name for path in step_dir(runs / way.name / "run" / "checkpoints", STEPS).iterdir()}
    parts = {".metadata", "__0_0.distcp", "__1_0.distcp", "tied.json"}
    assert files == {"state.json"} | (
        parts if way in IN_PARTS else {"model.safetensors", "optimizer.safetensors"}
    )


def test_parts_become_the_file_that_one_process_would_have_written(runs: Path, tmp_path: Path) -> None:
    in_parts, whole = (step_dir(runs / way.name / "run" / "checkpoints", STEPS) for way in (FSDP2, WHOLE[0]))
    target = tmp_path / "one.safetensors"
    (kept,) = (runs / WHOLE[0].name / "run").glob("frozen-*.safetensors")  # which no other file has
    wanted = {**load_tensors(whole / MODEL), **load_tensors(kept)}
    assert convert(in_parts, target, to="lavis_lite").tensors == len(wanted)
    assert_same_bits(load_tensors(target), wanted)


def test_nothing_frozen_is_in_a_sharded_checkpoint(runs: Path) -> None:
    assert not [name for name in at(runs / FSDP2.name, STEPS) if name.startswith("frozen")]

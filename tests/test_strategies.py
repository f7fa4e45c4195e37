"""Every strategy on 2 and 4 processes against one process with the joined batch, for tiny models of each stage."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runner_helpers import assert_same_bits, project, run_ranks, start, train_command, weights
from strategy_scenario import BAD_STEP, CASES, RUNS, SCALED, SCALED_CASE, STEPS
from torch import nn

from lavis_lite.common import dist
from lavis_lite.common.checkpoint import newest
from lavis_lite.common.errors import ConfigError
from lavis_lite.models.blocks import transformer_blocks
from lavis_lite.parallel import auto, fairscale
from lavis_lite.parallel.base import (
    build_strategy,
    check_quantized,
    check_strategy,
    clip_shards,
    is_quantized,
)

SEVERAL = [run for run in RUNS if run != "single"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    folder = tmp_path_factory.mktemp("strategies")
    process = start([sys.executable, "-m", "tests.strategy_scenario", str(folder)])
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    read = {}
    for run in RUNS:
        for case in CASES:
            read[run, case] = torch.load(folder / f"{run}.{case}.pt", weights_only=True)
    for run in SCALED:
        read[run, SCALED_CASE] = torch.load(folder / f"{run}.{SCALED_CASE}.pt", weights_only=True)
    return read


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("run", SEVERAL)
def test_as_one_process_with_the_joined_batch(found: dict[Any, Any], run: str, case: str) -> None:
    """Five steps with clipping; accumulation, recomputed activations, an uneven last batch."""
    one, several = found["single", case], found[run, case]
    assert several["losses"] == pytest.approx(one["losses"], rel=2e-5)
    assert several["norms"] == pytest.approx(one["norms"], rel=1e-4)
    assert several["weights"].keys() == one["weights"].keys()
    for key, weight in one["weights"].items():
        torch.testing.assert_close(several["weights"][key], weight, rtol=1e-4, atol=2e-6, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in SCALED if run != "single_scaled"])
def test_ranks_scale_the_loss_as_one_process_does(found: dict[Any, Any], run: str) -> None:
    """fp16's scaler: the scale grows after two good steps, and a loss that is NaN on one rank costs all a step."""
    one, several = found["single_scaled", SCALED_CASE], found[run, SCALED_CASE]
    assert one["scales"] == [2.0**16, 2.0**16, 2.0**17, 2.0**16, 2.0**16]
    assert several["scales"] == one["scales"]
    assert [step for step in range(STEPS) if math.isnan(one["norms"][step])] == [BAD_STEP]
    assert several["losses"] == pytest.approx(one["losses"], rel=2e-5, nan_ok=True)
    assert several["norms"] == pytest.approx(one["norms"], rel=1e-4, nan_ok=True)
    for key, weight in one["weights"].items():
        torch.testing.assert_close(several["weights"][key], weight, rtol=1e-4, atol=2e-6, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("run", SEVERAL)
def test_a_checkpoint_has_the_same_tensors_under_every_strategy(found: dict[Any, Any], run: str) -> None:
    for case in CASES:
        one, several = found["single", case]["moments"], found[run, case]["moments"]
        assert {key: x.shape for key, x in one.items()} == {key: x.shape for key, x in several.items()}
        for key, moment in one.items():
            torch.testing.assert_close(several[key], moment, rtol=1e-2, atol=1e-5, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("run", SEVERAL)
def test_ranks_evaluate_alone_between_two_steps(found: dict[Any, Any], run: str) -> None:
    for case in CASES:
        one, several = found["single", case]["alone"], found[run, case]["alone"]
        assert several == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("run", SEVERAL)
def test_retrieval_is_evaluated_between_two_steps_as_by_one_process(found: dict[Any, Any], run: str) -> None:
    one, several = (found[name, "stage1"]["retrieval"] for name in ("single", run))
    # Weights differ in their last bits, which may turn one near tie of seven.
    assert several == {name: pytest.approx(value, abs=0.3) for name, value in one.items()}


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in SEVERAL if RUNS[run][0] == "fsdp2"])
def test_frozen_blocks_are_in_parts_again_after_their_forward(found: dict[Any, Any], run: str) -> None:
    """In their own precision, while the step's backward is still to come."""
    world = RUNS[run][1]
    for case, dtypes in (("stage2", {"torch.bfloat16", "torch.float32"}), ("vqa", {"torch.float32"})):
        frozen = found[run, case]["frozen"]
        assert {dtype for dtype, *_ in frozen} == dtypes
        for _, rows, numbers, own in frozen:
            assert own == -(-rows // world) * (numbers // rows)  # the first rank's part


class Piecewise(nn.Module):
    """A block whose methods are called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(2, 2)


def test_blocks_are_lists_of_one_class_that_is_called() -> None:
    tower = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    model = nn.ModuleDict({"tower": tower, "other": nn.ModuleList([Piecewise(), Piecewise()])})
    assert transformer_blocks(model) == list(tower[2])


def test_fairscale_wraps_frozen_blocks_that_it_takes_and_tells_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its FullyShardedDataParallel is only built here: it runs on CUDA alone, and refuses bf16."""
    fully_sharded = pytest.importorskip("fairscale.nn.data_parallel").FullyShardedDataParallel

    def tower(dtype: torch.dtype, trained: bool = False) -> nn.Module:
        return nn.ModuleList([nn.Linear(4, 4, dtype=dtype).requires_grad_(trained) for _ in range(2)])

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    model = nn.ModuleDict({name: tower(dtype) for name, dtype in dtypes.items()})
    model["trained"] = tower(torch.float32, trained=True)
    said: list[str] = []
    monkeypatch.setattr(fairscale.logger, "warning", lambda text, *args: said.append(text % args))
    torch.distributed.init_process_group("fake", rank=0, world_size=2)
    try:
        sharded = fairscale._shard_frozen_blocks(model, torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()
    assert sharded == [*model["fp32"], *model["fp16"]]
    for block in sharded:
        assert isinstance(block, fully_sharded)
        # Blocks are roots, which stay whole after a forward pass unless told otherwise.
        assert block.reshard_after_forward and not block.disable_reshard_on_root
    assert {type(block) for name in ("bf16", "trained") for block in model[name]} == {nn.Linear}
    assert len(said) == 1 and "leaves 2 of 6 frozen blocks whole" in said[0] and "fsdp2" in said[0]


@pytest.mark.parametrize(("memory", "chosen"), [(None, "ddp"), (10**9, "ddp"), (1000, "fsdp2")])
def test_auto_shards_what_does_not_fit(
    memory: int | None, chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "gather_objects", lambda x: [x, x])
    monkeypatch.setattr(auto, "process_memory", lambda device: memory)
    messages: list[str] = []
    monkeypatch.setattr(auto.logger, "info", lambda text, *args: messages.append(text % args))
    assert auto.choose_strategy("auto", nn.Linear(10, 10), torch.device("cpu")) == chosen
    assert len(messages) == 1 and messages[0].startswith(f"strategy {chosen}: weights, gradients and moments")
    assert auto.choose_strategy("fairscale", nn.Linear(10, 10), torch.device("cpu")) == "fairscale"


def test_what_is_quantized_is_not_sharded() -> None:
    quantized = is_quantized({"language_model": {"quantize": "int8"}})
    assert quantized and not is_quantized({"language_model": {}}) and not is_quantized({})
    assert auto.choose(10**9, 10, 2, quantized=quantized) == "ddp"
    for name in ("fsdp2", "fairscale"):
        with pytest.raises(ConfigError, match=f"'{name}' can't shard a quantized language model"):
            check_quantized(name, quantized=True)
    check_quantized("ddp", quantized=True)


def test_auto_alone_is_single() -> None:
    assert auto.choose_strategy("auto", nn.Linear(10, 10), torch.device("cpu")) == "single"


def test_what_training_holds() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False).requires_grad_(False), nn.Linear(10, 10, bias=False))
    assert auto.state_bytes(model) == 4 * (100 + 100 * 4)


def test_memory_is_shared_by_the_machine_s_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 2000 kB\n")
    monkeypatch.setattr(dist, "local_world_size", lambda: 4)
    cpu, nothing = torch.device("cpu"), tmp_path / "nothing"
    assert auto.process_memory(cpu, tmp_path / "meminfo", cgroup=nothing) == 500 * 1024
    assert auto.process_memory(cpu, nothing, cgroup=nothing) is None


@pytest.mark.parametrize(
    ("limit", "usage", "stat", "files"),
    [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ],
)
def test_a_container_s_limit_counts(limit: str, usage: str, stat: str, files: str, tmp_path: Path) -> None:
    """Less what is used of it, but for files that would make room; one that is far away, or none, changes nothing."""
    (tmp_path / "memory").mkdir()
    (tmp_path / "meminfo").write_text("MemAvailable: 2000 kB\n")
    (tmp_path / usage).write_text("500000\n")

    def memory() -> int | None:
        meminfo, cpu = tmp_path / "meminfo", torch.device("cpu")
        return auto.process_memory(cpu, meminfo, cgroup=tmp_path, processes=2)

    (tmp_path / limit).write_text("900000\n")
    assert memory() == 200_000
    (tmp_path / stat).write_text(f"anon 300000\n{files} 200000\n")
    assert memory() == 300_000
    for large in ("max\n", "9223372036854771712\n"):
        (tmp_path / limit).write_text(large)
        assert memory() == 1000 * 1024


@pytest.mark.parametrize(
    ("lines", "root", "limit", "usage"),
    [
        ("0::/slurm/job_7/step_0\n", "", "memory.max", "memory.current"),
        (
            "5:cpu,cpuacct:/\n4:memory:/slurm/job_7/step_0\n0::/other\n",
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        ),
    ],
)
def test_the_least_that_a_job_s_limits_leave_counts(
    lines: str, root: str, limit: str, usage: str, tmp_path: Path
) -> None:
    """Of a process that sees the whole machine's control groups; its own group's limit need not be the smallest."""
    (tmp_path / "meminfo").write_text("MemAvailable: 2000 kB\n")
    (tmp_path / "membership").write_text(lines)
    step = tmp_path / root / "slurm" / "job_7" / "step_0"
    step.mkdir(parents=True)

    def limited(group: Path, to: str, used: int) -> None:
        (group / limit).write_text(f"{to}\n")
        (group / usage).write_text(f"{used}\n")

    def memory() -> int | None:
        files = {"cgroup": tmp_path, "membership": tmp_path / "membership"}
        return auto.process_memory(torch.device("cpu"), tmp_path / "meminfo", **files)

    limited(step, "max", 100_000)
    assert memory() == 2000 * 1024
    limited(step.parent, "900000", 500_000)
    assert memory() == 400_000
    limited(step, "300000", 100_000)
    assert memory() == 200_000
    limited(tmp_path / root, "1000000", 900_000)
    assert memory() == 100_000
    for other in ("0::/elsewhere\n", "0::/../elsewhere\n", "nonsense"):  # only the root tells
        (tmp_path / "membership").write_text(other)
        assert memory() == 100_000


@pytest.mark.parametrize("max_norm", [None, 1.0, 100.0])
def test_the_norm_of_parts_is_that_of_the_whole(
    max_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks with the same part: the sum over ranks doubles the squares of parts, not of what both have."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x: x.mul_(2))
    part, both = torch.full((4,), 3.0), torch.full((2,), 2.0)
    norm = clip_shards([part], [both], max_norm, torch.device("cpu"))
    assert float(norm) == pytest.approx((2 * 36 + 8) ** 0.5)
    factor = min(1.0, max_norm / float(norm)) if max_norm else 1.0
    assert part.tolist() == pytest.approx([3.0 * factor] * 4) and both.tolist() == pytest.approx(
        [2.0 * factor] * 2
    )


def test_options_are_the_keywords_of_the_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    assert build_strategy("fairscale", {"checkpoint_blocks": True}).checkpoint_blocks  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"run\.strategy_options\.cpu_ofload.*cpu_offload"):
        build_strategy("fsdp2", {"cpu_ofload": True})


def test_auto_has_no_options() -> None:
    """Whether they would be known to what it chooses would depend on the memory that is free."""
    with pytest.raises(
        ConfigError, match=r"cpu_offload with strategy auto.*fairscale \(check.*fsdp2 \(cpu_o"
    ):
        check_strategy("auto", options={"cpu_offload": True})
    check_strategy("auto", options={})


MINE = """
from lavis_lite.common import dist
from lavis_lite.common.registry import registry
from lavis_lite.parallel.ddp import DDPStrategy


@registry.register_strategy("mine")
class Mine(DDPStrategy):
    def __init__(self, *, notes: str) -> None:
        self.notes = notes

    def wrap(self, model, device):
        with open(f"{self.notes}/{dist.rank()}", "w") as file:
            file.write("wrapped")
        return super().wrap(model, device)
"""


@pytest.mark.slow
def test_a_strategy_of_one_s_own_trains(tmp_path: Path) -> None:
    """Registered by a file that `imports` names, with options: the weights are those of ddp."""
    (tmp_path / "mine.py").write_text(MINE)
    notes = tmp_path / "notes"
    notes.mkdir()
    own = project(tmp_path / "mine", strategy="mine", strategy_options={"notes": str(notes)}, max_steps=2)
    content = yaml.safe_load(own.read_text())
    content["imports"].append(str(tmp_path / "mine.py"))
    own.write_text(yaml.safe_dump(content))
    run_ranks(train_command(own))
    run_ranks(train_command(project(tmp_path / "ddp", strategy="ddp", max_steps=2)))
    assert sorted(path.name for path in notes.iterdir()) == ["0", "1"]
    one, other = (weights(newest(tmp_path / name / "run")) for name in ("mine", "ddp"))
    assert_same_bits(one, other)

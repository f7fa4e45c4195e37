"""What `run.strategy: auto` means: the simplest strategy whose model fits, and why."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lavis_lite.common import dist
from lavis_lite.common.logging import get_logger
from lavis_lite.parallel.base import AUTO

# The rest of a process's memory is for activations, buckets and what the allocator can't use.
SHARE_FOR_STATE = 0.6
# Cards sold as 24 GB leave 22.2 GiB (with ECC) to 23.6 to programs, those of 40 and 80 more of theirs. A run counts on
# the same share of what it finds as a plan does of what a card is sold as, lest the two choose differently.
USABLE = 0.92
GB = 1e9
# Of control groups, version 2 and 1: the controller's name and folder, the limit, what is used of it, its parts, and
# among those files not lately read.
CGROUP_FILES = (
    ("", "memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
)

logger = get_logger(__name__)


def choose_strategy(name: str, model: nn.Module, device: torch.device, *, quantized: bool = False) -> str:
    """The strategy that a name means; `auto` is chosen by the model's size, the memory and the number of processes.

    One process: single. Several: ddp where weights, gradients and moments of the whole model take at most 60% of
    a process's memory, or its language model is quantized, which can't be sharded; else fsdp2. With several the reason
    is logged in one line.
    """
    if name != AUTO:
        return name
    if dist.world_size() == 1:
        return "single"
    needed, there = state_bytes(model), process_memory(device)
    chosen = choose(needed, there, dist.world_size(), quantized=quantized)
    # Machines may differ; strategies may not.
    chosen = "fsdp2" if "fsdp2" in dist.gather_objects(chosen) else "ddp"
    logger.info("strategy %s: %s", chosen, _reason(chosen, needed, there, quantized))
    return chosen


def choose(needed: int, there: int | None, world_size: int, *, quantized: bool = False) -> str:
    """What `auto` is for a model whose state needs so many bytes, in processes that have `there` of them each."""
    if world_size == 1:
        return "single"
    return "ddp" if quantized or there is None or needed <= SHARE_FOR_STATE * there else "fsdp2"


def state_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers, and of gradient and two moments for each trained parameter."""
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return held + 3 * trained


def usable_memory(gpu: int) -> int:
    """The part of a GPU's memory that `auto` counts on, in a run and in its plan."""
    return round(gpu * USABLE)


def process_memory(
    device: torch.device,
    meminfo: Path = Path("/proc/meminfo"),
    *,
    cgroup: Path = Path("/sys/fs/cgroup"),
    membership: Path = Path("/proc/self/cgroup"),
    processes: int | None = None,
) -> int | None:
    """Bytes this process may use: its GPU's, or its share of what the machine has available and what the limits of
    its control groups (a container's, a SLURM job's) leave; None if nothing tells.

    processes: that share the machine, by default those of the run.
    """
    if device.type == "cuda":
        return usable_memory(int(torch.cuda.get_device_properties(device).total_memory))
    sizes = _machine_memory(meminfo), _limited_memory(cgroup, membership)
    known = [size for size in sizes if size is not None]
    return min(known) // (processes or dist.local_world_size()) if known else None


def _machine_memory(meminfo: Path) -> int | None:
    try:
        return _numbers(meminfo)["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        return None


def _limited_memory(cgroup: Path, membership: Path) -> int | None:
    """The least that a limit of this process's control groups leaves; None where there is no limit."""
    known: list[int] = []
    for controller, *files in CGROUP_FILES:
        for group in _groups(membership, controller):
            left = _left(cgroup / controller / group, *files)
            known += [left] if left is not None else []
    return min(known, default=None)


def _groups(membership: Path, controller: str) -> list[Path]:
    """This process's control group and those around it, relative to the controller's root, which is the last.

    The root alone is a container's own group, if it sees no others.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        lines = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        own = Path(path.lstrip("/"))
        if controller in controllers.split(",") and ".." not in own.parts:
            return list(dict.fromkeys((own, *own.parents, Path())))
    return [Path()]


def _left(group: Path, limit: str, usage: str, stat: str, files: str) -> int | None:
    """What a group's limit leaves, with what files fill that would make room; None where it has no limit."""
    try:
        dropped = _numbers(group / stat).get(files, 0) if (group / stat).exists() else 0
        return max(0, int((group / limit).read_text()) - int((group / usage).read_text()) + dropped)
    except (OSError, ValueError):  # another version, or "max"
        return None


def _numbers(table: Path) -> dict[str, int]:
    """A file of lines with a name and a number."""
    rows = (line.replace(":", " ").split() for line in table.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


def _reason(chosen: str, needed: int, there: int | None, quantized: bool) -> str:
    if quantized:
        return "a quantized language model can't be sharded"
    size = f"weights, gradients and moments take {needed / GB:.2f} GB"
    if there is None:
        return f"{size}, and nothing tells how much memory there is"
    limit = SHARE_FOR_STATE * there / GB
    if chosen == "ddp":
        return f"{size}, at most {SHARE_FOR_STATE:.0%} of a process's {there / GB:.1f} GB ({limit:.1f} GB)"
    return (
        f"{size}, more than {SHARE_FOR_STATE:.0%} of some process's memory (here {there / GB:.1f} GB): "
        f"each of {dist.world_size()} keeps its part"
    )

"""What `auto` means: the device, the arithmetic and the number of threads a process gets."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from lavis_lite.common import dist
from lavis_lite.common.errors import ConfigError

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# CPU features with which bfloat16 products are faster than float32; without them they are emulated, slower.
BF16_CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
# More threads than this have not paid for models of this size, and a GPU process only launches kernels.
MAX_THREADS_CPU, MAX_THREADS_GPU = 32, 4


def choose_device(name: str = "auto", *, where: str = "run.device") -> torch.device:
    """The device a name means; `auto` takes CUDA (this process's own GPU), else Apple's MPS, else the CPU.

    where: what messages call the setting that the name was given by.
    Raises ConfigError when the named device isn't there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"{where}: '{name}' is not a device; use auto, cpu, cuda, cuda:<number> or mps"
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"{where}: '{name}', but torch finds no GPU; auto takes what there is")
        index = dist.local_rank() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ConfigError(f"{where}: GPU {index} of {torch.cuda.device_count()}; run one process per GPU")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{where}: 'mps', but torch finds no Apple GPU; auto takes what there is")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16; `auto` is bf16 where the hardware has it, else fp16 on a GPU and fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and BF16_CPU_FLAGS & cpu_flags():
        return "bf16"
    return "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The autocast context of a precision; does nothing for fp32."""
    dtype = PRECISIONS.get(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


_arranged_for: str | None = None


@contextlib.contextmanager
def arranged_for(device_type: str) -> Iterator[None]:
    """Within the block whatever is arranged by kind of device is arranged for this one, wherever tensors are: a plan
    for a GPU is made on a CPU."""
    global _arranged_for
    before, _arranged_for = _arranged_for, device_type
    try:
        yield
    finally:
        _arranged_for = before


def device_type_of(x: Tensor) -> str:
    """The kind of device that work on a tensor is to be arranged for: its own, outside of `arranged_for`."""
    return _arranged_for or x.device.type


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The processor's feature flags as Linux lists them; empty on other systems."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), ":")
    return frozenset(flags.split(":", 1)[1].split())


def choose_threads(setting: int | str, device: torch.device, num_workers: int) -> int:
    """Threads for one operation; `auto` counts only cores that would otherwise idle.

    $OMP_NUM_THREADS wins over `auto` (torchrun sets it to 1). Otherwise: the cores this process may use and
    that nobody keeps busy at this moment, shared among the machine's processes, less one if loader workers
    run beside. Too few threads lose little, one too many loses much: OpenMP threads wait for each
    other actively, and with 2 threads on 2 cores of which another program took one, steps were 6 times
    slower.
    """
    if isinstance(setting, int):
        if setting < 1:
            raise ConfigError(f"run.num_threads must be at least 1 or auto, got {setting}")
        return setting
    declared = os.environ.get("OMP_NUM_THREADS", "")
    if declared.isdigit() and int(declared) > 0:
        return int(declared)
    share = min(available_cores(), idle_cores()) / dist.local_world_size()
    threads = math.floor(share + 0.25) - (1 if num_workers else 0)
    return max(1, min(threads, MAX_THREADS_CPU if device.type == "cpu" else MAX_THREADS_GPU))


def available_cores() -> float:
    """Cores this process may use: its affinity mask, or a container's quota where that is less."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def idle_cores(seconds: float = 0.3) -> float:
    """How many of this process's cores idle, measured over a moment; infinity where nothing tells."""
    before = _idle_times()
    if not before:
        return math.inf
    time.sleep(seconds)
    after = _idle_times()
    idle = sum(after[core] - before[core] for core in before if core in after) / os.sysconf("SC_CLK_TCK")
    return min(float(len(before)), idle / seconds)


def _idle_times(stat: Path = Path("/proc/stat")) -> dict[str, int]:
    """Clock ticks each of this process's cores has idled (waiting for a disk counts as idle)."""
    if not stat.exists() or not hasattr(os, "sched_getaffinity"):
        return {}
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    rows = (line.split() for line in stat.read_text().splitlines())
    return {row[0]: int(row[4]) + int(row[5]) for row in rows if row and row[0] in mine}

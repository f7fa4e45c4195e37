"""What a process holds besides tensors, and how much memory there is."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

# A CUDA context with cuBLAS's and cuDNN's kernels and workspaces: an allowance, not measured by this package.
CUDA_RUNTIME = 1_000_000_000
# Kernels' code and scratch that come with the first step, fitted to benchmarks/plan.py.
CPU_KERNELS = 70_000_000


def runtime_of(device_type: str) -> int:
    """Bytes a process holds before it builds anything: on a CPU what this one holds, its libraries being imported."""
    if device_type == "cuda":
        return CUDA_RUNTIME
    # What every run imports before it builds its model.
    import lavis_lite.models.blip2_generative
    import lavis_lite.models.blip2_qformer
    import lavis_lite.models.vision.timm_encoder
    import lavis_lite.runners.setup  # noqa: F401

    return resident_bytes() + CPU_KERNELS


def resident_bytes(*, peak: bool = False) -> int:
    """Bytes of this process in memory now, or at most up to now."""
    status = Path("/proc/self/status")
    if status.exists():
        field = "VmHWM:" if peak else "VmRSS:"
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    # Elsewhere only the peak is told; macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

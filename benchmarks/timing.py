"""What the benchmarks share: rounds that alternate, what they ran on, and where the result goes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def time_alternately(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Run two sides by turns, so that both see the same machine; "ours" is the second.

    Returns: median wall and CPU seconds of each side; ratio, the median over rounds of first / second, with its
    range, and that of the CPU times.
    """
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 else reversed(sides):
            start, cpu_start = time.perf_counter(), time.process_time()
            sides[name]()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    ratios = [first / second for first, second in zip(*wall.values(), strict=True)]
    cpu_ratios = [first / second for first, second in zip(*cpu.values(), strict=True)]
    return {
        "seconds": {name: statistics.median(values) for name, values in wall.items()},
        "cpu_seconds": {name: statistics.median(values) for name, values in cpu.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "ratio_cpu_time": statistics.median(cpu_ratios),
    }


def surroundings() -> dict[str, Any]:
    """What figures depend on."""
    return {
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def show(result: Mapping[str, Any], file: Path | None) -> None:
    """Print a result as JSON, and write it where a file is named."""
    print(json.dumps(result))
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n")

"""What the benchmarks share: rounds that alternate, processes, what they ran on, and where the result goes."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def count_flop() -> FlopCounterMode:
    """A counter of the FLOP of what runs within it: matrix products, convolutions, attention; forward and backward.

    torch's own table leaves out the attention kernel of CPUs, and would count only sides that write attention out.
    """
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(
        grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
    ) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


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


def run_processes(command: Sequence[str], world_size: int) -> list[Any]:
    """What each of several processes, which know of each other as under torchrun, printed last, as JSON."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    workers = []
    for rank in range(world_size):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        ranks |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **(ranks if world_size > 1 else {})}
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"failed with {world_size} processes: {' '.join(command)}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def surroundings() -> dict[str, Any]:
    """What figures depend on."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def show(result: Mapping[str, Any], file: Path | None) -> None:
    """Print a result as JSON, and write it where a file is named."""
    print(json.dumps(result))
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n")

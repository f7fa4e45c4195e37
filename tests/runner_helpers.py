"""Configurations and processes for the runner's tests."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from warm_python import WarmProcess

from lavis_lite.common.config import Config, load_config
from lavis_lite.common.logging import read_rows

ROOT = Path(__file__).resolve().parent.parent
FAKES = Path(__file__).with_name("runner_fakes.py")
TIMINGS = (
    "images_per_s",
    "data_wait",
    "data_wait_share",
    "data_waits",
    "elapsed_s",
    "slowest_data_rank",
    "slowest_data_wait",
)


def project(folder: Path, **run: Any) -> Path:
    """A project file for the fake model; its output goes to `folder`/run."""
    content = {
        "imports": [str(FAKES)],
        "model": {"arch": "fake_mlp"},
        "datasets": {"fake": {"builder": "fake_rows"}},
        "task": {"name": "fake_loss"},
        "run": {
            "output_dir": str(folder / "run"),
            "max_steps": 6,
            "batch_size_train": 4,
            "num_workers": 0,
            "num_threads": 1,
            "init_lr": 0.01,
            "warmup_steps": 2,
            "log_every": 2,
            "precision": "fp32",
            **run,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "project.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def config(folder: Path, *options: str, **run: Any) -> Config:
    """The fake model's configuration, with options laid over it."""
    return load_config(project(folder, **run), options)


def weights(checkpoint: Path | None) -> dict[str, Tensor]:
    """Everything a checkpoint holds in tensors."""
    from lavis_lite.common.checkpoint import load_tensors, open_optimizer, weights_file

    assert checkpoint is not None
    return {**load_tensors(weights_file(checkpoint)), **open_optimizer(checkpoint)}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a log without what a clock measured."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_rows(run_dir / "log.jsonl")]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}


def train_command(path: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "train.py"),
        "--cfg-path",
        str(path),
        "--options",
        "run.seed=42",
        *options,
    ]


def start(command: Sequence[str], **variables: str) -> WarmProcess:
    """A Python process with its output readable as text."""
    assert command[0] == sys.executable
    return WarmProcess(command[1:], env=environment(**variables), cwd=ROOT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(command: Sequence[str], world_size: int = 2, timeout: float = 120.0) -> list[str]:
    """Run a command once per rank with torchrun's variables; their outputs, in rank order."""
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    processes = [start(command, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(world_size)]
    outputs = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            assert process.returncode == 0, err[-3000:]
            outputs.append(out + err)
    finally:
        for process in processes:
            process.kill()
    return outputs


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until a condition holds; fails when it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)

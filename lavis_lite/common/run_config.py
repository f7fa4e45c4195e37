"""The `run` section: everything the training loop can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lavis_lite.common.errors import ConfigError
from lavis_lite.common.feature_config import FeatureConfig


@dataclass(frozen=True)
class RunConfig:
    """Settings of one run. Steps are optimiser steps; sizes of batches are per process.

    The defaults of the optimiser are the paper's (arXiv 2301.12597, section 3.4).
    """

    runner: str = "runner_base"
    seed: int = 42
    output_dir: str = "output/run"
    # "auto" continues the newest checkpoint in output_dir, "never" starts anew, a path starts from there.
    resume: str = "auto"

    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # auto, single, ddp, fsdp2 or fairscale; the keywords of its class, such as cpu_offload: true for fsdp2.
    strategy: str = "auto"
    strategy_options: dict[str, Any] = field(default_factory=dict)
    # torch.compile the model's blocks; without a working compiler the run goes on without, and says so.
    compile: bool = False
    # Minutes that a process waits for another before the run fails.
    timeout: float = 30.0
    num_threads: int | Literal["auto"] = "auto"

    # The length: one of the two.
    max_steps: int | None = None
    max_epochs: int | None = None
    batch_size_train: int = 64
    batch_size_eval: int = 64
    accum_grad_iters: int = 1
    num_workers: int = 4

    lr_sched: str = "linear_warmup_cosine_lr"
    init_lr: float = 1e-4
    min_lr: float = 0.0
    warmup_lr: float = 1e-6
    warmup_steps: int = 2000
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    lr_layer_decay: float = 1.0
    max_grad_norm: float | None = None
    # Steps in a row with a non-finite loss or gradient that are skipped before the run stops.
    max_skipped: int = 20

    log_every: int = 10
    # 0 evaluates (saves) only at the end.
    eval_every: int = 0
    save_every: int = 0
    save_minutes: float | None = None
    # whole: one file, written by the first process. sharded: each process writes its part, where there are several.
    # auto: sharded under strategies that keep parts anyway.
    save_format: Literal["auto", "whole", "sharded"] = "auto"
    # Write while training goes on, from a copy in the machine's memory. auto: where training is on a GPU.
    save_async: bool | Literal["auto"] = "auto"
    keep_last: int = 2
    best_metric: str | None = None
    best_mode: Literal["max", "min"] = "max"

    train_split: str = "train"
    valid_splits: tuple[str, ...] = ("val",)
    test_splits: tuple[str, ...] = ("test",)
    # What evaluate.py evaluates: a file or a run's folder. By default output_dir's best checkpoint, or where it has
    # none model.pretrained.
    checkpoint: str | None = None
    # Unreadable images are replaced and counted; above this fraction the run stops.
    max_bad_fraction: float = 0.01
    # Continue a run though a dataset has other rows or shards than before, instead of ending with an error.
    allow_changed_data: bool = False
    tensorboard: bool = False

    # Read the frozen image encoder's features from disk, where `features` says what is stored.
    cache_features: bool = False
    features: FeatureConfig = field(default_factory=FeatureConfig)

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_epochs is not None:
            raise ConfigError(
                "run.max_steps and run.max_epochs are both set: keep the one that says the run's length"
            )
        for name in ("batch_size_train", "batch_size_eval", "accum_grad_iters", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "num_workers",
            "warmup_steps",
            "eval_every",
            "save_every",
            "max_skipped",
            "weight_decay",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"run.{name} can't be negative, got {getattr(self, name)}")
        for name in ("max_steps", "max_epochs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"run.{name} must be at least 1, got {getattr(self, name)}")
        if self.timeout <= 0:
            raise ConfigError(f"run.timeout must be above 0 minutes, got {self.timeout}")
        if not 0.0 < self.lr_layer_decay <= 1.0:
            raise ConfigError(f"run.lr_layer_decay must be in (0, 1], got {self.lr_layer_decay}")

"""Builds what a configuration names, the cheap and fallible first: data files come before the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common import dist, optim
from lavis_lite.common.binding import bind
from lavis_lite.common.config import Config
from lavis_lite.common.device import available_cores, choose_device, choose_precision, choose_threads
from lavis_lite.common.errors import CheckpointError, ConfigError, closest
from lavis_lite.common.logging import get_logger
from lavis_lite.common.registry import registry
from lavis_lite.common.run_config import RunConfig
from lavis_lite.datasets.builders import build_datasets
from lavis_lite.datasets.loader import TrainLoader
from lavis_lite.image_features import ImageFeatures
from lavis_lite.models.base import BaseModel, build_model, without_sources
from lavis_lite.models.untrained import warn_of_untrained
from lavis_lite.models.vision.tower import VisionTower
from lavis_lite.parallel.auto import choose_strategy
from lavis_lite.parallel.base import Strategy, build_strategy, check_quantized, check_strategy, is_quantized
from lavis_lite.runners.changed_data import note_data
from lavis_lite.runners.compiling import compile_blocks
from lavis_lite.runners.feature_build import Encoder
from lavis_lite.runners.features import check_encoder, with_features
from lavis_lite.runners.fit import check_evaluation, check_training
from lavis_lite.runners.resume import StartPoint
from lavis_lite.tasks.base import EvalArgs

Splits = Mapping[str, Mapping[str, Any]]

logger = get_logger(__name__)


@dataclass
class Base:
    """What both training and evaluation need; datasets by name, then split."""

    device: torch.device
    precision: str
    datasets: Splits
    task: Any
    model: nn.Module
    eval_args: EvalArgs


@dataclass
class Parts(Base):
    """What training needs besides; `wrapped` is the model as its strategy trains it."""

    strategy: Strategy
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: optim.Schedule
    scaler: torch.amp.GradScaler
    loader: TrainLoader
    max_steps: int


def build_base(
    cfg: Config, *, model_cfg: Mapping[str, Any], threads: int | None = None, placed: bool = True
) -> Base:
    """Device, datasets, task and model.

    threads: those that `auto` once chose for the run continued here. placed: false leaves the model on the CPU.
    """
    run = cfg.run
    device = choose_device(run.device)
    if threads is None or run.num_threads != "auto" or threads > available_cores():
        threads = choose_threads(run.num_threads, device, run.num_workers)
    torch.set_num_threads(threads)
    precision = choose_precision(run.precision, device)
    task_class = registry.get_task_class(cfg.task["name"])
    task = task_class(**bind(task_class, cfg.task, where="task", skip=("name",)))
    with dist.local_main_first():
        datasets = build_datasets(cfg.datasets)
    # The same weights on every rank, whatever drew random numbers before.
    torch.manual_seed(run.seed)
    model = build_model(model_cfg)
    if placed:
        model.to(device)
    args = EvalArgs(
        batch_size=run.batch_size_eval,
        num_workers=run.num_workers,
        device=device,
        precision=precision,
        max_bad_fraction=run.max_bad_fraction,
    )
    return Base(device, precision, datasets, task, model, args)


def build_parts(cfg: Config, start: StartPoint) -> Parts:
    """Everything training needs, with a checkpoint's contents where the run continues one, and its data in the state.

    Raises ConfigError among others where task, model and data don't fit each other, where the data is not what it was
    at the checkpoint (`note_data`), or the number of processes with `run.max_epochs`.
    """
    run, state = cfg.run, start.state
    resumed = start.checkpoint is not None
    quantized = is_quantized(cfg.model)
    check_strategy(run.strategy, options=run.strategy_options)
    if resumed:
        _check_epochs(run, state.world_size)
    check_quantized(run.strategy, quantized=quantized)
    if run.max_steps is None and run.max_epochs is None:
        raise ConfigError("the run has no length: set run.max_steps or run.max_epochs")
    if run.cache_features:
        check_encoder(cfg)
    schedule_class = registry.get_lr_scheduler_class(run.lr_sched)
    # A checkpoint holds the weights that other runs once gave.
    model_cfg = without_sources(cfg.model) if resumed else cfg.model
    threads = state.num_threads if resumed else None
    # The strategy moves the model: one that is sharded may be too large for one device.
    base = build_base(cfg, model_cfg=model_cfg, threads=threads, placed=False)
    if start.checkpoint is not None:
        base.model.load_checkpoint(start.checkpoint)  # type: ignore[operator]  # a BaseModel's method
    _keep_frozen(base.model, Path(run.output_dir))
    # Before features of other data than the run's are made.
    trained_on = list(_trained_on(cfg, base.datasets).values())
    note_data(state, trained_on, allowed=run.allow_changed_data)
    check_training(base.model, trained_on)
    check_evaluation(base.task, base.model, base.datasets, run.valid_splits)
    if run.cache_features:
        with encoder_placed(base) as encoder:
            base.datasets = with_features(cfg, base.datasets, encoder)
    loader = build_loader(cfg, base.datasets)
    max_steps = run.max_steps or -(-(run.max_epochs or 0) * loader.batches_per_epoch // run.accum_grad_iters)
    if run.compile:
        compile_blocks(base.model, base.device)
    chosen = choose_strategy(run.strategy, base.model, base.device, quantized=quantized)
    strategy = build_strategy(chosen, run.strategy_options)
    wrapped, optimizer = strategy.prepare(
        base.model,
        base.device,
        betas=run.betas,
        weight_decay=run.weight_decay,
        lr_layer_decay=run.lr_layer_decay,
    )
    scaler = strategy.scaler(base.device, enabled=base.precision == "fp16")
    if start.checkpoint is not None:
        strategy.load_optimizer_tensors(optimizer, ckpt.open_optimizer(start.checkpoint))
        if state.scaler:
            scaler.load_state_dict(state.scaler)
    schedule = schedule_class(
        max_steps=max_steps,
        init_lr=run.init_lr,
        min_lr=run.min_lr,
        warmup_lr=run.warmup_lr,
        warmup_steps=run.warmup_steps,
    )
    return Parts(
        **vars(base),
        strategy=strategy,
        wrapped=wrapped,
        optimizer=optimizer,
        schedule=schedule,
        scaler=scaler,
        loader=loader,
        max_steps=max_steps,
    )


def _keep_frozen(model: nn.Module, run_dir: Path) -> None:
    """Frozen weights that are nowhere else go into a file of the run's, once; see `BaseModel.keep_frozen`."""
    kept = model.keep_frozen(run_dir, write=dist.is_main()) if isinstance(model, BaseModel) else []
    if kept and dist.is_main():
        logger.info(
            "no file gave the frozen weights of %s: they are kept in %s", ", ".join(kept), model.frozen_from
        )


def _check_epochs(run: RunConfig, before: int) -> None:
    """Raise ConfigError where steps done are no measure of the epochs done: each had as many as `before` made of it."""
    now = dist.world_size()
    if run.max_epochs is not None and before != now:
        word = "process" if before == 1 else "processes"
        raise ConfigError(
            f"run.max_epochs: the run had {before} {word} and now has {now}, with which an epoch is another number of "
            f"steps: start it with {before} {word}, or set run.max_epochs=null run.max_steps=<steps>"
        )


def encoder_of(base: Base) -> Encoder:
    """The model's frozen image encoder as training calls it; see `check_encoder`."""
    tower: VisionTower = base.model.visual_encoder  # type: ignore[assignment]  # of every model with such a section
    return Encoder(tower, base.device, base.precision, batch_size=base.eval_args.batch_size)


@contextlib.contextmanager
def encoder_placed(base: Base) -> Iterator[Encoder]:
    """The image encoder of a model that is on the CPU, alone on the device meanwhile, and back on the CPU after it."""
    encoder = encoder_of(base)
    encoder.tower.to(base.device)
    try:
        yield encoder
    finally:
        encoder.tower.to("cpu")


def build_loader(cfg: Config, datasets: Splits) -> TrainLoader:
    """The training loader over every dataset that has the training split, mixed by their `ratio`."""
    run = cfg.run
    chosen = _trained_on(cfg, datasets)
    return TrainLoader(
        list(chosen.values()),
        _ratios({name: cfg.datasets[name].get("ratio") for name in chosen}),
        batch_size=run.batch_size_train,
        seed=run.seed,
        rank=dist.rank(),
        world_size=dist.world_size(),
        num_workers=run.num_workers,
        max_bad_fraction=run.max_bad_fraction,
    )


def _trained_on(cfg: Config, datasets: Splits) -> dict[str, Any]:
    """The training split of each dataset that has it, by the dataset's name."""
    split = cfg.run.train_split
    chosen = {name: splits[split] for name, splits in datasets.items() if split in splits}
    if not chosen:
        known = sorted({split for splits in datasets.values() for split in splits})
        hint = closest(split, known) or f"splits: {', '.join(known) or 'none'}"
        raise ConfigError(f"run.train_split: no dataset has a split '{split}'; {hint}")
    return chosen


def _ratios(given: Mapping[str, float | None]) -> list[float] | None:
    """How often each dataset is drawn, None for by size."""
    without = [name for name, ratio in given.items() if ratio is None]
    if len(without) == len(given):
        return None
    if without:
        missing = ", ".join(f"datasets.{name}.ratio" for name in without)
        raise ConfigError(f"missing {missing}: either all datasets that are trained on have a ratio, or none")
    return [ratio for ratio in given.values() if ratio is not None]


def to_evaluate(cfg: Config) -> Path:
    """The checkpoint whose weights an evaluation is of.

    That is run.checkpoint if set, else the best (or newest) checkpoint of output_dir, else model.pretrained: a
    fine-tuning run's file names where it began, and what it made of that is what one wants to know.

    Raises CheckpointError when none of them is there.
    """
    chosen = cfg.run.checkpoint or ckpt.best_or_newest(cfg.run.output_dir) or cfg.model.get("pretrained")
    if chosen is None:
        raise CheckpointError(
            f"nothing to evaluate: '{cfg.run.output_dir}' has no checkpoint; train, or set run.checkpoint"
        )
    return Path(chosen)


def build_for_evaluation(cfg: Config, source: Path) -> Base:
    """What evaluates a checkpoint's weights; ConfigError where the task can't do so on the splits."""
    base = build_base(cfg, model_cfg={**cfg.model, "pretrained": str(source)})
    check_evaluation(base.task, base.model, base.datasets, cfg.run.test_splits)
    if dist.is_main() and isinstance(base.model, BaseModel):
        warn_of_untrained(base.model)
    return base


def to_device(samples: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on the device."""
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, (Tensor, ImageFeatures)) else v
        for k, v in samples.items()
    }


def describe(parts: Parts) -> str:
    """One line about a run: sizes, arithmetic, processes."""
    total = sum(p.numel() for p in parts.model.parameters())
    trained = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    processes = f", {dist.world_size()} processes" if dist.world_size() > 1 else ""
    threads = torch.get_num_threads()
    return (
        f"training {trained / 1e6:.2f}M of {total / 1e6:.2f}M parameters for {parts.max_steps} steps"
        f" on {parts.device} in {parts.precision}{processes},"
        f" {threads} thread{'s' if threads > 1 else ''} per process"
    )

"""Evaluates splits by the task, names the metrics, and writes what people read."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lavis_lite.common.errors import ConfigError, closest
from lavis_lite.common.expected import Expected
from lavis_lite.common.io import atomic_write
from lavis_lite.common.logging import get_logger
from lavis_lite.runners.setup import Base, Splits
from lavis_lite.runners.state import mix_seed
from lavis_lite.tasks.base import Evaluation, RunFacts

logger = get_logger(__name__)


@dataclass(frozen=True)
class Result:
    """One dataset's evaluation on one split."""

    split: str
    dataset: str
    evaluation: Evaluation


@dataclass
class Closing:
    """What is said in the end; error: why a file of it couldn't be written, None where all were."""

    lines: list[str]
    error: OSError | None = None


def make_folder(folder: Path, checkpoint: Path) -> None:
    """Make the folder of a checkpoint's evaluation; ConfigError where it can't be made, or nothing written there."""
    failed = "make"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        failed = "write to"
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"run.output_dir: can't {failed} the folder '{folder}': {error.strerror}; set another one, "
            f"and run.checkpoint={checkpoint}"
        ) from error


def evaluate_splits(
    base: Base, splits: Sequence[str], *, seed: int, final: bool, folder: Path | None = None
) -> list[Result]:
    """Evaluate the model on every dataset that has one of the splits; same results on every rank.

    final: False in mid-training, where a task may leave out what takes long. folder: where tasks may leave
    files, see `EvalArgs`.
    """
    results = []
    training = base.model.training
    for split in splits:
        having = _having(base.datasets, split)
        for name, dataset in having.items():
            # Its own randomness: neither the training step before nor the order of splits changes a metric.
            torch.manual_seed(mix_seed(seed, "evaluation", split, name))
            began = time.monotonic()
            label = f"{split}_{name}" if len(having) > 1 else split
            args = replace(base.eval_args, folder=folder, label=label)
            evaluation = base.task.evaluate(base.model, dataset, loader_args=args, final=final)
            results.append(Result(split, name, evaluation))
            logger.info("evaluated %s of %s in %.1f s", split, name, time.monotonic() - began)
    base.model.train(training)
    return results


def named_metrics(results: Sequence[Result]) -> dict[str, float]:
    """Metrics of all results as in the log: `val/itc/tr_r1`.

    With several datasets in a split that is the mean of those that have the metric, and each has its own as
    `val/<dataset>/itc/tr_r1`.
    """
    metrics: dict[str, float] = {}
    for split in dict.fromkeys(result.split for result in results):
        group = [result for result in results if result.split == split]
        values: dict[str, list[float]] = {}
        for result in group:
            for name, value in result.evaluation.metrics.items():
                values.setdefault(name, []).append(float(value))
                if len(group) > 1:
                    metrics[f"{split}/{result.dataset}/{name}"] = float(value)
        metrics.update({f"{split}/{name}": sum(several) / len(several) for name, several in values.items()})
    return metrics


def check_splits(datasets: Splits, splits: Sequence[str], *, where: str, required: bool) -> None:
    """A split that no dataset has is an error, or if not `required` a line in the log; `required` none is an error."""
    if required and not splits:
        raise ConfigError(f"{where} is empty: there is nothing to evaluate")
    known = sorted({split for own in datasets.values() for split in own})
    for split in splits:
        if not _having(datasets, split):
            hint = closest(split, known) or f"splits: {', '.join(known) or 'none'}"
            message = f"{where}: no dataset has a split '{split}'; {hint}"
            if required:
                raise ConfigError(message)
            logger.warning("%s (nothing is evaluated there)", message)


def check_best_metric(name: str, metrics: Mapping[str, float]) -> None:
    """ConfigError, with the nearest name, when run.best_metric is not among the metrics of an evaluation."""
    if name not in metrics:
        hint = closest(name, metrics) or f"metrics: {', '.join(metrics) or 'none'}"
        raise ConfigError(f"run.best_metric: '{name}' was not measured; {hint} (correct it and start again: "
                          "the run continues from its last checkpoint)")  # fmt: skip


def _having(datasets: Splits, split: str) -> dict[str, Any]:
    return {name: splits[split] for name, splits in datasets.items() if split in splits}


def closing(
    base: Base,
    results: Sequence[Result],
    log_rows: Sequence[Mapping[str, Any]],
    facts: RunFacts,
    *,
    expected: Expected | None = None,
) -> Closing:
    """Write the reports, and return the closing lines, which are the same where the disk refuses; for the main process.

    The first result's report lies in the folder of `facts`, those of others in folders of their own below it.
    Without results there is still a report, of the curves. With numbers to expect, the first result's report and
    lines compare all results with them.
    """
    if not results:
        return _close_one(base, None, log_rows, facts)
    said = Closing([])
    for number, result in enumerate(results):
        own = replace(facts, split=result.split)
        if len(results) > 1:
            own = replace(own, split=f"{result.split} of {result.dataset}")
        if number == 0 and expected is not None:
            own = replace(own, comparison=expected.rows(named_metrics(results)))
        if number > 0:
            own = replace(own, run_dir=facts.run_dir / f"{result.split}_{result.dataset}")
        if number < len(results) - 1:  # the run's time and files come once, last
            own = replace(own, wall_time=None, files={})
        one = _close_one(base, result.evaluation, log_rows, own)
        said = Closing(said.lines + one.lines, said.error or one.error)
    return said


def close_evaluation(
    base: Base,
    results: Sequence[Result],
    checkpoint: Path,
    log_rows: Sequence[Mapping[str, Any]],
    facts: RunFacts,
    *,
    expected: Expected | None = None,
) -> Closing:
    """`closing` for a checkpoint that was evaluated by itself: its metrics are written, too."""
    path, failed = facts.run_dir / "metrics.json", None
    files = {"metrics": path, "checkpoint": checkpoint}
    try:
        write_metrics(path, checkpoint, named_metrics(results))
    except OSError as error:
        failed = error
        del files["metrics"]
    said = closing(base, results, log_rows, replace(facts, files=files), expected=expected)
    return Closing(said.lines, failed or said.error)


def _close_one(
    base: Base, evaluation: Evaluation | None, log_rows: Sequence[Mapping[str, Any]], facts: RunFacts
) -> Closing:
    report: dict[str, Path] = {}
    failed = None
    try:
        facts.run_dir.mkdir(parents=True, exist_ok=True)
        report = base.task.write_report(facts.run_dir, evaluation, log_rows, facts)
    except OSError as error:
        failed = error
    files = {**report, **facts.files}
    return Closing(list(base.task.summary(evaluation, replace(facts, files=files))), failed)


def write_metrics(path: Path, checkpoint: Path, metrics: Mapping[str, float]) -> None:
    """Write an evaluation's metrics as JSON with the checkpoint they belong to; not finite ones as null."""
    values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    atomic_write(path, json.dumps({"checkpoint": str(checkpoint), "metrics": values}, indent=1) + "\n")

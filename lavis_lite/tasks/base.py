"""What every task offers the runner: an evaluation, the table at the end of a run, and the report's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lavis_lite.common.device import PRECISIONS, autocast
from lavis_lite.tasks.heldout import held_out_means
from lavis_lite.tasks.summary import table_lines, tail_lines


@dataclass(frozen=True)
class EvalArgs:
    """How to run an evaluation; nothing in here changes what is measured.

    batch_size: images per process and step. precision: fp32, bf16 or fp16.
    max_bad_fraction: more unreadable images than this stop the evaluation.
    folder: where a task may leave files, such as predictions; None for nowhere. It may not exist yet.
    label: what tells the files of one evaluation from another's in that folder: the split, with the dataset
    where several have it.
    """

    batch_size: int = 64
    num_workers: int = 0
    device: str | torch.device = "cpu"
    precision: str = "fp32"
    max_bad_fraction: float = 0.01
    folder: Path | None = None
    label: str = "split"

    def autocast(self) -> AbstractContextManager[None]:
        """The autocast context of the precision; does nothing for fp32."""
        return autocast(torch.device(self.device), self.precision)

    @property
    def storage_dtype(self) -> torch.dtype:
        """What image features wait in: the precision the matrix products will read them in anyway."""
        return PRECISIONS.get(self.precision, torch.float32)


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one evaluation, and whatever the report needs beside them.

    metrics: names as in the log, without the split. details: what `report_sections` shows, None where a
    task has nothing to show and on ranks other than the main one.
    """

    metrics: dict[str, float]
    details: Any = None


@dataclass(frozen=True)
class RunFacts:
    """What a run knows about itself when it ends, for the summary and the report.

    wall_time: seconds. split: the held-out split of the evaluation. config: the resolved configuration as
    YAML text. files: label -> path of what the run leaves behind. comparison: with published numbers, as header and
    rows of a table.
    """

    run_dir: Path
    wall_time: float | None = None
    split: str = ""
    config: str = ""
    files: Mapping[str, Path] = field(default_factory=dict)
    comparison: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None


def check_rows(model: Any, dataset: Any) -> None:
    """Raise ConfigError for a dataset whose rows the model can't compute its losses of; see `BaseModel.check_rows`."""
    check = getattr(model, "check_rows", None)
    if check is not None:
        check(dataset)


class BaseTask:
    """A task without retrieval or generation: held-out means of what the model's forward returns.

    Subclasses override `evaluate`, what it needs of model and rows in `check_fit`, and, where a plain table of metrics
    does not do, `metric_lines` and `report_sections`.

    loss_batch_size, loss_batches: at most so many whole batches of that many samples are drawn for the
    losses (a contrastive loss depends on the batch size, so it does not follow the run's).
    seed: of the samples drawn for the losses, and of everything random in computing them.
    """

    def __init__(self, *, loss_batch_size: int = 64, loss_batches: int = 16, seed: int = 42) -> None:
        self.loss_batch_size = loss_batch_size
        self.loss_batches = loss_batches
        self.seed = seed

    def evaluate(
        self, model: nn.Module, dataset: Any, *, loader_args: EvalArgs, final: bool = True
    ) -> Evaluation:
        """Evaluate the model on one held-out split; the same metrics on every rank, for any number of ranks.

        model: the plain model, not a wrapper; its train or eval mode is restored. dataset: a `MapDataset`.
        final: False in mid-training, where a task may leave out what takes long.
        """
        return Evaluation(self.losses(model, dataset, loader_args))

    def check_fit(self, model: Any, dataset: Any) -> None:
        """Raise ConfigError where `evaluate` couldn't do with this model and dataset; reads no row.

        A run calls it for every dataset it will evaluate before its first step. Here it asks nothing, as subclasses
        need different things.
        """

    def check_losses(self, model: Any, dataset: Any) -> None:
        """`check_fit` of `losses`: what the model says of such rows, if any are to be drawn."""
        if self.loss_batches > 0:
            check_rows(model, dataset)

    def losses(self, model: nn.Module, dataset: Any, loader_args: EvalArgs) -> dict[str, float]:
        """Held-out means of the scalars the model's forward returns, with dropout off."""
        return held_out_means(
            model,
            dataset,
            batch_size=self.loss_batch_size,
            max_batches=self.loss_batches,
            num_workers=loader_args.num_workers,
            device=loader_args.device,
            max_bad_fraction=loader_args.max_bad_fraction,
            autocast=loader_args.autocast,
            seed=self.seed,
        )

    def metric_lines(self, metrics: Mapping[str, float]) -> list[str]:
        """The table of metrics, as aligned lines of plain text."""
        return table_lines(["metric", "value"], [[name, f"{value:.4g}"] for name, value in metrics.items()])

    def summary(self, evaluation: Evaluation | None, facts: RunFacts) -> list[str]:
        """The lines a run prints at its end: metrics, wall time, and where its files are.

        evaluation: None for a run that ended before one.
        """
        title = [f"held-out split: {facts.split}"] if facts.split else []
        lines = self.metric_lines(evaluation.metrics) if evaluation else ["not evaluated yet"]
        compared = ["", *table_lines(*facts.comparison)] if facts.comparison else []
        return [*title, *lines, *compared, *tail_lines(facts.wall_time, facts.files)]

    def report_sections(self, evaluation: Evaluation) -> list[str]:
        """HTML sections between the curves and the configuration: tables and examples."""
        from lavis_lite.tasks.html import metrics_section

        return [metrics_section(evaluation.metrics)]

    def write_report(
        self,
        run_dir: str | Path,
        evaluation: Evaluation | None,
        log_rows: Sequence[Mapping[str, Any]],
        facts: RunFacts,
    ) -> dict[str, Path]:
        """Write curves.png and report.html into a folder; returns label -> path of both.

        A run without an evaluation, or with hardly a logged step, gets a report that says so.
        log_rows: the rows of log.jsonl.
        """
        from lavis_lite.tasks.html import comparison_section
        from lavis_lite.tasks.report import write_report  # matplotlib is imported when a report is written

        sections = self.report_sections(evaluation) if evaluation else []
        if facts.comparison:
            sections.append(comparison_section(*facts.comparison))
        return write_report(
            Path(run_dir),
            sections,
            log_rows,
            wall_time=facts.wall_time,
            split=facts.split,
            config=facts.config,
        )

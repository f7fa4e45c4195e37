"""Whether task, model and data fit each other: asked once all three are built, before the first step or evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lavis_lite.tasks.base import check_rows


def check_training(model: Any, datasets: Iterable[Any]) -> None:
    """Raise ConfigError for a dataset whose rows the model can't learn from; see `BaseModel.check_rows`."""
    for dataset in datasets:
        check_rows(model, dataset)


def check_evaluation(
    task: Any, model: Any, datasets: Mapping[str, Mapping[str, Any]], splits: Sequence[str]
) -> None:
    """Raise ConfigError where the task can't evaluate the model on one of the splits; see `BaseTask.check_fit`.

    datasets: by name, then split. A split that a dataset doesn't have is none of this check's business.
    """
    check = getattr(task, "check_fit", None)
    if check is None:
        return
    for split in splits:
        for own in datasets.values():
            if split in own:
                check(model, own[split])

"""Losses on held-out batches like training's: whole, shuffled, one caption per image, always the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lavis_lite.common import dist
from lavis_lite.datasets.loader import eval_loader
from lavis_lite.image_features import ImageFeatures


class ChosenRows:
    """Chosen rows of a dataset, each loaded with a seed of its own wherever it stands among the others."""

    def __init__(self, dataset: Any, rows: Sequence[int], seed: int) -> None:
        self.name = dataset.name
        self.dataset = dataset
        self.rows = rows
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, *, seed: int) -> Any:
        row = self.rows[index]
        return self.dataset.load(row, seed=self.seed + row)

    def collate(self, samples: list[Any]) -> Any:
        return self.dataset.collate(samples)


def held_out_means(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int,
    max_batches: int,
    num_workers: int,
    device: str | torch.device,
    max_bad_fraction: float,
    autocast: Callable[[], AbstractContextManager[None]],
    seed: int,
) -> dict[str, float]:
    """Means over held-out batches of the scalars that `model(samples)` returns.

    The batches are a pure function of (dataset, batch_size, max_batches, seed). Each is computed by one
    process alone, so that a contrastive loss over B pairs stays one over B pairs on any number of
    processes. A last incomplete batch is dropped unless it is the only one: its contrastive loss would be
    over fewer pairs. Unreadable rows are left out. Returns an empty dictionary for an empty dataset.
    """
    batches = _draw_batches(len(dataset), batch_size, max_batches, seed)
    mine = range(dist.rank(), len(batches), dist.world_size())
    rows: Any = ChosenRows(dataset, [row for number in mine for row in batches[number]], seed)
    loader = eval_loader(
        rows, batch_size=batch_size, num_workers=num_workers, max_bad_fraction=max_bad_fraction
    )
    results: list[tuple[int, dict[str, float]]] = []
    with evaluating(model), dist.local(), autocast():
        for number, samples in zip(mine, loader, strict=False):  # a batch without a readable row doesn't come
            torch.manual_seed(seed + number)
            results.append((number, _scalars(model(to_device(samples, device)))))
    everyones = sorted(result for part in dist.gather_objects(results) for result in part)
    return _means([values for _, values in everyones])


def _draw_batches(rows: int, batch_size: int, max_batches: int, seed: int) -> list[list[int]]:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    whole = rows // batch_size or (1 if rows else 0)
    return [order[n * batch_size : (n + 1) * batch_size] for n in range(min(whole, max_batches))]


def _scalars(outputs: Mapping[str, Any]) -> dict[str, float]:
    """The outputs that are one number each: losses, accuracies."""
    return {
        name: float(value)
        for name, value in outputs.items()
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    }


def _means(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    if not results:
        return {}
    return {name: sum(values[name] for values in results) / len(results) for name in results[0]}


def to_device(samples: Mapping[str, Any], device: str | torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, (Tensor, ImageFeatures)) else value
        for name, value in samples.items()
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no autograd, and a random state of its own; all three are put back afterwards."""
    was_training = model.training
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            # Not inference_mode, in which autocast converts every weight again at every use.
            yield
    finally:
        model.train(was_training)

"""Linear probes: what a linear read-out of frozen features tells about each object of a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_lite.worlds.shapes.targets import ATTRIBUTES


def object_features(features: Tensor, samples: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean feature of the patches that each object covers, and the object's labels.

    Args:
        features: [B, P, D]. samples: a batch with `objects` and `cover`, see `targets.scene_targets`.

    Returns: [N, D] and int64[N, 4] (columns as in ATTRIBUTES) of the N objects in the batch.
    """
    objects, cover = samples["objects"], samples["cover"]
    numbers = torch.arange(1, objects.shape[1] + 1, device=cover.device)
    weights = (cover[:, None] == numbers[:, None]).to(features.dtype)
    patches = weights.sum(-1)
    present = (objects[..., 0] >= 0) & (patches > 0)
    pooled = (weights @ features) / patches.clamp(min=1)[..., None]
    return pooled[present].float(), objects[present]


@torch.no_grad()
def collect(
    encoder: Callable[[Tensor], Tensor], batches: Iterable[Mapping[str, Any]]
) -> tuple[Tensor, Tensor]:
    """`object_features` of all batches together."""
    pairs = [object_features(encoder(batch["image"]), batch) for batch in batches]
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])


def probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Accuracy on `test` of a logistic regression fitted on `train`, for each of ATTRIBUTES.

    Args:
        train, test: features [N, D] and labels int64[N, 4].
    """
    mean, std = train[0].mean(0), train[0].std(0) + 1e-6
    x, y = ((features - mean) / std for features in (train[0], test[0]))
    accuracies = {}
    for column, (name, classes) in enumerate(ATTRIBUTES.items()):
        weight, bias = _fit(x, train[1][:, column], classes)
        right = (y @ weight + bias).argmax(-1) == test[1][:, column]
        accuracies[name] = right.float().mean().item()
    return accuracies


def _fit(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with a small L2 penalty, by L-BFGS: the same result every time."""
    with torch.enable_grad():
        weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
        bias = torch.zeros(classes, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=80, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight + bias, labels) + 1e-4 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return weight.detach(), bias.detach()

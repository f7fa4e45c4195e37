"""The gates of the embedded ViT: linear probes of its frozen features on held-out scenes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lavis_lite.common.registry import registry
from lavis_lite.datasets.loader import eval_loader
from lavis_lite.tasks.base import BaseTask, EvalArgs, Evaluation
from lavis_lite.worlds.shapes.probe import collect, probe

# The encoder is shipped when the probes reach these on full pictures.
GATES = {"shape": 0.95, "colour": 0.99, "position": 0.90}


@registry.register_task("shapes_probe")
class ShapesProbeTask(BaseTask):
    """Probes a model's `encoder`: fitted on one half of a held-out split, measured on the other.

    Metrics: probe/shape, probe/colour, probe/size, probe/position, and probe/gates, the smallest margin
    above a gate (0 or more: the encoder may be shipped). Every rank measures everything, so the numbers
    don't depend on the number of processes.

    Args:
        loss_batch_size, loss_batches, seed: of the held-out losses, see `BaseTask`.
    """

    def __init__(self, *, loss_batch_size: int = 64, loss_batches: int = 8, seed: int = 42) -> None:
        super().__init__(loss_batch_size=loss_batch_size, loss_batches=loss_batches, seed=seed)

    def evaluate(
        self, model: nn.Module, dataset: Any, *, loader_args: EvalArgs, final: bool = True
    ) -> Evaluation:
        """Held-out losses on one split of rendered scenes and, at the end, the probes' accuracies."""
        losses = self.losses(model, dataset, loader_args)
        if not final:
            return Evaluation(losses)
        training = model.training
        model.eval()
        features, labels = collect(model.encoder, _batches(dataset, loader_args))  # type: ignore[arg-type]
        model.train(training)
        half = len(features) // 2
        accuracies = probe((features[:half], labels[:half]), (features[half:], labels[half:]))
        metrics = {f"probe/{name}": value for name, value in accuracies.items()}
        metrics["probe/gates"] = min(accuracies[name] - gate for name, gate in GATES.items())
        return Evaluation({**metrics, **losses})


def _batches(dataset: Any, args: EvalArgs) -> Iterator[dict[str, Any]]:
    loader = eval_loader(dataset, batch_size=args.batch_size, num_workers=args.num_workers)
    for batch in loader:
        yield {
            name: value.to(args.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

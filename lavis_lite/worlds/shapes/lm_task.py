"""The gates of the embedded language models: reading comprehension on held-out scenes."""

from __future__ import annotations

from typing import Any

from torch import nn

from lavis_lite.common.registry import registry
from lavis_lite.tasks.base import BaseTask, EvalArgs, Evaluation
from lavis_lite.tasks.heldout import evaluating
from lavis_lite.worlds.shapes.lm_reading import reading_scores
from lavis_lite.worlds.shapes.questions import TYPES

# A language model is shipped when it reads this well: every type of question, and copies of descriptions.
ANSWER_GATE, COPY_GATE = 0.95, 0.99
GATES = {**dict.fromkeys(TYPES, ANSWER_GATE), "copy": COPY_GATE}


@registry.register_task("shapes_reading")
class ShapesReadingTask(BaseTask):
    """Gives a model's `lm` the full descriptions of scenes: are questions answered and descriptions copied?

    Metrics: reading/<question type>, reading/copy, and reading/gates, the smallest margin above a gate (0 or
    more: the model may be shipped). Every rank measures everything, so the numbers don't depend on the number
    of processes.

    Args:
        scenes: of the held-out split, at most. glance: as many in mid-training.
        loss_batch_size, loss_batches, seed: of the held-out losses, see `BaseTask`.
    """

    def __init__(
        self,
        *,
        scenes: int = 500,
        glance: int = 50,
        loss_batch_size: int = 64,
        loss_batches: int = 4,
        seed: int = 42,
    ) -> None:
        super().__init__(loss_batch_size=loss_batch_size, loss_batches=loss_batches, seed=seed)
        self.scenes = scenes
        self.glance = glance

    def evaluate(
        self, model: nn.Module, dataset: Any, *, loader_args: EvalArgs, final: bool = True
    ) -> Evaluation:
        """Held-out losses and what is read right on one split of documents about scenes."""
        losses = self.losses(model, dataset, loader_args)
        number = min(self.scenes if final else self.glance, len(dataset))
        scenes = [dataset.scene(index) for index in range(number)]
        with evaluating(model):
            scores = reading_scores(model.lm, dataset.tokenizer, scenes, batch_size=loader_args.batch_size)
        metrics = {f"reading/{name}": value for name, value in scores.items()}
        metrics["reading/gates"] = margin(scores)
        return Evaluation({**metrics, **losses})


def margin(scores: dict[str, float]) -> float:
    """The smallest distance of a score above its gate; negative where one isn't reached."""
    return min(scores[name] - gate for name, gate in GATES.items() if name in scores)

"""A model that "captions" noise pictures by a rule, and pictures with annotations; run under torchrun's
environment it writes what every rank measures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from retrieval_world import Pictures, write_of_rank
from torch import Tensor, nn

from lavis_lite.common import dist
from lavis_lite.datasets.records import Record
from lavis_lite.tasks.base import EvalArgs
from lavis_lite.tasks.captioning import CaptioningTask

NOUNS = ("dog", "cat", "horse", "bird", "boat")
VERBS = ("sits", "runs", "waits", "stands")


def said(number: int) -> str:
    return f"a {NOUNS[number % 5]} {VERBS[number % 4]} near the number {number % 7} in the grass"


class Annotated(Pictures):
    """Row i has three references; a third of the rows is in group "in-domain", the others in "out-domain"."""

    def __init__(self, size: int = 23, *, unreadable: tuple[int, ...] = ()) -> None:
        super().__init__(size, unreadable=unreadable)
        self.pixels[:, 0, 0, 0] = torch.arange(size).float()  # by which the model knows them
        self.texts = [[f"{said(row).capitalize()}.", f"A {NOUNS[row % 5]}!", "Grass?"] for row in range(size)]
        self.groups: list[str | None] = ["in-domain" if row % 3 == 0 else "out-domain" for row in range(size)]

    def captions(self, index: int) -> list[str]:
        return [text.lower().strip(".!?") for text in self.texts[index]]

    def record(self, index: int) -> Record:
        return Record(f"{index}.jpg", self.texts[index], self.ids[index], None, self.groups[index])


class Captioner(nn.Module):
    """Right on even numbers, and wrong, with words that need escaping, on odd ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls: list[dict[str, Any]] = []

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"loss": self.weight * samples["image"].square().mean()}

    def generate(
        self, samples: Mapping[str, Any], num_beams: int = 3, max_length: int = 30, min_length: int = 1
    ) -> list[str]:
        assert not self.training and not torch.is_grad_enabled()
        numbers = [int(value) for value in samples["image"][:, 0, 0, 0].round().tolist()]
        settings = {"prompt": samples["prompt"], "num_beams": num_beams}
        self.calls.append({**settings, "max_length": max_length, "min_length": min_length, "rows": numbers})
        return [said(number) if number % 2 == 0 else "ein <b>Kätzchen</b> schläft" for number in numbers]


def measure(root: Path) -> list[Any]:
    """Metrics, and the file of captions, for 23 images of which 2 can't be read, then for one image."""
    found = []
    for size in (23, 1):
        folder = root / f"run_{size}"
        data = Annotated(size, unreadable=(4, 11) if size > 1 else ())
        args = EvalArgs(batch_size=3, max_bad_fraction=0.5, folder=folder, label="val")
        task = CaptioningTask(metrics=["cider", "bleu", "rouge_l"], loss_batch_size=4)
        evaluation = task.evaluate(Captioner(), data, loader_args=args)
        written = json.loads((folder / "predictions_val.json").read_text()) if dist.is_main() else None
        assert (evaluation.details is not None) == dist.is_main()
        found.append([evaluation.metrics, dist.broadcast_object(written)])
    return found


def main() -> None:
    dist.init()
    write_of_rank(measure(Path(sys.argv[1])))


if __name__ == "__main__":
    main()

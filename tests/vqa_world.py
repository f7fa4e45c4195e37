"""A model that "answers" questions about noise pictures by a rule; run under torchrun's environment it writes what
every rank measures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from retrieval_world import Pictures, write_of_rank
from torch import Tensor, nn

from lavis_lite.common import dist
from lavis_lite.datasets.readers import Asked
from lavis_lite.datasets.records import Record
from lavis_lite.tasks.base import EvalArgs
from lavis_lite.tasks.vqa import VqaTask

KINDS = ("yes/no", "number", "other")
# What a file of predictions has of the second of `Questions`, answered by an `Answerer`.
SECOND_PREDICTION = {
    "question_id": 1001,
    "image": "1.jpg",
    "question": "Question 1?",
    "prediction": "2",
    "answers": ["Two"] * 2 + ["3"] * 8,
    "answer_type": "number",
    "question_type": "what <1>",
}


class Questions(Pictures):
    """Row i asks about number i; ten answers, of which the rule below finds 10, 2, or none."""

    def __init__(self, size: int = 23, *, unreadable: tuple[int, ...] = (), answered: bool = True) -> None:
        super().__init__(size, unreadable=unreadable)
        self.pixels[:, 0, 0, 0] = torch.arange(size).float()  # by which the model knows them
        self.answered = answered

    def answers(self, row: int) -> list[str]:
        if not self.answered:
            return []
        return [["yes"] * 10, ["Two"] * 2 + ["3"] * 8, ["red"] * 10][row % 3]

    def load(self, index: int, *, seed: int) -> dict[str, Any]:
        sample = super().load(index, seed=seed)
        answer = (self.answers(index) or [""])[0]
        more = {"text_input": f"question {index}?", "text_output": answer, "question_id": 1000 + index}
        return {**sample, **more}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        lists = {key: [sample[key] for sample in samples] for key in ("text_output", "question_id")}
        return {**super().collate(samples), **lists}

    def record(self, index: int) -> Record:
        kind = KINDS[index % 3] if index % 2 == 0 else None  # else told by the answers
        asked = Asked(
            f"Question {index}?", str(1000 + index), self.answers(index), kind, f"what <{index % 2}>"
        )
        return Record(f"{index}.jpg", [], self.ids[index], None, None, asked)


@dataclass(frozen=True)
class Found:
    """What the task and the command line read of a model's `Generated`."""

    texts: list[str]
    confidences: list[float]


class Answerer(nn.Module):
    """Says yes, 2 and <blue> by turns: right, a little right, and wrong with what needs escaping."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls: list[dict[str, Any]] = []

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        assert all(samples["text_output"])
        return {"loss": self.weight * samples["image"].square().mean()}

    def predict_answers(self, samples: Mapping[str, Any], **settings: Any) -> list[str]:
        assert not self.training and not torch.is_grad_enabled()
        numbers = [int(value) for value in samples["image"][:, 0, 0, 0].round().tolist()]
        assert samples["text_input"] == [f"question {number}?" for number in numbers]
        self.calls.append({**settings, "rows": numbers})
        return [("Yes.", "2", "<b>blue</b>")[number % 3] for number in numbers]

    def predict_answers_with_scores(self, samples: Mapping[str, Any], **settings: Any) -> Found:
        texts = self.predict_answers(samples, **settings)
        return Found(texts, [1 / (2 + number) for number in self.calls[-1]["rows"]])


def measure(root: Path) -> list[Any]:
    """Metrics, and both files of answers, for 23 questions of which 2 can't be read, then for one question."""
    found = []
    for size in (23, 1):
        folder = root / f"run_{size}"
        data = Questions(size, unreadable=(4, 11) if size > 1 else ())
        args = EvalArgs(batch_size=3, max_bad_fraction=0.5, folder=folder, label="val")
        evaluation = VqaTask(loss_batch_size=4).evaluate(Answerer(), data, loader_args=args)
        names = ("predictions_val.json", "results_val.json")
        written = [json.loads((folder / name).read_text()) for name in names] if dist.is_main() else None
        assert (evaluation.details is not None) == dist.is_main()
        found.append([evaluation.metrics, dist.broadcast_object(written)])
    return found


def main() -> None:
    dist.init()
    write_of_rank(measure(Path(sys.argv[1])))


if __name__ == "__main__":
    main()

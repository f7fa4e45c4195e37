"""A tiny model, dataset and task for the runner's tests; a config names this file in `imports`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lavis_lite import registry
from lavis_lite.common import dist
from lavis_lite.models.base import BaseModel
from lavis_lite.tasks.base import BaseTask, Evaluation, RunFacts


@registry.register_model("fake_mlp")
class FakeMLP(BaseModel):
    """Two tied linear layers and dropout above a frozen one: predicts the mean of noisy inputs."""

    presets = "fake_mlp"
    optional_keys = (r"^frozen\.",)

    def __init__(
        self,
        *,
        width: int = 8,
        dropout: float = 0.2,
        bad_steps: tuple[int, ...] = (),
        bad_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, width).requires_grad_(False)
        nn.init.constant_(self.frozen.weight, 0.3)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)
        self.temp = nn.Parameter(torch.ones(1, 1))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("offset", torch.zeros(()))
        self.bad_steps = bad_steps if bad_rank in (None, dist.rank()) else ()
        self.calls = 0

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        hidden = self.frozen(samples["x"])
        hidden = self.dropout(torch.tanh(self.first(hidden)))
        hidden = self.norm(self.dropout(torch.tanh(self.second(hidden))))
        predicted = self.head(hidden).squeeze(-1) * self.temp.squeeze()
        loss_mse = F.mse_loss(predicted.float(), samples["y"])
        loss_l1 = F.l1_loss(predicted.float(), samples["y"])
        if self.training:
            self.calls += 1
            if self.calls in self.bad_steps:
                loss_mse = loss_mse * torch.tensor(float("nan"))
        return {"loss": loss_mse + loss_l1, "loss_mse": loss_mse, "loss_l1": loss_l1}

    def no_weight_decay(self) -> set[str]:
        return {"temp"}

    def lr_scale(self, name: str, decay: float) -> float:
        return decay if name.startswith("first") else 1.0


class FakeRows:
    """Row i: four numbers drawn from (i, seed) and their mean."""

    def __init__(self, name: str, rows: int, seconds: float = 0.0, slow_rank: int | None = None) -> None:
        self.name, self.rows = name, rows
        self.seconds = seconds if slow_rank in (None, dist.rank()) else 0.0

    def __len__(self) -> int:
        return self.rows

    def load(self, index: int, *, seed: int) -> dict[str, Any]:
        time.sleep(self.seconds)
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        noise = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        return {"x": x + 0.1 * noise, "y": x.mean(), "index": index}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "x": torch.stack([s["x"] for s in samples]),
            "y": torch.stack([s["y"] for s in samples]),
            "index": torch.tensor([s["index"] for s in samples]),
        }

    def captions(self, index: int) -> list[str]:
        return [str(index)]

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (2, 2))


@registry.register_builder("fake_rows")
class FakeRowsBuilder:
    """Splits train, val and test of FakeRows; a row of train takes `seconds` to read, on all ranks or one."""

    def __init__(
        self,
        *,
        name: str,
        rows: int = 24,
        seconds: float = 0.0,
        slow_rank: int | None = None,
        ratio: float | None = None,
    ) -> None:
        self.name, self.rows, self.seconds, self.slow_rank = name, rows, seconds, slow_rank

    def build_datasets(self) -> dict[str, FakeRows]:
        return {
            "train": FakeRows(self.name, self.rows, self.seconds, self.slow_rank),
            "val": FakeRows(self.name, 8),
            "test": FakeRows(self.name, 6),
        }


@registry.register_task("fake_loss")
class FakeLossTask(BaseTask):
    """Held-out losses of one batch."""

    def __init__(self, *, loss_batch_size: int = 4) -> None:
        super().__init__(loss_batch_size=loss_batch_size, loss_batches=1, seed=0)

    def write_report(
        self, run_dir: str | Path, evaluation: Evaluation | None, log_rows: Sequence[Any], facts: RunFacts
    ) -> dict[str, Path]:
        path = Path(run_dir) / "report.txt"
        path.write_text(f"{facts.split}: {len(log_rows)} rows, {evaluation}")
        return {"report": path}

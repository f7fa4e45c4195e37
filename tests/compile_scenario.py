"""Compiled blocks under strategies, on forked ranks; run as `python -m tests.compile_scenario FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# A forked rank compiles by itself: the compiler's own processes would outlive it.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch._dynamo
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from strategy_scenario import ending_on_error, ranks

from lavis_lite.common import dist, optim
from lavis_lite.models.blocks import recompute_blocks
from lavis_lite.parallel.base import build_strategy
from lavis_lite.runners import compiling

CPU = torch.device("cpu")
# Strategy, processes, whether blocks are compiled and whether frozen ones recompute, by the name of a run.
RUNS = {
    "plain": ("single", 1, False, False),
    "ddp": ("ddp", 2, True, False),
    "ddp_recomputing": ("ddp", 2, True, True),
    "fsdp2": ("fsdp2", 2, True, False),
    "fsdp2_recomputing": ("fsdp2", 2, True, True),
}
# Rows of the joined batches: the second has other sizes than those first compiled for.
BATCHES = (8, 6, 8)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Tower(nn.Module):
    """Frozen blocks behind trained ones, as a language model's behind a Q-Former."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.trained = nn.ModuleList(Block(16) for _ in range(2))
        self.frozen = nn.ModuleList(Block(16) for _ in range(2)).requires_grad_(False)
        self.head = nn.Linear(16, 1)

    def forward(self, samples: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.first(samples["x"])
        for block in (*self.trained, *self.frozen):
            x = block(x)
        return {"loss": (self.head(x) - samples["y"]).square().mean()}

    def trainable_state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


def rows(size: int) -> dict[str, Tensor]:
    """This rank's part of a joined batch."""
    x = torch.randn(size, 3, 4, generator=torch.Generator().manual_seed(size))
    part = slice(dist.rank() * size // dist.world_size(), (dist.rank() + 1) * size // dist.world_size())
    return {"x": x[part], "y": x.sum(-1, keepdim=True)[part]}


def train(name: str, compiled: bool, recompute: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Tower().train()
    if recompute:
        recompute_blocks(nn.ModuleDict({"frozen": model.frozen}))
    said: list[str] = []
    compiling.logger.warning = lambda text, *args: said.append(text % args)  # type: ignore[method-assign]
    blocks = compiling.compile_blocks(model, CPU) if compiled else 0
    strategy = build_strategy(name, {})
    wrapped, optimizer = strategy.prepare(
        model, CPU, betas=(0.9, 0.98), weight_decay=0.05, lr_layer_decay=1.0
    )
    # Adam turns a gradient that is zero but for rounding into a full step: damped, the numbers can be compared.
    for group in optimizer.param_groups:
        group["eps"] = 1e-3
    optim.set_lr(optimizer, 1e-2)
    found: dict[str, Any] = {"losses": [], "norms": [], "alone": []}
    for size in BATCHES:
        loss = wrapped(rows(size))["loss"]
        loss.backward()
        found["losses"].append(dist.reduce_mean({"loss": loss})["loss"])
        found["norms"].append(float(strategy.clip_gradients(optimizer, 1.0)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad(), strategy.whole(wrapped), dist.local():
            model.eval()
            found["alone"].append(float(model(rows(8))["loss"]))
            model.train()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {
        **found,
        "weights": strategy.model_tensors(model),
        "said": said,
        "blocks": blocks,
        "graphs": graphs,
    }


def main(folder: Path) -> None:
    for run, (name, world, compiled, recompute) in RUNS.items():
        for rank in ranks(world):
            with ending_on_error():
                dist.init(2)
                found = train(name, compiled, recompute)
                if rank == 0:
                    torch.save(found, folder / f"{run}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What each of two gloo processes does for test_dist.py; run as `python -m tests.dist_scenario <folder>`."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lavis_lite.common import dist
from lavis_lite.parallel.auto import choose
from lavis_lite.parallel.base import build_strategy
from lavis_lite.runners.runner import Runner
from tests.runner_helpers import config, weights

BATCH = 3


class Tower(nn.Module):
    """Contrastive loss of this rank's rows against all ranks' rows, both ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(5, 4), nn.Linear(6, 4)
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, samples: dict[str, Tensor]) -> dict[str, Tensor]:
        image = F.normalize(self.image(samples["image"]), dim=-1)
        text = F.normalize(self.text(samples["text"]), dim=-1)
        images, texts = dist.all_gather_with_grad(image), dist.all_gather_with_grad(text)
        target = dist.rank() * len(image) + torch.arange(len(image))
        i2t = F.cross_entropy(self.scale * image @ texts.t(), target)
        t2i = F.cross_entropy(self.scale * text @ images.t(), target)
        return {"loss": i2t + t2i}


def joined_batch() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"image": torch.randn(2 * BATCH, 5), "text": torch.randn(2 * BATCH, 6)}


def gradients(samples: dict[str, Tensor]) -> dict[str, Any]:
    """Loss and gradients, averaged over ranks by the strategy that `auto` chooses."""
    model = Tower()
    wrapped = build_strategy(choose(0, None, dist.world_size())).wrap(model, torch.device("cpu"))
    loss = wrapped(samples)["loss"]
    loss.backward()
    return {
        "loss": dist.reduce_mean({"loss": loss})["loss"],
        "grads": {name: p.grad for name, p in model.named_parameters()},
    }


def runs(folder: Path) -> dict[str, Any]:
    """A run of four steps, and its second half once more from the checkpoint in its middle."""
    options = ("model.dropout=0.0",)
    run = {"max_steps": 4, "save_every": 2, "batch_size_train": 2, "accum_grad_iters": 2}
    cfg = config(folder, *options, **run)
    found: dict[str, Any] = {}
    with mock.patch.object(dist, "shutdown"):  # the group is needed again
        result = Runner(cfg).train()
        dist.barrier()
        found["metrics"], found["whole"] = result.metrics, weights(result.checkpoint)
        dist.barrier()
        if dist.is_main():
            assert result.checkpoint is not None
            shutil.rmtree(result.checkpoint)
        dist.barrier()
        again = Runner(cfg)
        with mock.patch.object(again, "train_step", wraps=again.train_step) as step:
            again.train()
        dist.barrier()
        found["resumed"], found["steps_again"] = weights(again.saved), step.call_count
    return found


def main(folder: Path) -> None:
    dist.init()
    rank = dist.rank()
    part = {name: x[rank * BATCH : (rank + 1) * BATCH] for name, x in joined_batch().items()}
    found = gradients(part)
    found["bools"] = dist.all_gather(torch.tensor([rank == 1, True]))
    own = torch.full((rank + 1, 2), float(rank))
    found["rows"] = dist.rows_of_ranks(own)
    found["uneven"] = dist.all_gather(own, found["rows"])
    found["objects"] = dist.gather_objects([f"from {rank}"] * (rank + 1))
    found["broadcast"] = dist.broadcast_object({"rank": rank})
    found["mean"] = dist.reduce_mean({"b": torch.tensor(float(rank)), "a": 2.0 * rank})
    found["nan"] = dist.reduce_mean({"x": math.nan if rank else 1.0})["x"]
    found["main"] = dist.is_main()
    with dist.local():
        found["local"] = (dist.world_size(), len(dist.all_gather(torch.ones(2))))
    marker = folder / "cached"
    with dist.local_main_first():
        found["found_cached"] = marker.exists()
        marker.write_text("")
    found.update(runs(folder / "runs"))
    torch.save(found, folder / f"rank{rank}.pt")
    dist.shutdown()


if __name__ == "__main__":
    with dist.ending_process():
        main(Path(sys.argv[1]))

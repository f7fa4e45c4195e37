"""Two real processes against one with the joined batch: same loss and, after DDP's averaging, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
from stage1_helpers import enlarge_weights, tiny_config, tiny_samples, write_tokenizer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lavis_lite.models import losses
from lavis_lite.models.blip2_qformer import Blip2QFormer

BATCH, WORLD = 6, 2
VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {},
    # The encoder gets gradient too, some of it through pictures that other ranks took as negatives.
    "trained_encoder": {"num_hard_negatives": 2, "vision_encoder": {"freeze": False, "dropout": 0.0}},
}


def hardest(logits: Tensor, same: Tensor, *, count: int = 1) -> tuple[Tensor, Tensor]:
    """Instead of a draw, which would differ between one process and two."""
    best = logits.masked_fill(same, float("-inf")).topk(min(count, logits.shape[1]), dim=1)
    return best.indices, best.values > float("-inf")


def run(model: torch.nn.Module, rows: slice, samples: dict[str, Any]) -> dict[str, Tensor]:
    output = model({key: value[rows] for key, value in samples.items()})
    output["loss"].backward()
    return {name: value.detach() for name, value in output.items()}


def make(tokenizer: str, **changes: Any) -> tuple[Blip2QFormer, dict[str, Any]]:
    torch.manual_seed(0)
    model = Blip2QFormer.from_config(tiny_config(tokenizer, **changes)).train()
    torch.nn.init.normal_(
        model.visual_encoder.encoder.patches.weight, generator=torch.Generator().manual_seed(3)
    )
    with torch.no_grad():
        for parameter in model.Qformer.parameters():
            parameter.zero_()
    enlarge_weights(model, std=0.2)
    # Rank 0 has the short texts, and pictures 2 and 4 are the same one across the ranks.
    texts = [
        "dogs",
        "a cat",
        "a dog runs",
        "the big blue cat sits on a mat",
        "a red dog and a cat",
        "the mat runs",
    ]
    return model, {**tiny_samples(BATCH), "text_input": texts, "image_id": torch.tensor([0, 1, 2, 3, 2, 5])}


def one_of_two(rank: int, folder: str, tokenizer: str) -> None:
    torch.set_num_threads(1)
    losses.sample_negatives = hardest
    torch_dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    share = BATCH // WORLD
    for name, changes in VARIANTS.items():
        model, samples = make(tokenizer, **changes)
        output = run(DistributedDataParallel(model), slice(rank * share, (rank + 1) * share), samples)
        gradients = {
            key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad
        }
        torch.save({"output": output, "gradients": gradients}, f"{folder}/{name}{rank}.pt")
    torch_dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    mp.spawn(one_of_two, args=(str(tmp_path), tokenizer), nprocs=WORLD)
    monkeypatch.setattr(losses, "sample_negatives", hardest)
    for variant, changes in VARIANTS.items():
        ranks = [torch.load(tmp_path / f"{variant}{rank}.pt", weights_only=True) for rank in range(WORLD)]
        model, samples = make(tokenizer, **changes)
        joined = run(model, slice(None), samples)
        for name in ("loss", "loss_itc", "loss_itm", "loss_itg"):
            mean = sum(rank["output"][name] for rank in ranks) / WORLD
            torch.testing.assert_close(mean, joined[name], rtol=0, atol=1e-5, msg=f"{variant}: {name}")
        assert ranks[0]["output"]["loss_itg"] != ranks[1]["output"]["loss_itg"], (
            "ranks must differ to prove anything"
        )
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                for rank in ranks:
                    torch.testing.assert_close(
                        rank["gradients"][name],
                        parameter.grad,
                        rtol=1e-4,
                        atol=1e-5,
                        msg=f"{variant}: {name}",
                    )

"""Five steps of tiny models under every strategy; run as `python -m tests.strategy_scenario <folder>`.

One process imports all that is needed, and every rank of every strategy is forked from it: a start costs seconds,
a fork nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Not torch.set_num_threads: it makes a pool of threads, which a forked rank would find broken and, now and then, abort.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))

from generative_helpers import tiny_generative_config
from retrieval_world import Pictures
from runner_helpers import free_port
from stage1_helpers import enlarge_weights, tiny_config, tiny_samples, write_tokenizer
from vqa_helpers import ANSWERS, QUESTIONS, question_config

from lavis_lite.common import dist, optim
from lavis_lite.models import losses
from lavis_lite.models.blip2_generative import Blip2Generative
from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.models.blocks import transformer_blocks
from lavis_lite.parallel.base import build_strategy
from lavis_lite.tasks.base import EvalArgs
from lavis_lite.tasks.pretrain import ImageTextPretrainTask

STEPS, ROWS = 5, 8
ACCUM = 2  # batches per step
# Strategy, processes and options by the name of a run.
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "single": ("single", 1, {}),
    "ddp2": ("ddp", 2, {}),
    "ddp4": ("ddp", 4, {}),
    "fsdp2_2": ("fsdp2", 2, {}),
    "fsdp2_2_offloaded": ("fsdp2", 2, {"cpu_offload": True}),
    "fsdp2_4": ("fsdp2", 4, {}),
    "fairscale2": ("fairscale", 2, {}),
    "fairscale2_recomputing": ("fairscale", 2, {"checkpoint_blocks": True}),
    "fairscale4": ("fairscale", 4, {}),
}
# With fp16's loss scaler, and a loss on the last rank that is not a number: one case of them.
SCALED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "single_scaled": ("single", 1, {}),
    "ddp2_scaled": ("ddp", 2, {}),
    "fsdp2_2_scaled": ("fsdp2", 2, {}),
    "fairscale2_scaled": ("fairscale", 2, {}),
}
SCALED_CASE, BAD_STEP = "stage1", 2
BLOCKS = {"name": "shapes_vit", "width": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 16}
WORDS = [
    "dogs",
    "a cat",
    "a dog runs",
    "the big blue cat sits on a mat",
    "a red dog and a cat",
    "the mat runs",
]
Case = tuple[Callable[[Path, bool], nn.Module], Callable[[int], dict[str, Any]]]


def hardest(logits: Tensor, same: Tensor, *, count: int = 1) -> tuple[Tensor, Tensor]:
    """Instead of a draw, which would differ between one process and several."""
    best = logits.masked_fill(same, float("-inf")).topk(min(count, logits.shape[1]), dim=1)
    return best.indices, best.values > float("-inf")


def stage1(folder: Path, recompute: bool) -> nn.Module:
    vision = {**BLOCKS, "freeze": False, "grad_checkpointing": recompute}
    return Blip2QFormer.from_config(tiny_config(write_tokenizer(folder / "bert"), vision_encoder=vision))


def stage2(folder: Path, recompute: bool) -> nn.Module:
    low = {
        "language_model": {"grad_checkpointing": recompute},
        "vision_encoder": {**BLOCKS, "precision": "bf16"},
    }
    return Blip2Generative.from_config(tiny_generative_config(folder / "opt", "opt", **low))


def vqa(folder: Path, recompute: bool) -> nn.Module:
    parts = {"language_model": {"grad_checkpointing": recompute}, "vision_encoder": BLOCKS}
    return Blip2Generative.from_config(question_config(folder / "vqa", "t5", **parts))


def pairs(seed: int) -> dict[str, Any]:
    samples = tiny_samples(ROWS, seed=seed)
    texts = [WORDS[(row * 5 + seed) % len(WORDS)] for row in range(ROWS)]
    return {**samples, "text_input": texts, "image_id": torch.arange(ROWS) // 2 + seed}


def questions(seed: int) -> dict[str, Any]:
    asked = [QUESTIONS[(row + seed) % 4] for row in range(ROWS)]
    answers = [ANSWERS[(row * 3 + seed) % 4] for row in range(ROWS)]
    return {"image": tiny_samples(ROWS, seed=seed)["image"], "text_input": asked, "text_output": answers}


CASES: dict[str, Case] = {"stage1": (stage1, pairs), "stage2": (stage2, pairs), "vqa": (vqa, questions)}


def share(samples: dict[str, Any], uneven: bool) -> dict[str, Any]:
    """This rank's rows of the joined batch; uneven: the last rank has one, the first ones those that it lacks."""
    world, rank = dist.world_size(), dist.rank()
    size = ROWS // world
    edges = [size * r for r in range(world)] + [ROWS]
    if uneven and world > 1:
        edges[-2] = ROWS - 1
    return {key: value[edges[rank] : edges[rank + 1]] for key, value in samples.items()}


def build(case: str, folder: Path, *, recompute: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[case][0](folder, recompute)
    enlarge_weights(model, std=0.1)
    return model.train()


def train(run: str, case: str, folder: Path) -> dict[str, Any]:
    """Losses, gradient norms, loss scales and trained weights of five steps; the last batch has other sizes on each
    rank."""
    name, _, options = {**RUNS, **SCALED}[run]
    batch_of = CASES[case][1]
    strategy = build_strategy(name, options)
    model = build(case, folder, recompute="checkpoint_blocks" not in options)
    device = torch.device("cpu")
    wrapped, optimizer = strategy.prepare(
        model, device, betas=(0.9, 0.98), weight_decay=0.05, lr_layer_decay=0.9
    )
    # Adam turns a gradient that is zero but for rounding into a full step: damped, the numbers can be compared.
    for group in getattr(optimizer, "optim", optimizer).param_groups + optimizer.param_groups:
        group["eps"] = 1e-3
    optim.set_lr(optimizer, 1e-2)
    scaler = strategy.scaler(device, enabled=run in SCALED)
    scaler.set_growth_interval(2)
    found: dict[str, Any] = {"losses": [], "norms": [], "scales": []}
    for step in range(STEPS):
        total = 0.0
        for micro in range(ACCUM):
            last = step == STEPS - 1 and micro == ACCUM - 1
            samples = share(batch_of(step * ACCUM + micro), last)
            context = strategy.no_sync(wrapped) if micro < ACCUM - 1 else memoryless()
            with context:
                loss = wrapped(samples)["loss"]
                if run in SCALED and step == BAD_STEP and dist.rank() == dist.world_size() - 1:
                    loss = loss * float("nan")
                if step == 0 and name == "fsdp2":
                    found["frozen"] = frozen_parts(model)
                scaler.scale(loss / ACCUM).backward()
            total += dist.reduce_mean({"loss": loss})["loss"] / ACCUM
        found["losses"].append(total)
        scaler.unscale_(optimizer)
        found["norms"].append(float(strategy.clip_gradients(optimizer, 1.0)))
        found["scales"].append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if step == 1:
            found["alone"] = alone(strategy, wrapped, model, batch_of)
            if case == "stage1":
                found["retrieval"] = retrieval(strategy, wrapped, model, folder)
    found["weights"] = strategy.model_tensors(model)
    found["moments"] = strategy.optimizer_tensors(optimizer)
    return found


def frozen_parts(model: nn.Module) -> list[tuple[str, int, int, int]]:
    """Of every frozen weight of a block: dtype, first dimension, all numbers, those that this rank has now."""
    frozen = [p for block in transformer_blocks(model) for p in block.parameters() if not p.requires_grad]
    return [
        (str(p.dtype), len(p), p.numel(), (p.to_local() if isinstance(p, DTensor) else p).numel())
        for p in frozen
    ]


@torch.no_grad()
def alone(strategy: Any, wrapped: nn.Module, model: nn.Module, batch_of: Callable[[int], Any]) -> float:
    """A held-out loss, between two steps; every rank evaluates another number of batches."""
    with strategy.whole(wrapped), dist.local():
        model.eval()
        values = [float(model(batch_of(100))["loss"]) for _ in range(1 + int(os.environ["RANK"]))]
        model.train()
    return values[0]


def retrieval(strategy: Any, wrapped: nn.Module, model: nn.Module, folder: Path) -> dict[str, float]:
    """What a run's evaluation does of more than forward passes: halves of pairs, and files of what is scored."""
    data = Pictures(7)
    data.pixels = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    data.texts = [[words] for words in (*WORDS, "a cat runs")]
    task = ImageTextPretrainTask(k_test=3, loss_batches=0, num_examples=0)
    args = EvalArgs(batch_size=2, folder=folder.with_suffix(".evaluation"), label="test")
    with strategy.whole(wrapped):
        return task.evaluate(model, data, loader_args=args).metrics


class memoryless:
    """Where gradients are exchanged."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def ranks(world: int) -> Iterator[int]:
    """Fork one process per rank, and yield its rank in each; in the parent nothing, when all have ended well."""
    port, children = str(free_port()), []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ.update(
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(world), RANK=str(rank)
            )
            os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
            yield rank
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert not any(statuses), statuses


@contextlib.contextmanager
def ending_on_error() -> Iterator[None]:
    """Around what a forked rank does: an error ends it at once, and never runs what belongs to its parent."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(folder: Path, only: str | None = None) -> None:
    losses.sample_negatives = hardest
    for case in CASES:  # what models and optimisers import late, imported once and not in every rank
        build(case, folder / "imports")
    for run, (name, world, _) in {**RUNS, **SCALED}.items():
        if only not in (None, name):
            continue
        for rank in ranks(world):
            with ending_on_error():
                dist.init(2)
                for case in CASES if run in RUNS else [SCALED_CASE]:
                    found = train(run, case, folder / f"{run}.{rank}")
                    if rank == 0:
                        torch.save(found, folder / f"{run}.{case}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

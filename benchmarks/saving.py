"""How long training stands still for a checkpoint: gathered and written by one process, or by each its part.

    python benchmarks/saving.py --strategy fsdp2 --processes 2 --rounds 5 [--folder DIR] [--json result.json]

What is saved is a Q-Former of BERT-base size with AdamW's moments (1.8 GB) below a tiny image encoder. In each round
every way saves once: `whole` gathers everything on the first process, which writes it; in `sharded` each process writes
its part; `behind` does that while training could go on. "Stands still" is the time until `save` returns on the slowest
process, "written" until the checkpoint is complete. The median over rounds, and its ratio to `whole`. The disk decides
much of it: name the one that you mean with --folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timing import run_processes, show, surroundings

from lavis_lite.common import dist
from lavis_lite.common.run_config import RunConfig
from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.parallel.base import build_strategy, trained
from lavis_lite.runners.saving import CheckpointSaver

WAYS: dict[str, dict[str, Any]] = {
    "whole": {"save_format": "whole", "save_async": False},
    "sharded": {"save_format": "sharded", "save_async": False},
    "behind": {"save_format": "sharded", "save_async": True},
}
ENCODER = {"name": "shapes_vit", "width": 64, "depth": 1, "num_heads": 2, "image_size": 64}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One process's seconds by way: until save returned, and until all was written."""
    dist.init()
    device = torch.device("cpu")
    qformer = {"num_layers": args.layers, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072}
    model = Blip2QFormer.from_config(
        {"vision_encoder": ENCODER, "tokenizer": "shapes", "qformer": {**qformer, "num_query_token": 32}}
    )
    strategy = build_strategy(args.strategy)
    _, optimizer = strategy.prepare(model, device, betas=(0.9, 0.98), weight_decay=0.05, lr_layer_decay=1.0)
    for parameter in trained(optimizer):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    savers = {
        name: CheckpointSaver(args.folder / name, RunConfig(keep_last=1, **way), strategy, device)
        for name, way in WAYS.items()
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {"still": [], "written": []} for name in WAYS}
    for number in range(1, args.rounds + 1):
        for name in WAYS if number % 2 else reversed(WAYS):
            dist.barrier()
            began = time.perf_counter()
            savers[name].save(number, model, optimizer, {}, best_step=None)
            dist.barrier()
            seconds[name]["still"].append(time.perf_counter() - began)
            savers[name].wait()
            dist.barrier()
            seconds[name]["written"].append(time.perf_counter() - began)
    for saver in savers.values():
        saver.close()
    size = sum(p.numel() for p in model.parameters() if p.requires_grad) * 12
    dist.shutdown()
    return {"seconds": seconds, "bytes": size}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table and the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strategy", choices=["ddp", "fairscale", "fsdp2"], default="fsdp2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary one")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        command = [sys.executable, __file__, "--worker", "--folder", folder, "--strategy", args.strategy]
        command += ["--layers", str(args.layers), "--rounds", str(args.rounds)]
        part = run_processes(command, args.processes)[0]
    result: dict[str, Any] = {"strategy": args.strategy, "processes": args.processes, **surroundings()}
    result |= {"gigabytes": part["bytes"] / 1e9, "ways": {}}
    print(f"{'':10}{'stands still':>14}{'written':>10}{'whole / still':>15}")
    for name, own in part["seconds"].items():
        still, written = (statistics.median(own[key]) for key in ("still", "written"))
        pairs = zip(part["seconds"]["whole"]["still"], own["still"], strict=True)
        ratio = statistics.median(whole / mine for whole, mine in pairs)
        result["ways"][name] = {"still_s": still, "written_s": written, "ratio": ratio, "all": own}
        print(f"{name:10}{still:12.2f} s{written:8.2f} s{ratio:14.1f}x")
    show(result, args.json)


if __name__ == "__main__":
    main()

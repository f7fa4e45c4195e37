"""Images/s and peak memory of a stage against batch size, precision, strategy and processes; FLOP/s and their ceiling.

    python benchmarks/scaling.py --batch-sizes 16 64 --precisions fp32 bf16 --world-sizes 1 2 4 \\
        [--strategies ddp fsdp2 fairscale] [--device cuda] [--compile] [--profile] \\
        [--json result.json] [--picture scaling.png]

Every case is a run of its own of the project file (`--cfg-path`, by default the embedded stage 1), its weights drawn at
random, its batches random pictures with texts of full length. Several processes run each of the strategies, batch sizes
being per process. A step is forward, backward and AdamW; the median of `--steps` after two to warm up. FLOP are counted
by torch (`torch.utils.flop_counter`: matrix products, convolutions, attention; both passes), the ceiling is the
best of three sizes of square matrix products in the same precision on the same number of threads. `--profile` shows
what each case spends most time in: the share of the time in operators (kernels on a GPU) of a step. Processes share the
machine: where there are not as many cores as they need, more of them show what exchanging costs and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from timing import count_flop, run_processes, show, surroundings
from torch.profiler import ProfilerActivity, profile

from lavis_lite.common import dist
from lavis_lite.common.config import load_config
from lavis_lite.common.device import autocast
from lavis_lite.common.registry import registry
from lavis_lite.parallel.base import build_strategy
from lavis_lite.runners.compiling import compile_blocks
from lavis_lite.runners.planning.runtime import resident_bytes
from lavis_lite.runners.planning.shapes import Shape, WordTokens, image_size_of, offline_section

STAGE1 = Path(__file__).resolve().parents[1] / "projects" / "blip2" / "pretrain_stage1.yaml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's


def build(cfg_path: str, options: Sequence[str], device: torch.device) -> Shape:
    """The model of a project file at random, with what makes its batches."""
    config = load_config(cfg_path, options)
    model_class = registry.get_model_class(config.model["arch"])
    torch.manual_seed(config.run.seed)
    with offline_section(model_class, config.model) as section:
        model = model_class.from_config(section).to(device).train()
    if hasattr(model, "language_model"):
        model.language_model.tokenizer = WordTokens(model.language_model.model.config)
    return Shape(model, contextlib.nullcontext(), image_size_of(config, model), model.max_txt_len)


def ceiling(device: torch.device, precision: str) -> float:
    """FLOP/s of the best of three sizes of square matrix products."""
    best = 0.0
    for size in (512, 1024, 2048) if device.type == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
        seconds = []
        for _ in range(3):
            _wait(device)
            began = time.perf_counter()
            a @ b
            _wait(device)
            seconds.append(time.perf_counter() - began)
        best = max(best, 2 * size**3 / min(seconds))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def largest_items(step: Callable[[], None], device: torch.device, number: int = 3) -> list[tuple[str, float]]:
    """The operators, or kernels on a GPU, in which a step spends most time, with their shares of it."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        step()
    times = {
        item.key: item.self_device_time_total if on_gpu else item.self_cpu_time_total
        for item in profiler.key_averages()
    }
    total = sum(times.values())
    ordered = sorted(times.items(), key=lambda entry: -entry[1])
    return [(name, spent / total) for name, spent in ordered[:number]]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One process's part of a case."""
    dist.init()
    device = torch.device(args.device)
    batch, precision = args.batch_sizes[0], args.precisions[0]
    shape = build(args.cfg_path, args.options, device)
    if args.compile:
        compile_blocks(shape.model, device)
    strategy = build_strategy(args.strategies[0])
    wrapped, optimizer = strategy.prepare(shape.model, device, betas=(0.9, 0.98), weight_decay=0.05)
    wrapped.train()
    samples = shape.samples(batch)
    samples["image"] = samples["image"].normal_().to(device)

    def step() -> None:
        with autocast(device, precision):
            loss = wrapped(samples)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)

    with count_flop() if not args.compile else contextlib.nullcontext() as counter:
        step()
    step()
    seconds = []
    for _ in range(args.steps):
        dist.barrier()
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    result = {
        "seconds": statistics.median(seconds),
        "flop": counter.get_total_flops() if counter is not None else None,
        "peak_bytes": torch.cuda.max_memory_reserved()
        if device.type == "cuda"
        else resident_bytes(peak=True),
    }
    if args.profile:
        result["largest_items"] = largest_items(step, device)
    if dist.is_main():
        result["ceiling"] = ceiling(device, precision)
    dist.barrier()
    dist.shutdown()
    return result


def run_case(
    args: argparse.Namespace, batch: int, precision: str, world_size: int, strategy: str
) -> dict[str, Any]:
    """A case in processes of its own."""
    command = [sys.executable, __file__, "--worker", "--batch-sizes", str(batch), "--precisions", precision]
    command += ["--strategies", strategy]
    command += ["--cfg-path", args.cfg_path, "--device", args.device, "--steps", str(args.steps)]
    command += ["--compile"] * args.compile + ["--profile"] * args.profile
    command += ["--options", *args.options] if args.options else []
    parts = run_processes(command, world_size)
    seconds = max(part["seconds"] for part in parts)
    flop, top = parts[0]["flop"], parts[0]["ceiling"]
    case = {
        "batch_size": batch,
        "precision": precision,
        "world_size": world_size,
        "strategy": strategy,
        "seconds": seconds,
        "images_per_s": batch * world_size / seconds,
        "peak_bytes": max(part["peak_bytes"] for part in parts),
        "gflop_a_process": flop and flop / 1e9,
        "ceiling_gflop_per_s": top / 1e9,
    }
    if flop:
        case |= {"gflop_per_s": flop / seconds / 1e9, "of_ceiling": flop / seconds / top}
    if args.profile:
        case["largest_items"] = parts[0]["largest_items"]
    return case


def draw(cases: Sequence[dict[str, Any]], file: Path) -> None:
    """Images/s and peak memory over the batch size, a line for each precision, number of processes and strategy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    groups = list(dict.fromkeys(_line_of(case) for case in cases))
    for axes, key, title, unit in zip(
        panels,
        ("images_per_s", "peak_bytes"),
        ("Images/s", "Peak memory a process, GB"),
        (1, 1e9),
        strict=True,
    ):
        for (style, colour), label in zip(product(("-", "--", ":"), COLOURS), groups, strict=False):
            own = [case for case in cases if _line_of(case) == label]
            x, y = [case["batch_size"] for case in own], [case[key] / unit for case in own]
            axes.plot(x, y, style, marker="o", color=colour, label=label)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("batch size a process")
        axes.set_ylim(bottom=0)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
    figure.savefig(file)


def _line_of(case: dict[str, Any]) -> str:
    world, strategy = case["world_size"], case["strategy"]
    processes = "1 process" if world == 1 else f"{world} processes, {strategy}"
    return f"{case['precision']}, {processes}"


def _row(case: dict[str, Any]) -> str:
    numbers = [case["seconds"], case["images_per_s"], case["peak_bytes"] / 1e9]
    flops = [case["gflop_a_process"], case.get("gflop_per_s"), case["ceiling_gflop_per_s"]]
    return (
        f"{case['precision']:10}{case['strategy']:>10}{case['batch_size']:11}{case['world_size']:11}"
        + "".join(f"{n:11.2f}" for n in numbers)
        + "".join(f"{n:11.1f}" if n is not None else f"{'-':>11}" for n in flops)
        + (f"{case['of_ceiling']:11.1%}" if "of_ceiling" in case else f"{'-':>11}")
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table and the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg-path", default=str(STAGE1))
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strategies", nargs="+", default=["ddp"], help="of several processes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="run.compile; FLOP are then not counted")
    parser.add_argument("--profile", action="store_true", help="what each case spends most time in")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    parser.add_argument("--picture", type=Path, help="draw the result there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        print(json.dumps(measure(args)))
        return
    result: dict[str, Any] = {"steps": args.steps, "device": args.device, "cores": os.cpu_count()}
    result |= {"compile": args.compile, **surroundings(), "cases": []}
    columns = ("batch", "processes", "s/step", "images/s", "peak GB", "GFLOP", "GFLOP/s", "ceiling", "share")
    print(f"{'precision':10}{'strategy':>10}" + "".join(f"{column:>11}" for column in columns))
    for world_size, precision, batch in product(args.world_sizes, args.precisions, args.batch_sizes):
        for strategy in args.strategies if world_size > 1 else ["single"]:
            case = run_case(args, batch, precision, world_size, strategy)
            result["cases"].append(case)
            print(_row(case), flush=True)
            if args.profile:
                items = ", ".join(f"{name} {share:.0%}" for name, share in case["largest_items"])
                print(f"{'':10}{items}", flush=True)
    show(result, args.json)
    if args.picture:
        draw(result["cases"], args.picture)


if __name__ == "__main__":
    main()

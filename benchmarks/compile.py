"""What run.compile gains: training steps of stage 1 or 2, plain against compiled, alternating in one process.

    python benchmarks/compile.py --batch-size 64 --rounds 5 [--cfg-path ...] [--precision bf16] [--json result.json]

Both sides have the same random weights and see the same batch (random pictures, texts of full length); their losses
must agree before anything is timed, and the time of compiling is told apart. A ratio is plain / compiled: above 1 where
compiling gains.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scaling import STAGE1, build
from timing import show, surroundings, time_alternately
from torch import Tensor

from lavis_lite.common.device import autocast
from lavis_lite.runners.compiling import compile_blocks


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table and the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg-path", default=str(STAGE1))
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result there, too")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    sides = {name: build(args.cfg_path, args.options, device) for name in ("plain", "ours")}
    blocks = compile_blocks(sides["ours"].model, device)
    if not blocks:
        raise SystemExit("nothing was compiled: there is nothing to measure")
    samples = sides["plain"].samples(args.batch_size)
    samples["image"] = samples["image"].normal_().to(device)

    def step_of(name: str) -> Callable[[], Tensor]:
        model = sides[name].model

        def step() -> Tensor:
            torch.manual_seed(0)
            model.zero_grad(set_to_none=True)
            with autocast(device, args.precision):
                loss: Tensor = model(samples)["loss"]
            loss.backward()
            return loss.detach()

        return step

    steps = {name: step_of(name) for name in sides}
    began = time.perf_counter()
    losses = {"ours": float(steps["ours"]())}
    compiling = time.perf_counter() - began
    losses["plain"] = float(steps["plain"]())
    steps["ours"]()
    difference = abs(losses["plain"] - losses["ours"])
    if args.precision == "fp32" and difference > 1e-3:
        raise SystemExit(f"losses differ by {difference:.1e}: the timing would compare different things")
    result: dict[str, Any] = {"batch_size": args.batch_size, "precision": args.precision, "blocks": blocks}
    result |= {"rounds": args.rounds, "loss_difference": difference, "first_step_seconds": compiling}
    result |= {**surroundings(), **time_alternately(steps, args.rounds)}
    seconds, (low, high) = result["seconds"], result["ratio_range"]
    print(
        f"plain {seconds['plain']:.3f} s, compiled {seconds['ours']:.3f} s a step: {result['ratio']:.2f}x "
        f"({low:.2f} to {high:.2f}), {result['ratio_cpu_time']:.2f}x in CPU time; first step {compiling:.0f} s"
    )
    show(result, args.json)


if __name__ == "__main__":
    main()

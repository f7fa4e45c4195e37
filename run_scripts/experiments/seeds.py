"""Trains one configuration with several seeds and reports mean and spread of its metrics.

    python run_scripts/experiments/seeds.py --cfg-path projects/blip2/pretrain_stage1.yaml --seeds 0 1 2 \
        --metrics val/itc/tr_r1 val/itc/ir_r1 val/rerank/tr_r1 val/rerank/ir_r1 --options run.max_steps=1500

Each seed has a folder of its own below --out and is resumed when the command is given again; finished ones only
print. `--out` also gets seeds.json: the metrics of every seed, the command, the commit and the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg-path", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--metrics", nargs="+", help="those to show; by default all that were measured")
    parser.add_argument("--out", help="by default output/seeds_<name of the file>")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    out = Path(args.out or f"output/seeds_{Path(args.cfg_path).stem}")
    results = {seed: train(args.cfg_path, seed, out / str(seed), args.options) for seed in args.seeds}
    names = args.metrics or sorted(set.intersection(*(set(metrics) for metrics in results.values())))
    rows = {name: [metrics[name] for metrics in results.values()] for name in names}
    print("\n".join(table(rows)))
    facts = {"command": " ".join(sys.argv), **surroundings(), "seeds": args.seeds, "metrics": rows}
    (out / "seeds.json").write_text(json.dumps(facts, indent=1) + "\n")


def train(cfg_path: str, seed: int, folder: Path, options: list[str]) -> dict[str, float]:
    """The final metrics of one seed's run."""
    run("train.py", cfg_path, folder, [*options, f"run.seed={seed}"])
    metrics: dict[str, float] = json.loads((folder / "summary.json").read_text())["metrics"]
    return metrics


def run(script: str, cfg_path: str, folder: Path, options: Sequence[str]) -> None:
    """Run train.py or evaluate.py; it resumes, or returns at once, where it has been before."""
    command = [sys.executable, str(REPOSITORY / script), "--cfg-path", cfg_path, "--options"]
    call([*command, *options, f"run.output_dir={folder}"])


def call(command: Sequence[str]) -> None:
    """Run a command; where it fails, or Ctrl-C ends it, its own last line has said why, and this ends as it does."""
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = process.wait() or 130  # it was told, too, and saves
    if code:
        sys.exit(code)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, the latter 0 of one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(rows: dict[str, list[float]]) -> list[str]:
    """Mean, standard deviation and range of each metric."""
    width = max(map(len, rows))
    lines = [f"{'metric':<{width}}    mean      sd     min     max"]
    for name, values in rows.items():
        numbers = (*spread(values), min(values), max(values))
        lines.append(f"{name:<{width}}  " + "  ".join(f"{number:6.3f}" for number in numbers))
    return lines


def surroundings() -> dict[str, Any]:
    """The commit and the machine that a figure was seen on."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}


if __name__ == "__main__":
    main()

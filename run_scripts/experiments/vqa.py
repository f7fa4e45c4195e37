"""What the picture, fine-tuning and the question in the Q-Former are each worth for VQA on the embedded world.

    python run_scripts/experiments/vqa.py --seeds 0 1 2

Four arms on the test split: blind (the visual prompt of stage 2 is zero), zero-shot (stage 2 as it is), fine-tuned
without and with the question in the Q-Former. The first two have nothing random and are evaluated once; the others are
trained with every seed, from the same two checkpoints. Needs output/pretrain_stage1 and output/pretrain_stage2. Each
run has a folder of its own below --out and is resumed when the command is given again. `--out` gets vqa.json (all
metrics, the command, the commit and the machine) and vqa.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seeds import REPOSITORY, run, spread, surroundings

ZERO_SHOT = "projects/blip2/vqa_zeroshot.yaml"
FINE_TUNED = "projects/blip2/vqa_ft.yaml"
BLIND = "run_scripts/experiments/vqa_blind.yaml"
METRICS = {
    "test/accuracy": "all",
    "test/answer_type/yes_no": "yes/no",
    "test/answer_type/number": "number",
    "test/answer_type/other": "other",
}


@dataclass(frozen=True)
class Arm:
    """One way to come to answers. options: laid over the project file. trained: by every seed, else only evaluated."""

    title: str
    cfg_path: str
    options: tuple[str, ...] = ()
    trained: bool = False


ARMS = {
    "blind": Arm("blind", BLIND),
    "zero_shot": Arm("zero-shot", ZERO_SHOT),
    "unconditioned": Arm(
        "fine-tuned",
        FINE_TUNED,
        ("model.qformer_text_input=false", "model.qformer_text_from=null"),
        trained=True,
    ),
    "conditioned": Arm("fine-tuned, question in the Q-Former", FINE_TUNED, trained=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("output/vqa"))
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="KEY=VALUE", help="for every run of every arm"
    )
    args = parser.parse_args()
    results = {name: run_arm(name, args.seeds, args.out, args.options) for name in args.arms}
    print("\n".join(table(results)))
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"command": " ".join(sys.argv), **surroundings(), "seeds": args.seeds, "arms": results}
    (args.out / "vqa.json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(results, args.out / "vqa.svg")


def run_arm(
    name: str, seeds: Sequence[int], out: Path, options: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Metrics of an arm by seed, "-" where nothing is random."""
    arm = ARMS[name]
    if not arm.trained:
        return {"-": evaluate(arm, out / name, options)}
    results = {}
    for seed in seeds:
        folder = out / name / str(seed)
        command("train.py", arm, folder, [*options, f"run.seed={seed}"])
        # The run's own weights, the text side among them, and not those it began with.
        results[str(seed)] = evaluate(arm, folder, [*options, f"model.pretrained={folder}"])
    return results


def evaluate(arm: Arm, folder: Path, options: Sequence[str]) -> dict[str, float]:
    """The metrics of the test split."""
    command("evaluate.py", arm, folder, options)
    metrics: dict[str, float] = json.loads((folder / "evaluation" / "metrics.json").read_text())["metrics"]
    return metrics


def command(script: str, arm: Arm, folder: Path, options: Sequence[str]) -> None:
    """Run one of the repository's commands for an arm."""
    run(script, str(REPOSITORY / arm.cfg_path), folder, [*arm.options, *options])


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Mean and standard deviation of each accuracy, an arm a line."""
    width = max(len(ARMS[name].title) for name in results)
    lines = [f"{'accuracy':<{width}}  " + "  ".join(f"{title:>13}" for title in METRICS.values()) + "  seeds"]
    for name, runs in results.items():
        cells = []
        for metric in METRICS:
            mean, deviation = spread([metrics[metric] for metrics in runs.values()])
            cells.append(f"{mean:.3f} ± {deviation:.3f}" if len(runs) > 1 else f"{mean:.3f}")
        seeds = str(len(runs)) if ARMS[name].trained else "-"
        lines.append(
            f"{ARMS[name].title:<{width}}  " + "  ".join(f"{c:>13}" for c in cells) + f"  {seeds:>5}"
        )
    return lines


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Bars of the mean accuracies by answer type, with the standard deviation over seeds."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 3.6), layout="constrained")
    width = 0.8 / len(results)
    for number, (name, runs) in enumerate(results.items()):
        values = ([metrics[metric] for metrics in runs.values()] for metric in METRICS)
        means, deviations = zip(*map(spread, values), strict=True)
        places = [place + (number - (len(results) - 1) / 2) * width for place in range(len(METRICS))]
        axes.bar(places, means, width, yerr=deviations, capsize=2, label=ARMS[name].title)
    axes.set_xticks(range(len(METRICS)), list(METRICS.values()))
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy (test)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, format="svg")


if __name__ == "__main__":
    main()

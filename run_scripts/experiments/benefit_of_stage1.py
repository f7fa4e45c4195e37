"""What stage 1 is worth to stage 2 (the paper's figure 5): captions over steps with and without it.

    python train.py --cfg-path projects/blip2/pretrain_stage1.yaml
    python run_scripts/experiments/benefit_of_stage1.py --cfg-path projects/blip2/pretrain_stage2.yaml \
        --out output/benefit_opt --picture docs/benefit_of_stage1_opt.svg

Both arms have the same configuration, data, draws and seeds; they differ in `model.pretrained` alone. Every run has a
folder of its own below --out and is resumed when the command is given again; finished ones only print. `--out`
also gets benefit.json: every curve, the command, the commit and the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure
from seeds import spread, surroundings, train

ARMS = {"with stage 1": "{stage1}", "without": "null"}
METRICS = {"cider": "CIDEr", "objects_right": "Objects right", "objects_named": "Objects named"}
COLOURS = {"with stage 1": "#0072B2", "without": "#D55E00"}

# metric -> step -> values of all seeds
Curves = dict[str, dict[int, list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg-path", required=True)
    parser.add_argument("--stage1", default="output/pretrain_stage1", help="the stage-1 run to begin with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="output/benefit_of_stage1")
    parser.add_argument("--picture", help="write the curves there (.svg or .png)")
    parser.add_argument("--options", nargs="+", default=["run.eval_every=100"], metavar="KEY=VALUE")
    args = parser.parse_args()
    out = Path(args.out)
    curves = {}
    for arm, pretrained in ARMS.items():
        options = [*args.options, f"model.pretrained={pretrained.format(stage1=args.stage1)}"]
        folders = [out / arm.replace(" ", "_") / str(seed) for seed in args.seeds]
        for seed, folder in zip(args.seeds, folders, strict=True):
            train(args.cfg_path, seed, folder, options)
        curves[arm] = read_curves(folders)
    print("\n".join(table(curves)))
    facts = {"command": " ".join(sys.argv), **surroundings(), "seeds": args.seeds, "curves": curves}
    (out / "benefit.json").write_text(json.dumps(facts, indent=1) + "\n")
    if args.picture:
        draw(curves).savefig(args.picture, bbox_inches="tight", metadata={"Date": None})


def read_curves(folders: list[Path]) -> Curves:
    """The held-out metrics in the logs of one arm's runs."""
    curves: Curves = {name: {} for name in METRICS}
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for row in rows:
            if row["kind"] == "eval":
                for name, points in curves.items():
                    points.setdefault(row["step"], []).append(row[f"val/{name}"])
    return curves


def table(curves: dict[str, Curves]) -> list[str]:
    """Markdown: mean and standard deviation over seeds of both arms at every step."""
    head = ["step", *(f"{title}, {arm}" for title in METRICS.values() for arm in curves)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for step in sorted(next(iter(curves.values()))["cider"]):
        cells = [said(curves[arm][name][step]) for name in METRICS for arm in curves]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return lines


def said(values: list[float]) -> str:
    """Mean and spread of one cell."""
    mean, deviation = spread(values)
    return f"{mean:.3f} ± {deviation:.3f}"


def draw(curves: dict[str, Curves]) -> Figure:
    """A panel for each metric; a line is the mean over seeds, its band their range."""
    figure = Figure(figsize=(3.4 * len(METRICS), 2.8), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        for arm, own in curves.items():
            steps = sorted(own[name])
            values = [own[name][step] for step in steps]
            axes.plot(steps, [statistics.mean(v) for v in values], color=COLOURS[arm], label=arm, marker=".")
            low, high = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(steps, low, high, color=COLOURS[arm], alpha=0.2, linewidth=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("stage-2 steps")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()

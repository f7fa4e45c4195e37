"""What the frames of a clip are worth on the embedded world, by type of question.

    python run_scripts/experiments/video.py --seeds 0 1 2

Three arms are trained as projects/blip2/video_ft.yaml says, from the same two checkpoints: four frames joined one after
the other, four frames averaged (which forgets their order), and one frame, the middle one. Beside them stands the
training answers' majority for each form of question. Direction, places in time and order can't be told from the middle
frame; the colour of an object, for comparison, can. Needs output/pretrain_stage1 and output/pretrain_stage2. Each run
has a folder of its own below --out and is resumed when the command is given again. `--out` gets video.json: all
accuracies of the test split, the command, the commit and the machine.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from seeds import REPOSITORY, run, spread, surroundings

from lavis_lite.datasets.builders import build_dataset_from_preset
from lavis_lite.worlds.shapes.clip_texts import CLIP_TYPES
from lavis_lite.worlds.shapes.words import COLOUR_PATTERN, SHAPE_PATTERN

CONFIG = REPOSITORY / "projects/blip2/video_ft.yaml"
DATASET = "shapes_video_vqa"
FRAMES = f"datasets.{DATASET}.vis_processor"
# Title and options of each arm.
ARMS: dict[str, tuple[str, list[str]]] = {
    "clip": ("four frames", []),
    "mean": ("four frames, averaged", ["model.video.join=mean", "model.video.frame_embeddings=0"]),
    "frame": (
        "the middle frame",
        [
            "model.video.frame_embeddings=0",
            f"{FRAMES}.train.num_frames=1",
            f"{FRAMES}.train.sampling=uniform",
            f"{FRAMES}.eval.num_frames=1",
        ],
    ),
}
Scores = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("output/video"))
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="for every run")
    args = parser.parse_args()
    results = {"majority": [majority()]}
    for arm in args.arms:
        results[arm] = [train(arm, seed, args.out / arm / str(seed), args.options) for seed in args.seeds]
    print("\n".join(table(results)))
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"command": " ".join(sys.argv), **surroundings(), "seeds": args.seeds, "arms": results}
    (args.out / "video.json").write_text(json.dumps(facts, indent=1) + "\n")


def train(arm: str, seed: int, folder: Path, options: Sequence[str]) -> Scores:
    """Accuracies of the test split after an arm's training with a seed."""
    given = [*ARMS[arm][1], *options]
    run("train.py", str(CONFIG), folder, [*given, f"run.seed={seed}"])
    # The run's own weights, the text side among them, and not those it began with.
    run("evaluate.py", str(CONFIG), folder, [*given, f"model.pretrained={folder}"])
    metrics: dict[str, Any] = json.loads((folder / "evaluation" / "metrics.json").read_text())["metrics"]
    scores = {kind: metrics[f"test/question_type/{kind}"] for kind in CLIP_TYPES}
    return {"all": metrics["test/accuracy"], **scores}


def majority() -> Scores:
    """Accuracies of always giving the answer that training has most often for a question of the same form."""
    splits = build_dataset_from_preset(DATASET)
    told: dict[str, Counter[str]] = {}
    for _, form, answer in _questions(splits["train"]):
        told.setdefault(form, Counter())[answer] += 1
    right: dict[str, list[float]] = {}
    for kind, form, answer in _questions(splits["test"]):
        right.setdefault(kind, []).append(float(told[form].most_common(1)[0][0] == answer))
    return {
        "all": mean(hit for hits in right.values() for hit in hits),
        **{kind: mean(hits) for kind, hits in right.items()},
    }


def _questions(dataset: Any) -> list[tuple[str, str, str]]:
    """Type, form (the question without what names an object) and answer of every row."""
    asked = (dataset.record(row).question for row in range(len(dataset)))
    names = rf"\b({COLOUR_PATTERN}|{SHAPE_PATTERN})\b"
    return [(str(item.question_type), re.sub(names, "x", item.text), item.answers[0]) for item in asked]


def table(results: Mapping[str, Sequence[Scores]]) -> list[str]:
    """Mean and standard deviation over seeds, an arm a line."""
    columns = ["all", *CLIP_TYPES]
    titles = {"majority": "majority", **{name: title for name, (title, _) in ARMS.items()}}
    width = max(len(titles[name]) for name in results)
    lines = [f"{'accuracy':<{width}}  " + "  ".join(f"{column:>13}" for column in columns) + "  seeds"]
    for name, runs in results.items():
        cells = []
        for column in columns:
            average, deviation = spread([scores[column] for scores in runs])
            cells.append(f"{average:.3f} ± {deviation:.3f}" if len(runs) > 1 else f"{average:.3f}")
        seeds = "-" if name == "majority" else str(len(runs))
        lines.append(f"{titles[name]:<{width}}  " + "  ".join(f"{c:>13}" for c in cells) + f"  {seeds:>5}")
    return lines


if __name__ == "__main__":
    main()

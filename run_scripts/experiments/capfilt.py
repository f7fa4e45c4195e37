"""What CapFilt does to noisy captions of the embedded world, where it can be told which captions are true.

    python run_scripts/experiments/capfilt.py --seeds 0 1 2 --ranker blip2/shapes:output/stage1/{seed} \
        --captioner blip2_opt/shapes:output/pretrain_stage2

Each seed: of some training pictures one caption each, as from the web; a share of them is replaced by captions of other
pictures; CapFilt samples others and ranks all. A caption is true when its picture could be the one it describes
(`parse.consistent`), whoever wrote it; what is half right is judged by the objects it names. Reported, as mean and
spread over seeds: which wrong and which true web captions are left out, and what captions are like before and after.
`--train` goes on: stage 1 on the noisy, the filtered and the true captions, and what it has learned by the end. Every
run has a folder below --out and is resumed when the command is given again. `--out` also gets capfilt.json: all
figures, the command, the commit and the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seeds import REPOSITORY, call, spread, surroundings, train

from lavis_lite.common.io import atomic_write
from lavis_lite.worlds.shapes.caption_task import Objects, object_shares
from lavis_lite.worlds.shapes.parse import consistent, parse
from lavis_lite.worlds.shapes.scene import Scene, sample_scene
from lavis_lite.worlds.shapes.writer import WorldSpec, write_world

STAGE1 = str(REPOSITORY / "projects/blip2/pretrain_stage1.yaml")
LEARNED = ("val/rerank/r1_mean", "val/itc/r1_mean", "val/itc/tr_r1", "val/itc/ir_r1")
ARMS = ("noisy", "filtered", "true")


@dataclass(frozen=True)
class Noisy:
    """A seed's web captions. rows: {"image", "caption", "image_id"}. true_captions: what no noise was put into."""

    folder: Path
    images: Path
    rows: list[dict[str, Any]]
    true_captions: list[str]
    scenes: list[Scene]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--captioner", default="blip2_opt/shapes:output/pretrain_stage2")
    parser.add_argument("--ranker", default="blip2/shapes:output/stage1/{seed}")
    parser.add_argument("--rank-by", default="itc", choices=("itc", "itm"))
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument(
        "--noise", type=float, default=0.4, help="share of captions that are another picture's"
    )
    parser.add_argument("--num-captions", type=int, default=10)
    parser.add_argument("--keep", type=int, default=2)
    parser.add_argument(
        "--train", action="store_true", help="also train stage 1 on all three kinds of captions"
    )
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="for training")
    parser.add_argument("--out", type=Path, default=Path("output/capfilt"))
    args = parser.parse_args()
    found: dict[int, dict[str, float]] = {}
    for seed in args.seeds:
        noisy = write_noisy(args.out / str(seed), seed, args.pictures, args.noise)
        candidates = filter_captions(noisy, seed, args)
        found[seed] = measure(noisy, candidates, args.keep)
        if args.train:
            write_arms(noisy, candidates, args.keep)
            found[seed] |= learn(noisy, seed, args.options)
    rows = {name: [found[seed][name] for seed in args.seeds] for name in found[args.seeds[0]]}
    print("\n".join(table(rows)))
    facts = {"command": " ".join(sys.argv), **surroundings(), "seeds": args.seeds, "figures": rows}
    atomic_write(args.out / "capfilt.json", json.dumps(facts, indent=1) + "\n")


def write_noisy(folder: Path, seed: int, pictures: int, noise: float) -> Noisy:
    """The world's first training pictures with a caption each, right or of another picture; the file noisy.jsonl."""
    spec = WorldSpec()
    world = write_world(spec)
    content = json.loads((world / "annotations" / "captions_train.json").read_text())
    captions: dict[int, str] = {}
    for row in content["annotations"]:
        captions.setdefault(row["image_id"], row["caption"])
    images = content["images"][:pictures]
    true_captions = [captions[image["id"]] for image in images]
    rng = random.Random(seed)
    rows = []
    for at, image in enumerate(images):
        other = (at + rng.randrange(1, pictures)) % pictures
        caption = true_captions[other if rng.random() < noise else at]
        rows.append({"image": image["file_name"], "caption": caption, "image_id": image["id"]})
    write_lines(folder / "noisy.jsonl", rows)
    scenes = [sample_scene(seed=spec.seed, split="train", index=at) for at in range(pictures)]
    return Noisy(folder, world / "images" / "train", rows, true_captions, scenes)


def filter_captions(noisy: Noisy, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """CapFilt's annotations with all candidates kept, best first: fewer are the first of them."""
    out = noisy.folder / "capfilt"
    command = [sys.executable, "-m", "lavis_lite.cli", "capfilt", "--no-tars", "--out", str(out)]
    command += ["--images", str(noisy.images), "--annotations", str(noisy.folder / "noisy.jsonl")]
    command += ["--captioner", args.captioner.format(seed=seed), "--ranker", args.ranker.format(seed=seed)]
    command += ["--rank-by", args.rank_by, "--seed", str(seed), "--max-length", "30", "--shard-size", "100"]
    command += ["--num-captions", str(args.num_captions), "--keep", str(args.num_captions + 1)]
    call([*command, "--batch-size", "50"])
    return [json.loads(line) for line in (out / "annotations.jsonl").read_text().splitlines()]


def measure(noisy: Noisy, candidates: Sequence[Mapping[str, Any]], keep: int) -> dict[str, float]:
    """How many wrong captions there were, are left out, and remain."""
    web = [is_true(row["caption"], scene) for row, scene in zip(noisy.rows, noisy.scenes, strict=True)]
    kept = ["web" in row["source"][:keep] for row in candidates]
    above = [row["source"].index("web") == 0 for row in candidates]
    judged = [
        [(is_true(text, scene), source) for text, source in zip(row["captions"], row["source"], strict=True)]
        for row, scene in zip(candidates, noisy.scenes, strict=True)
    ]
    objects = [Counter((item.colour, item.shape) for item in scene.objects) for scene in noisy.scenes]
    sampled = [true for own in judged for true, source in own if source == "synthetic"]
    stay = [true for own in judged for true, _ in own[:keep]]
    wrong_out = sum(not true and not stays for true, stays in zip(web, kept, strict=True))
    return {
        "web captions that are true": share(web),
        "sampled captions that are true": share(sampled),
        "kept captions that are true": share(stay),
        "wrong web captions left out (recall)": wrong_out / web.count(False),
        "left out web captions that are wrong (precision)": wrong_out / max(1, kept.count(False)),
        "true web captions kept": share([stays for true, stays in zip(web, kept, strict=True) if true]),
        "true web captions ranked first": share(
            [first for true, first in zip(web, above, strict=True) if true]
        ),
        "ranker: a true web caption scores above a wrong one": above_chance(web, candidates),
        "best caption is true": share([own[0][0] for own in judged]),
        "web captions: objects that are there": objects_right(
            [[row["caption"]] for row in noisy.rows], objects
        ),
        "sampled captions: objects that are there": objects_right(
            [
                [t for t, s in zip(row["captions"], row["source"], strict=True) if s != "web"]
                for row in candidates
            ],
            objects,
        ),
        "kept captions: objects that are there": objects_right(
            [row["captions"][:keep] for row in candidates], objects
        ),
    }


def is_true(text: str, scene: Scene) -> bool:
    """Whether a picture could be the one described; false for what can't be read.

    A model's text has no colon ("..., one of them large: two red stars"); it is put back.
    """
    try:
        return consistent(parse(re.sub(r"(of them large),?(?!:)\b", r"\1:", text.strip().lower())), scene)
    except ValueError:
        return False


def objects_right(texts: Sequence[Sequence[str]], scenes: Sequence[Objects]) -> float:
    """Mean over captions of the share of the objects named that are in the picture (`object_shares`)."""
    rights = [object_shares(text, scene)[0] for own, scene in zip(texts, scenes, strict=True) for text in own]
    return sum(rights) / len(rights)


def share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0


def above_chance(web: Sequence[bool], candidates: Sequence[Mapping[str, Any]]) -> float:
    """Of all pairs of a true and a wrong web caption the share that the score tells apart: the area under the ROC."""
    scores = [row["scores"][row["source"].index("web")] for row in candidates]
    ordered = sorted(zip(scores, web, strict=True))
    wrong_below = pairs = 0
    for _, true in ordered:
        pairs += wrong_below if true else 0
        wrong_below += not true
    return pairs / max(1, web.count(True) * web.count(False))


def write_arms(noisy: Noisy, candidates: Sequence[Mapping[str, Any]], keep: int) -> None:
    """filtered.jsonl, whose captions are drawn from in training, and true.jsonl."""
    filtered = [{**row, "captions": row["captions"][:keep]} for row in candidates]
    write_lines(noisy.folder / "filtered.jsonl", filtered)
    true = [{**row, "caption": caption} for row, caption in zip(noisy.rows, noisy.true_captions, strict=True)]
    write_lines(noisy.folder / "true.jsonl", true)


def learn(noisy: Noisy, seed: int, options: Sequence[str]) -> dict[str, float]:
    """What stage 1 learns of each kind of captions: recalls on the world's own validation split."""
    learned = {}
    for arm in ARMS:
        own = [
            "datasets.shapes_caption.train=0",
            f"datasets.web.train.annotations={noisy.folder / arm}.jsonl",
            f"datasets.web.train.images={noisy.images}",
        ]
        metrics = train(STAGE1, seed, noisy.folder / f"stage1_{arm}", [*own, *options])
        learned |= {
            f"stage 1 of {arm} captions, {name}": metrics[name] for name in LEARNED if name in metrics
        }
    return learned


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A jsonl file, left as it is when it says the same: a new one would be converted again."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.is_file() or path.read_text() != text:
        atomic_write(path, text)


def table(rows: Mapping[str, Sequence[float]]) -> list[str]:
    """Mean and standard deviation over seeds of each figure."""
    width = max(map(len, rows))
    return [
        f"{name:<{width}}  {mean:.3f} ± {sd:.3f}"
        for name, (mean, sd) in ((n, spread(v)) for n, v in rows.items())
    ]


if __name__ == "__main__":
    main()

"""Do explanations point at what a text names? The pointing game against the renderer's boxes of the embedded world.

    python run_scripts/experiments/seeds.py --cfg-path projects/blip2/pretrain_stage1.yaml --out output/stage1
    python run_scripts/experiments/pointing_game.py --models output/stage1/0 output/stage1/1 output/stage1/2

Pictures are of the test split, with two objects or more. A map hits when the centre of its brightest grid cell lies in
the box of the object named. Two games:
- phrases: a text names one object ("a red circle") that no other object of the picture is like;
- words: a caption lists all objects and the background, and every word for a colour or a shape has a map of its own;
  a third of the pictures.

Chance is the mean share of the picture that the boxes have; "the centre" points at the middle of every picture. Both
are of the pictures that Grad-CAM is measured on, of which occlusion gets the first few. "Some object" is the share of
maps that hit any object's box. `--out` gets a json file with the numbers of every model, the command, the commit and
the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from seeds import spread, surroundings
from torch import Tensor

from lavis_lite.api import load_model_and_preprocess
from lavis_lite.models.attention_maps import as_grid, attention_effects
from lavis_lite.worlds.shapes.captions import caption
from lavis_lite.worlds.shapes.render import render
from lavis_lite.worlds.shapes.scene import COLOURS, SHAPES, Scene, SceneObject, sample_scene
from lavis_lite.worlds.shapes.words import noun

# Title, and what it is called with; None: the ITM logit's Grad-CAM without a text to compare with.
WAYS: dict[str, dict[str, str] | None] = {
    "Grad-CAM, itg": {"method": "gradcam", "score": "itg"},
    "Grad-CAM, itm": {"method": "gradcam", "score": "itm"},
    "Grad-CAM, ITM logit alone": None,
    "occlusion, itg": {"method": "occlusion", "score": "itg"},
    "occlusion, itm": {"method": "occlusion", "score": "itm"},
    "attention": {"method": "attention"},
}
BATCH = 25

Point = tuple[float, float]


@dataclass(frozen=True)
class Case:
    """A picture, and the object that its text names."""

    scene: Scene
    named: SceneObject


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", required=True, metavar="RUN", help="stage-1 runs")
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument(
        "--covered", type=int, default=60, help="pictures for occlusion, which takes 64 times as long"
    )
    parser.add_argument("--out", type=Path, default=Path("output/pointing_game.json"))
    args = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {}
    for run in args.models:
        for name, value in play(run, args.pictures, args.covered):
            results.setdefault(name[0], {}).setdefault(name[1], []).append(value)
            print(f"{run}: {name[0]}: {name[1]} {value:.3f}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)  # after each model: what is measured is kept
        facts = {"command": " ".join(sys.argv), **surroundings(), "models": args.models, "hits": results}
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print("\n".join(table(results)))


def play(run: str, pictures: int, covered: int) -> Iterator[tuple[tuple[str, str], float]]:
    """Both games with one model: ((way, measure), value)."""
    model, processors, _ = load_model_and_preprocess("blip2", "shapes", is_eval=True, checkpoint=run)
    cases = phrase_cases(pictures)
    boxes = [case.named.box for case in cases]
    yield ("chance", "phrases"), statistics.mean(width * height for _, _, width, height in boxes)
    yield ("the centre", "phrases"), statistics.mean(inside((0.5, 0.5), box) for box in boxes)
    for way, keywords in WAYS.items():
        some = cases[: covered if way.startswith("occlusion") else None]
        yield from measured(way, "phrases", point_at_phrases(model, processors["eval"], some, keywords))
    # A third of the pictures: some 16 words each have a map, of which six count.
    scenes = list(itertools.islice(scenes_with_several(), max(1, pictures // 3)))
    named = [item for scene in scenes for item in scene.objects]
    yield ("chance", "words"), statistics.mean(item.box[2] * item.box[3] for item in named)
    yield ("the centre", "words"), statistics.mean(inside((0.5, 0.5), item.box) for item in named)
    for way, keywords in WAYS.items():
        if keywords is not None and keywords["method"] != "attention":
            some = scenes[: max(1, covered // 6) if keywords["method"] == "occlusion" else None]
            yield from measured(way, "words", point_at_words(model, processors["eval"], some, keywords))


def measured(
    way: str, game: str, points: Sequence[tuple[Point, Case]]
) -> Iterator[tuple[tuple[str, str], float]]:
    """Shares of the points in the box of the object named, and in that of any."""
    yield (way, game), statistics.mean(inside(point, case.named.box) for point, case in points)
    yield (
        (way, f"{game}, some object"),
        statistics.mean(
            any(inside(point, item.box) for item in case.scene.objects) for point, case in points
        ),
    )


def scenes_with_several() -> Iterator[Scene]:
    """The test split's pictures of two objects or more, no two of one colour and shape."""
    for index in itertools.count():
        scene = sample_scene(seed=0, split="test", index=index)
        kinds = {(item.colour, item.shape) for item in scene.objects}
        if len(kinds) == len(scene.objects) > 1:
            yield scene


def phrase_cases(number: int) -> list[Case]:
    """`number` pictures, with one of their objects each."""
    scenes = itertools.islice(scenes_with_several(), number)
    return [Case(scene, scene.objects[index % len(scene.objects)]) for index, scene in enumerate(scenes)]


def point_at_phrases(
    model: Any, processor: Any, cases: Sequence[Case], keywords: dict[str, str] | None
) -> list[tuple[Point, Case]]:
    """Where the map of each case's text is brightest."""
    points = []
    for start in range(0, len(cases), BATCH):
        some = cases[start : start + BATCH]
        image = torch.stack([processor(render(case.scene)) for case in some])
        texts = [noun(case.named) for case in some]
        if keywords is None:
            maps = logit_alone(model, image, texts)
        else:
            maps = torch.stack([found.map for found in model.explain(image, texts, **keywords)])
        points += [(brightest(own), case) for own, case in zip(maps, some, strict=True)]
    return points


def point_at_words(
    model: Any, processor: Any, scenes: Sequence[Scene], keywords: dict[str, str]
) -> list[tuple[Point, Case]]:
    """Where the maps of a listing's words for colours and shapes are brightest."""
    points = []
    for scene in scenes:
        image = processor(render(scene))[None]
        text = caption(scene, "listing", random.Random(0))
        (found,) = model.explain(image, text, per_word=True, **keywords)
        for names in (COLOURS, SHAPES):
            # A listing names the objects in the scene's order, each with its colour and its shape.
            words = [word for word in found.words if word.word in names]
            points += [
                (brightest(word.map), Case(scene, item))
                for word, item in zip(words, scene.objects, strict=True)
            ]
    return points


def logit_alone(model: Any, image: Tensor, texts: Sequence[str]) -> Tensor:
    """Grad-CAM of the ITM logit (match against no match) as it is."""
    with torch.no_grad():
        images = model.project_image(model.encode_image(image))

    def logit() -> Tensor:
        logits: Tensor = model.match_logits(images, model.tokenize(texts))
        return logits[:, 1] - logits[:, 0]

    return as_grid(attention_effects(model.Qformer, images, logit)[1].clamp(min=0).sum((0, 2, 3)))


def brightest(grid: Tensor) -> Point:
    """The centre (x, y) of the largest cell of [h, w], as fractions of the picture's sides."""
    row, column = divmod(int(grid.argmax()), grid.shape[1])
    return (column + 0.5) / grid.shape[1], (row + 0.5) / grid.shape[0]


def inside(point: Point, box: tuple[float, float, float, float]) -> bool:
    """Whether a point lies in a box (x, y, width, height)."""
    return all(low <= at <= low + size for at, low, size in zip(point, box[:2], box[2:], strict=True))


def table(results: dict[str, dict[str, list[float]]]) -> list[str]:
    """Markdown: mean and standard deviation over the models of each share of hits."""
    columns = ["phrases", "phrases, some object", "words", "words, some object"]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for way, own in results.items():
        cells = []
        for column in columns:
            values = own.get(column)
            fixed = way in ("chance", "the centre")
            mean, deviation = spread(values) if values else (0.0, 0.0)
            cells.append("-" if not values else f"{mean:.3f}" + ("" if fixed else f" ± {deviation:.3f}"))
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()

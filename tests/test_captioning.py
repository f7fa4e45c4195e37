from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from caption_world import Annotated, Captioner, measure, said
from data_helpers import save_picture
from test_report import EVIL, Page

from lavis_lite.common.binding import bind
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.builders import build_dataset_from_preset
from lavis_lite.metrics import coco_caption
from lavis_lite.processors.text import BlipCaption
from lavis_lite.tasks.base import EvalArgs, RunFacts
from lavis_lite.tasks.captioning import CaptioningTask
from lavis_lite.worlds.shapes.caption_task import ShapesCaptioningTask, mentioned, object_shares
from lavis_lite.worlds.shapes.captions import STYLES, caption, describe
from lavis_lite.worlds.shapes.scene import sample_scene
from tests.runner_helpers import run_ranks

QUICK = ["cider", "bleu", "rouge_l"]


def evaluate(
    data: Any, model: Any = None, *, final: bool = True, args: EvalArgs | None = None, **task: Any
) -> Any:
    task = {"metrics": QUICK, "loss_batch_size": 4, **task}
    arguments = args or EvalArgs(batch_size=5, max_bad_fraction=0.5)
    return CaptioningTask(**task).evaluate(model or Captioner(), data, loader_args=arguments, final=final)


# --- what is captioned and scored ---------------------------------------------------------------------------


def test_every_image_is_captioned_once_with_the_tasks_settings() -> None:
    model = Captioner()
    evaluation = evaluate(
        Annotated(), model, num_beams=2, max_new_tokens=20, min_length=3, prompt="a picture of"
    )
    assert sorted(row for call in model.calls for row in call["rows"]) == list(range(23))
    told = {"prompt": "a picture of", "num_beams": 2, "max_length": 20, "min_length": 3}
    assert all(call.items() >= told.items() for call in model.calls)
    rows = evaluation.details.rows
    assert [item.row for item in rows] == list(range(23)) and rows[2].prediction == said(2)
    assert evaluation.metrics["num_images"] == 23 and evaluation.metrics["num_references"] == 69
    assert model.training


def test_a_model_that_takes_no_prompt_gets_none() -> None:
    class Promptless(Captioner):
        takes_prompt = False

        def generate(self, samples: Any, **settings: Any) -> list[str]:
            assert "prompt" not in samples
            return super().generate({**samples, "prompt": ""}, **settings)

    model = Promptless()
    evaluate(Annotated(), model)
    assert model.calls


def test_scores_are_against_the_annotations_not_what_training_made_of_them() -> None:
    evaluation = evaluate(Annotated())
    rows = evaluation.details.rows
    assert rows[1].references == Annotated().record(1).captions and rows[1].references[1] == "A cat!"
    expected = coco_caption.score_by_group(
        [item.prediction for item in rows], [item.references for item in rows], Annotated().groups, QUICK
    )
    assert {name: evaluation.metrics[name] for name in expected} == expected
    assert {"cider_in_domain", "bleu_4_out_domain", "loss"} <= set(evaluation.metrics)


def test_predictions_are_on_the_disk_before_any_metric_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def look(*_: Any) -> dict[str, float]:
        seen.append(json.loads((tmp_path / "run" / "predictions_test.json").read_text(encoding="utf-8")))
        raise MemoryError("much later")

    for name in QUICK:
        monkeypatch.setitem(coco_caption.SCORERS, name, look)
    data = Annotated(unreadable=(4,))
    args = EvalArgs(batch_size=5, max_bad_fraction=0.5, folder=tmp_path / "run", label="test")
    evaluation = evaluate(data, args=args)
    assert evaluation.details.predictions == tmp_path / "run" / "predictions_test.json"
    assert len(seen) == 3 and len(seen[0]) == 22
    assert seen[0][:2] == [
        {"image_id": 100, "caption": said(0)},
        {"image_id": 101, "caption": "ein <b>Kätzchen</b> schläft"},
    ]
    assert "cider" not in evaluation.metrics and evaluation.metrics["unreadable_images"] == 1


def test_rows_of_one_picture_are_one_image_and_unnumbered_ones_go_by_path() -> None:
    data = Annotated()
    data.ids[7] = data.ids[2]
    data.ids[9] = None  # type: ignore[call-overload]
    data.load = lambda index, seed: {**Annotated().load(index, seed=seed)}  # type: ignore[method-assign]
    evaluation = evaluate(data)
    rows = {item.row: item for item in evaluation.details.rows}
    assert 7 not in rows and rows[2].references == data.texts[2] + data.texts[7]
    assert rows[9].image_id == "9.jpg" and evaluation.metrics["unreadable_images"] == 0


def test_mid_training_is_cheaper() -> None:
    model = Captioner()
    options = {"images_in_training": 6, "metrics": ["cider", "meteor"], "metrics_in_training": ["bleu"]}
    evaluation = evaluate(Annotated(), model, final=False, **options)
    assert sorted(row for call in model.calls for row in call["rows"]) == [0, 3, 7, 11, 15, 19]
    assert "bleu_4" in evaluation.metrics and "cider" not in evaluation.metrics
    assert evaluation.details.examples is None
    assert "cider" in evaluate(Annotated(), final=True).metrics


def test_two_processes_measure_and_write_what_one_does(tmp_path: Path) -> None:
    """23 images of which 2 can't be read, then one image for two processes."""
    alone = measure(tmp_path / "one")
    folder = tmp_path / "two"
    folder.mkdir()
    run_ranks([sys.executable, str(Path(__file__).with_name("caption_world.py")), str(folder)])
    assert len(alone[0][1]) == 21 and len(alone[1][1]) == 1
    for rank in range(2):
        both = json.loads((folder / f"{rank}.json").read_text())
        for (metrics, written), (expected, expected_file) in zip(both, alone, strict=True):
            assert metrics == pytest.approx(expected, abs=1e-6) and written == expected_file


# --- mistakes -----------------------------------------------------------------------------------------------


def test_mistakes_are_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match="Linear doesn't generate"):
        evaluate(Annotated(), torch.nn.Linear(2, 2))
    with pytest.raises(DataError, match="none of 3 rows could be read"):
        evaluate(Annotated(3, unreadable=(0, 1, 2)), args=EvalArgs(max_bad_fraction=1.0))
    with pytest.raises(DataError, match="dataset 'pictures' has no image to caption"):
        evaluate(Annotated(0))
    with pytest.raises(ConfigError, match="min_length from 0 to max_new_tokens; got 5, 4 and 8"):
        CaptioningTask(max_new_tokens=4)
    with pytest.raises(ConfigError, match="images_in_training must be at least 1"):
        CaptioningTask(images_in_training=0)
    with pytest.raises(ConfigError, match=r"task.metrics\[0\].*did you mean 'cider'"):
        bind(CaptioningTask, {"metrics": ["cidr"]}, where="task")


# --- what people read ---------------------------------------------------------------------------------------


class EvilAnnotated(Annotated):
    def __init__(self) -> None:
        super().__init__()
        self.texts = [[f"{EVIL} {row}", "plain"] for row in range(23)]
        self.groups = [f"<i>{row % 2}</i>" for row in range(23)]


def test_the_report_shows_pictures_with_captions_and_references(tmp_path: Path) -> None:
    task = CaptioningTask(metrics=["cider", "bleu"], num_examples=4)
    args = EvalArgs(folder=tmp_path, label="val")
    evaluation = task.evaluate(Captioner(), EvilAnnotated(), loader_args=args)
    facts = RunFacts(tmp_path, split="val", files={"log": tmp_path / "log.jsonl"})
    page = Page(task.write_report(tmp_path, evaluation, [], facts)["report"].read_text(encoding="utf-8"))
    assert said(0) in page.text and "ein <b>Kätzchen</b> schläft" in page.text and f"{EVIL} 5" in page.text
    assert len(page.all("article")) == 6 and "Captions with the lowest CIDEr" in page.text
    pictures = page.all("img")
    assert all(attrs["alt"] and attrs["src"].startswith("data:image/") for attrs in pictures)  # type: ignore[union-attr]
    assert "23 images, 46 reference captions" in page.text and "100 times" in page.text
    lines = task.summary(evaluation, facts)
    assert f"captions  {tmp_path / 'predictions_val.json'}" in lines


def test_the_summary_is_a_table_of_groups() -> None:
    metrics = {"loss": 2.5, "cider": 1.458, "bleu_4": 0.437, "cider_in_domain": 1.2, "cider_out_domain": 1.1}
    lines = CaptioningTask().metric_lines({**metrics, "num_images": 3.0, "num_references": 15.0})
    text = "\n".join(lines)
    assert "captions of  CIDEr  BLEU-4" in text and "all          1.458   0.437" in text
    assert "out-domain   1.100       -" in text and "2.500" in text
    assert lines[-1] == "3 images, 15 reference captions. Papers print 100 times these numbers."
    assert CaptioningTask().summary(None, RunFacts(Path("x"))) == ["not evaluated yet"]


# --- the shapes world ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_true_captions_name_only_what_is_there_also_as_the_text_processor_leaves_them(style: str) -> None:
    processor, rng = BlipCaption(), random.Random(0)
    for index in range(100):
        scene = sample_scene(seed=3, split="val", index=index)
        truth = Counter((item.colour, item.shape) for item in scene.objects)
        text = caption(scene, style, rng)
        assert mentioned(text) == mentioned(processor(text)), text
        right, named = object_shares(processor(text), truth)
        told = min(3, len(scene.objects)) if style == "position" else len(scene.objects)
        assert (right, named) == (1, pytest.approx(told / len(scene.objects))), text
        assert object_shares(describe(scene), truth) == (1, 1)


def test_shares_of_objects_by_hand() -> None:
    scene = Counter({("red", "star"): 1, ("blue", "ring"): 2})
    cases = {
        "a red star and a blue ring": (1, 2 / 3),
        "a large red star, a small blue ring and a blue ring on a navy background": (1, 1),
        "a red star and a red star": (1 / 2, 1 / 3),
        "four shapes none of them large two red stars and two rings in blue and red": (2 / 4, 2 / 3),
        "two shapes none of them large two stars": (0, 0),
        "a dog on a sofa": (0, 0),
        "": (0, 0),
        "red red red": (0, 0),
    }
    assert {text: object_shares(text, scene) for text in cases} == {
        text: pytest.approx(shares) for text, shares in cases.items()
    }


class Teller(Captioner):
    """Says a listed caption for each image, in order."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts = texts

    def generate(self, samples: Mapping[str, Any], **settings: Any) -> list[str]:
        told, self.texts = self.texts[: len(samples["image"])], self.texts[len(samples["image"]) :]
        return told


def test_the_worlds_own_measure_reads_the_scenes_beside_the_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path))
    data: Any = build_dataset_from_preset(
        "shapes_caption", {"train": 2, "val": 12, "test": 1, "image_size": 32}
    )["val"]
    task = registry.get_task_class("shapes_captioning")(metrics=QUICK, loss_batch_size=4)
    assert isinstance(task, ShapesCaptioningTask)
    described = [describe(sample_scene(seed=0, split="val", index=index)) for index in range(12)]
    evaluation = task.evaluate(Teller(described), data, loader_args=EvalArgs(batch_size=5))
    assert (evaluation.metrics["objects_right"], evaluation.metrics["objects_named"]) == (1, 1)
    assert (
        "Objects right" in "\n".join(task.metric_lines(evaluation.metrics)) and "cider" in evaluation.metrics
    )
    half = ["not a caption"] * 6 + described[6:]
    worse = task.evaluate(Teller(half), data, loader_args=EvalArgs(batch_size=5)).metrics
    assert (worse["objects_right"], worse["objects_named"]) == (0.5, 0.5)


def test_the_worlds_measure_is_for_its_world(tmp_path: Path) -> None:
    class Elsewhere(Annotated):
        def image_path(self, index: int) -> str:
            return str(tmp_path / "images" / "val" / "0.jpg")

    save_picture(tmp_path / "images" / "val" / "0.jpg")
    with pytest.raises(DataError, match=r"can't read the scenes in .*instances_val\.json"):
        ShapesCaptioningTask(metrics=["bleu"]).evaluate(Captioner(), Elsewhere(), loader_args=EvalArgs())

"""Task, model and data that don't fit each other are told before the first step, with the dataset's name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from generative_helpers import tiny_generative_config
from runner_helpers import config
from stage1_helpers import tiny_config, write_tokenizer
from torch import nn

from lavis_lite.common.errors import ConfigError
from lavis_lite.datasets.clips import ClipDataset, ClipQuestionDataset
from lavis_lite.datasets.image_text import ImageTextDataset
from lavis_lite.datasets.vqa import QuestionDataset
from lavis_lite.models.blip2_generative import Blip2Generative
from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.runners.fit import check_evaluation, check_training
from lavis_lite.runners.runner import Runner
from lavis_lite.tasks.captioning import CaptioningTask
from lavis_lite.tasks.pretrain import ImageTextPretrainTask
from lavis_lite.tasks.vqa import VqaTask

KINDS: dict[str, type[ImageTextDataset]] = {
    "captions": ImageTextDataset,
    "questions": QuestionDataset,
    "clips": ClipDataset,
    "asked_clips": ClipQuestionDataset,
}


def rows(kind: str) -> ImageTextDataset:
    return KINDS[kind]([], vis_processor=lambda _: _, text_processor=str, name="own")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    folder = tmp_path_factory.mktemp("models")
    stage2 = tiny_generative_config(folder / "llm", "opt")
    return {
        "stage1": Blip2QFormer.from_config(tiny_config(write_tokenizer(folder / "bert"))),
        "captioner": Blip2Generative.from_config(stage2),
        "answerer": Blip2Generative.from_config({**stage2, "prompt": "Question: {} Answer:"}),
    }


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("stage1", "captions", None),
        ("stage1", "questions", None),
        (
            "stage1",
            "clips",
            r"'own' shows clips, and a stage-1 model takes pictures alone: .*datasets\.own=null",
        ),
        ("captioner", "captions", None),
        ("captioner", "clips", None),
        ("captioner", "questions", r"'own' has questions, for which model\.prompt '' has no place"),
        ("answerer", "questions", None),
        ("answerer", "asked_clips", None),
        (
            "answerer",
            "captions",
            r"'own' has captions and no answers, and model\.prompt 'Question: \{\} Answer:' asks",
        ),
        ("answerer", "clips", r"'own' has captions and no answers"),
    ],
)
def test_rows_that_a_model_cannot_learn_from(
    models: dict[str, nn.Module], model: str, kind: str, message: str | None
) -> None:
    if message is None:
        check_training(models[model], [rows(kind)])
        return
    with pytest.raises(ConfigError, match=message):
        check_training(models[model], [rows("questions" if model == "answerer" else "captions"), rows(kind)])


@pytest.mark.parametrize(
    ("task", "model", "kind", "message"),
    [
        (ImageTextPretrainTask(), "stage1", "captions", None),
        (
            ImageTextPretrainTask(),
            "captioner",
            "captions",
            r"task retrieval: .*no `query_features`.*model\.arch=blip2",
        ),
        (ImageTextPretrainTask(), "stage1", "clips", "'own' shows clips"),
        (CaptioningTask(), "captioner", "clips", None),
        (CaptioningTask(), "stage1", "captions", None),
        (
            CaptioningTask(),
            "stage1",
            "questions",
            "task captioning: dataset 'own' has questions and no captions",
        ),
        (CaptioningTask(), "answerer", "captions", r"'own' has captions and no answers"),
        (CaptioningTask(loss_batches=0), "answerer", "captions", None),
        (VqaTask(), "answerer", "asked_clips", None),
        (VqaTask(), "captioner", "questions", None),
        (
            VqaTask(),
            "answerer",
            "captions",
            r"task vqa: dataset 'own' has no questions; .*datasets\.own\.<split>=null",
        ),
        (VqaTask(), "stage1", "questions", "task vqa: model Blip2QFormer doesn't answer questions"),
    ],
)
def test_what_a_task_cannot_evaluate(
    models: dict[str, nn.Module], task: Any, model: str, kind: str, message: str | None
) -> None:
    datasets = {"own": {"val": rows(kind)}}
    check_evaluation(task, models[model], datasets, ["test"])  # of no dataset
    if message is None:
        check_evaluation(task, models[model], datasets, ["val"])
        return
    with pytest.raises(ConfigError, match=message):
        check_evaluation(task, models[model], datasets, ["val"])


def test_retrieval_without_re_ranking_needs_no_matching_head() -> None:
    model = SimpleNamespace(encode_image=0, query_features=0, tokenize=0, text_features=0)
    ImageTextPretrainTask(rerank="none").check_fit(model, rows("captions"))
    with pytest.raises(ConfigError, match="no `project_image`"):
        ImageTextPretrainTask().check_fit(model, rows("captions"))


def test_confidence_is_asked_of_a_model_that_tells_it() -> None:
    model = SimpleNamespace(predict_answers=0)
    VqaTask().check_fit(model, rows("questions"))
    with pytest.raises(ConfigError, match="doesn't tell how likely"):
        VqaTask(confidence=True).check_fit(model, rows("questions"))


def test_parts_of_ones_own_without_the_checks_go_on_working() -> None:
    check_evaluation(object(), nn.Linear(1, 1), {"own": {"val": object()}}, ["val"])
    check_training(nn.Linear(1, 1), [object()])


def test_a_run_and_an_evaluation_ask_before_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lavis_lite.common.registry import registry

    cfg = config(tmp_path)
    asked: list[tuple[str, int]] = []

    def refuse(kind: str, row_count: int) -> Any:
        def check(_: Any, *given: Any) -> None:
            asked.append((kind, len(given[-1])))
            if len(given[-1]) == row_count:
                raise ConfigError(f"{kind} says no")

        return check

    monkeypatch.setattr(Runner, "train_step", lambda *_: pytest.fail("a step was done"))
    monkeypatch.setattr(registry.get_model_class("fake_mlp"), "check_rows", refuse("model", 24))
    with pytest.raises(ConfigError, match="model says no"):
        Runner(cfg).train()
    monkeypatch.setattr(registry.get_model_class("fake_mlp"), "check_rows", refuse("model", 0))
    monkeypatch.setattr(registry.get_task_class("fake_loss"), "check_fit", refuse("task", 8))
    with pytest.raises(ConfigError, match="task says no"):
        Runner(cfg).train()
    assert asked == [("model", 24), ("model", 24), ("task", 8)]

    monkeypatch.undo()
    Runner(cfg).train()
    monkeypatch.setattr(registry.get_task_class("fake_loss"), "check_fit", refuse("task", 6))
    monkeypatch.setattr(
        "lavis_lite.runners.evaluation.evaluate_splits", lambda *_, **__: pytest.fail("evaluated")
    )
    with pytest.raises(ConfigError, match="task says no"):
        Runner(cfg).evaluate()

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import Page
from vqa_helpers import PROMPT, question_model
from vqa_world import SECOND_PREDICTION, Answerer, Questions, measure

from lavis_lite.common.binding import bind
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.datasets.builders import build_dataset_from_preset
from lavis_lite.tasks import vqa
from lavis_lite.tasks.base import EvalArgs, RunFacts
from lavis_lite.tasks.vqa import VqaTask
from tests.runner_helpers import run_ranks

# Of ten answers two agree: 2 leave-one-out subsets have one of them, 8 have two.
A_LITTLE = (2 * 1 / 3 + 8 * 2 / 3) / 10


def evaluate(
    data: Any, model: Any = None, *, final: bool = True, args: EvalArgs | None = None, **task: Any
) -> Any:
    arguments = args or EvalArgs(batch_size=5, max_bad_fraction=0.5)
    task = {"loss_batch_size": 4, **task}
    return VqaTask(**task).evaluate(model or Answerer(), data, loader_args=arguments, final=final)


def test_accuracies_by_hand() -> None:
    metrics = evaluate(Questions(12)).metrics
    assert metrics["accuracy"] == pytest.approx((1 + A_LITTLE + 0) / 3)
    assert metrics["answer_type/yes_no"] == 1 and metrics["answer_type/other"] == 0
    assert metrics["answer_type/number"] == pytest.approx(A_LITTLE)
    assert metrics["question_type/what_0"] == pytest.approx((1 + A_LITTLE) / 3)
    assert metrics["num_questions"] == 12 and metrics["unreadable_images"] == 0 and "loss" in metrics
    # Where all agree the official script cleans the prediction alone, and its later version nothing.
    for truths, expected in (("official", 1), ("official_later", 0)):
        assert evaluate(Questions(12), truths=truths).metrics["answer_type/yes_no"] == expected


def test_too_few_answers_to_score_one_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Few(Questions):
        def answers(self, row: int) -> list[str]:
            return ["yes"] * (row + 1)

    messages: list[str] = []
    monkeypatch.setattr(vqa.logger, "warning", lambda text, *args: messages.append(text % args))
    task = VqaTask(loss_batch_size=4)
    for _ in range(2):
        metrics = task.evaluate(Answerer(), Few(4), loader_args=EvalArgs()).metrics
    # Says yes, 2, blue, yes; of one, two, three and four who said yes.
    assert metrics["accuracy"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert messages == [
        "2 of 4 questions have 2 or 3 answers, of which even a right one scores at most 1/3 or 2/3: give one "
        "answer, or four and more (docs/vqa.md)"
    ]


def test_dictionary_forms_agree_when_asked_to() -> None:
    class Plural(Answerer):
        def predict_answers(self, samples: dict[str, Any], **settings: Any) -> list[str]:
            return ["dogs."] * len(samples["image"])

    class Dogs(Questions):
        def answers(self, row: int) -> list[str]:
            return ["dog"] * 10

    for lemmatize, expected in ((False, 0.0), (True, 1.0), ("prediction", 1.0)):
        assert evaluate(Dogs(4), Plural(), lemmatize=lemmatize).metrics["accuracy"] == expected


def test_every_question_is_asked_once_with_the_tasks_settings(tmp_path: Path) -> None:
    model = Answerer()
    evaluate(Questions(), model, prompt="q: {}", num_beams=2, max_len=7, min_len=0, length_penalty=0.5)
    assert sorted(row for call in model.calls for row in call["rows"]) == list(range(23))
    told = {"prompt": "q: {}", "num_beams": 2, "max_len": 7, "min_len": 0, "length_penalty": 0.5}
    assert all(call.items() >= told.items() for call in model.calls) and model.training
    (tmp_path / "list.json").write_text('{"yes": 3, "no": 1}')
    (tmp_path / "list.txt").write_text("yes\n\n two \nyes\n")
    in_yaml = bind(VqaTask, {"answer_list": [" red", "", 2, 3.5, "red "]}, where="task")["answer_list"]
    for given, expected in (
        (str(tmp_path / "list.json"), ["yes", "no"]),
        (str(tmp_path / "list.txt"), ["yes", "two"]),
        (in_yaml, ["red", "2", "3.5"]),
    ):
        ranker = Answerer()
        evaluate(Questions(2), ranker, inference_method="rank", answer_list=given)
        assert ranker.calls[0]["answer_list"] == expected and ranker.calls[0]["inference_method"] == "rank"


def test_answers_are_on_the_disk_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> float:
        raise MemoryError

    monkeypatch.setattr(vqa, "accuracy", fail)
    args = EvalArgs(batch_size=5, folder=tmp_path / "run", label="test")
    with pytest.raises(MemoryError):
        evaluate(Questions(3), args=args)
    predictions = json.loads((tmp_path / "run" / "predictions_test.json").read_text(encoding="utf-8"))
    assert predictions[1] == SECOND_PREDICTION
    results = json.loads((tmp_path / "run" / "results_test.json").read_text(encoding="utf-8"))
    assert results == [
        {"question_id": 1000 + row, "answer": answer}
        for row, answer in enumerate(("Yes.", "2", "<b>blue</b>"))
    ]


def test_confidence_is_told_when_asked_for(tmp_path: Path) -> None:
    task = VqaTask(confidence=True, loss_batch_size=4)
    args = EvalArgs(batch_size=5, max_bad_fraction=0.5, folder=tmp_path, label="val")
    evaluation = task.evaluate(Answerer(), Questions(8, unreadable=(3,)), loader_args=args)
    rows = json.loads((tmp_path / "predictions_val.json").read_text())
    assert [row["confidence"] for row in rows] == [1 / (2 + n) for n in (0, 1, 2, 4, 5, 6, 7)]
    results = json.loads((tmp_path / "results_val.json").read_text())
    assert set(results[0]) == {"question_id", "answer"}, "the server takes nothing else"
    page = "".join(task.report_sections(evaluation))
    assert "confidence 0.50" in page and "Confidence is how likely" in page
    assert "onfidence" not in "".join(VqaTask().report_sections(evaluate(Questions(4))))

    class Lavis(torch.nn.Module):
        def predict_answers(self, samples: dict[str, Any], **settings: Any) -> list[str]:
            return ["yes"] * len(samples["image"])

    with pytest.raises(ConfigError, match="confidence: model Lavis doesn't tell how likely"):
        task.evaluate(Lavis(), Questions(4, answered=False), loader_args=EvalArgs())


def test_questions_without_answers_are_answered_and_not_scored(tmp_path: Path) -> None:
    args = EvalArgs(batch_size=5, folder=tmp_path, label="test")
    task = VqaTask()
    evaluation = task.evaluate(Answerer(), Questions(4, answered=False), loader_args=args)
    assert evaluation.metrics == {"num_questions": 4, "unreadable_images": 0}
    assert len(json.loads((tmp_path / "results_test.json").read_text())) == 4
    assert "No answers are known" in "".join(task.report_sections(evaluation))


def test_questions_about_unreadable_pictures_are_answered_with_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = EvalArgs(batch_size=5, max_bad_fraction=0.5, folder=tmp_path, label="test")
    metrics = evaluate(Questions(6, unreadable=(1, 2, 4)), args=args).metrics
    assert metrics["num_questions"] == 3 and metrics["accuracy"] == pytest.approx((1 + 1 + 0) / 3)
    results = json.loads((tmp_path / "results_test.json").read_text())
    assert sorted((item["question_id"], item["answer"]) for item in results) == [
        (1000, "Yes."),
        (1001, ""),
        (1002, ""),
        (1003, "Yes."),
        (1004, ""),
        (1005, "<b>blue</b>"),
    ]
    (told,) = [record.message for record in caplog.records if "results_test.json" in record.message]
    assert '"" stands for the answers to 3 questions' in told and "for example 1001, 1002, 1004" in told


def test_mid_training_is_cheaper() -> None:
    model = Answerer()
    evaluation = evaluate(Questions(), model, final=False, questions_in_training=4)
    assert sorted(row for call in model.calls for row in call["rows"]) == [0, 5, 11, 17]
    assert evaluation.details.examples is None


def test_two_processes_measure_and_write_what_one_does(tmp_path: Path) -> None:
    """23 questions of which 2 can't be read, then one question for two processes."""
    alone = measure(tmp_path / "one")
    folder = tmp_path / "two"
    folder.mkdir()
    run_ranks([sys.executable, str(Path(__file__).with_name("vqa_world.py")), str(folder)])
    said, results = alone[0][1]
    assert len(said) == 21 and alone[0][0]["unreadable_images"] == 2
    assert {item["question_id"] for item in results} == set(range(1000, 1023)), "the server wants all of them"
    assert [item["question_id"] for item in results if not item["answer"]] == [1004, 1011]
    for rank in range(2):
        both = json.loads((folder / f"{rank}.json").read_text())
        for (metrics, written), (expected, expected_files) in zip(both, alone, strict=True):
            assert metrics == pytest.approx(expected, abs=1e-6) and written == expected_files


def test_the_report_shows_pictures_questions_answers_and_truths(tmp_path: Path) -> None:
    task = VqaTask(num_examples=5)
    args = EvalArgs(folder=tmp_path, label="val")
    evaluation = task.evaluate(Answerer(), Questions(12), loader_args=args)
    facts = RunFacts(tmp_path, split="val", files={"log": tmp_path / "log.jsonl"})
    page = Page(task.write_report(tmp_path, evaluation, [], facts)["report"].read_text(encoding="utf-8"))
    assert "Question 7?" in page.text and "<b>blue</b>" in page.text and "3 (8 of 10)" in page.text
    assert "questions: what <1>" in page.text and "Nobody gave these answers" in page.text
    assert len(page.all("article")) == 8 and page.text.count("accuracy 0.00") >= 2
    assert all(attrs["alt"] and attrs["src"].startswith("data:image/") for attrs in page.all("img"))  # type: ignore[union-attr]
    lines = task.summary(evaluation, facts)
    assert f"answers  {tmp_path / 'predictions_val.json'}" in lines
    assert ["all", "0.533"] in [line.split() for line in lines]


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Linear doesn't answer questions"):
        evaluate(Questions(), torch.nn.Linear(2, 2))
    from caption_world import Annotated

    with pytest.raises(ConfigError, match="dataset 'pictures' has no questions; use `builder: vqa`"):
        evaluate(Annotated(2))
    with pytest.raises(DataError, match="none of 3 rows could be read"):
        evaluate(Questions(3, unreadable=(0, 1, 2)), args=EvalArgs(max_bad_fraction=1.0))
    for task, message in (
        ({"prompt": "a photo of"}, r"task\.prompt: 'a photo of' has no \{\}"),
        ({"min_len": 3, "max_len": 2}, "min_len from 0 to max_len; got 5, 2 and 3"),
        ({"inference_method": "rank"}, r"task\.answer_list: .* set both or neither"),
        ({"answer_list": ["a"]}, r"task\.answer_list: .* set both or neither"),
        ({"inference_method": "rank", "answer_list": []}, r"task\.answer_list is empty; name the answers"),
        ({"inference_method": "rank", "answer_list": ["", " "]}, r"task\.answer_list is empty"),
        (
            {"inference_method": "rank", "answer_list": [True, "red"]},
            'true is a truth value.*write "yes" and',
        ),
        ({"inference_method": "rank", "answer_list": ["red", None]}, "a text or a number, got None"),
        ({"num_ans_candidates": 0}, "num_ans_candidates must be at least 1"),
        ({"questions_in_training": 0}, "questions_in_training must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            VqaTask(**task)  # type: ignore[arg-type]
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(DataError, match=r"none\.txt holds no answers"):
        VqaTask(inference_method="rank", answer_list=str(tmp_path / "none.txt"))


@pytest.mark.parametrize(("family", "method"), [("opt", "generate"), ("t5", "rank")])
def test_a_real_model_on_the_embedded_world(
    family: str, method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    model = question_model(tmp_path, family)
    processor = {"eval": {"name": "shapes_image_eval", "image_size": 16}}
    sizes = {"train": 2, "val": 3, "test": 1, "image_size": 16, "vis_processor": processor}
    data: Any = build_dataset_from_preset("shapes_vqa", sizes)["val"]
    choice = ["yes", "no", "red"] if method == "rank" else None
    task = VqaTask(
        inference_method=method, answer_list=choice, num_beams=2, max_len=3, prompt=PROMPT, loss_batch_size=4
    )
    args = EvalArgs(batch_size=5, folder=tmp_path, label="val")
    evaluation = task.evaluate(model, data, loader_args=args)
    results = json.loads((tmp_path / "results_val.json").read_text())
    assert len(results) == 12 and {"loss", "accuracy"} <= set(evaluation.metrics)
    assert choice is None or {item["answer"] for item in results} <= set(choice)
    looks = evaluation.details.looks
    assert len(looks) == 3 and all(look.heat[0] != look.heat[1] for look in looks)
    first, second = looks[0].asked
    assert data.image_path(first.row) == data.image_path(second.row)
    assert first.question_type != second.question_type
    page = Page("".join(task.report_sections(evaluation)))
    described = [str(attrs["alt"]) for attrs in page.all("img")]
    assert f"attention over the picture for: {second.question}" in described

from __future__ import annotations

import csv
import json
import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from data_helpers import save_picture
from pyarrow import parquet

from lavis_lite.common import dist
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.datasets.builders import build_dataset_from_preset, build_datasets, validate_datasets_config
from lavis_lite.datasets.loader import TrainLoader, eval_loader
from lavis_lite.worlds.shapes.questions import questions
from lavis_lite.worlds.shapes.scene import sample_scene

REPOSITORY = Path(__file__).resolve().parent.parent
ANSWERS = ["red"] * 5 + ["blue"] * 3 + ["Red.", "dark red"]
VIS = {
    "train": {"name": "shapes_image_train", "image_size": 16},
    "eval": {"name": "shapes_image_eval", "image_size": 16},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def pair(folder: Path, *, numbers: tuple[int, ...] = (9, 42), answers: Any = None, prefix: str = "") -> None:
    """VQAv2's two files for pictures of these numbers, question 10 * n about picture n."""
    asked = [{"image_id": n, "question": f"What color is {n}?", "question_id": 10 * n} for n in numbers]
    told = [
        {
            "image_id": n,
            "question_id": 10 * n,
            "question_type": "what color is",
            "answer_type": "other",
            "multiple_choice_answer": "red",
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": k + 1}
                for k, text in enumerate(ANSWERS if answers is None else answers)
            ],
        }
        for n in reversed(numbers)
    ]
    write(folder / f"{prefix}q.json", {"info": {}, "questions": asked})
    write(folder / f"{prefix}a.json", {"info": {}, "annotations": told})
    for n in numbers:
        save_picture(folder / "images" / f"COCO_{n:012}.jpg", n)


def build(root: Path, split: str = "train", **section: Any) -> Any:
    entry = {"builder": "vqa", "root": str(root), "vis_processor": VIS, split: section}
    return build_datasets({"own": entry})["own"][split]


PAIR = {
    "questions": "q.json",
    "annotations": "a.json",
    "images": "images",
    "image_name": "COCO_{image_id:012}.jpg",
}


# --- formats ------------------------------------------------------------------------------------------------


def test_the_official_pair(tmp_path: Path) -> None:
    pair(tmp_path)
    data = build(tmp_path, **PAIR)
    record = data.record(1)
    assert record.image == "COCO_000000000042.jpg" and record.image_id == 42
    asked = record.question
    assert (asked.text, asked.id, asked.answers) == ("What color is 42?", "420", ANSWERS)
    assert (asked.answer_type, asked.question_type) == ("other", "what color is")
    row = data.load(1, seed=0)
    assert row["text_input"] == "what color is 42?" and row["question_id"] == 420
    assert row["image"].shape == (3, 16, 16) and data[1]["answers"] == ANSWERS and data.answered
    again = pickle.loads(pickle.dumps(data))
    assert again.load(1, seed=7)["text_output"] == data.load(1, seed=7)["text_output"]


def test_answers_are_drawn_as_often_as_they_were_given(tmp_path: Path) -> None:
    pair(tmp_path, answers=[*ANSWERS, ""])
    data = build(tmp_path, **PAIR)
    drawn = Counter(data.load(0, seed=seed)["text_output"] for seed in range(1000))
    assert set(drawn) == set(ANSWERS), "a blank answer teaches nothing"
    # Standard deviation 0.016 at most.
    assert all(abs(drawn[text] / 1000 - ANSWERS.count(text) / 10) < 0.06 for text in drawn)


def test_batches_of_both_loaders_hold_what_training_and_evaluation_need(tmp_path: Path) -> None:
    pair(tmp_path)
    data = build(tmp_path, **PAIR)
    batch = next(TrainLoader([data], batch_size=2, seed=0).batches())
    assert sorted(batch) == ["image", "image_id", "index", "question_id", "text_input", "text_output"]
    (batch,) = eval_loader(data, batch_size=4)
    assert batch["question_id"] == [90, 420] and all(text in ANSWERS for text in batch["text_output"])


def test_gqa_keeps_its_numbers_as_texts(tmp_path: Path) -> None:
    types = {"structural": "verify", "semantic": "attr"}
    content = {
        "0201": {"question": "Is it red?", "answer": "yes", "imageId": "7", "types": types},
        "0202": {"question": "What is it?", "answer": "dog", "imageId": "n8", "types": types},
    }
    write(tmp_path / "gqa.json", content)
    for name in ("7", "n8"):
        save_picture(tmp_path / f"{name}.jpg")
    data = build(tmp_path, "val", annotations="gqa.json")
    (batch,) = eval_loader(data, batch_size=2)
    assert batch["question_id"] == ["0201", "0202"] and batch["text_output"] == ["yes", "dog"]
    assert data.record(1).image == "n8.jpg" and data.record(0).question.question_type == "verify"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_ones_own_rows_by_yaml_alone(tmp_path: Path, suffix: str) -> None:
    rows = [{"photo": f"{n}.jpg", "q": f"how many, {n}?", "a": str(n), "qid": n + 5} for n in range(2)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write(path, "\n".join(json.dumps(row) for row in rows))
    elif suffix == "json":
        write(path, [{**row, "a": [row["a"], "many", 3]} for row in rows])
    elif suffix == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    for n in range(2):
        save_picture(tmp_path / f"{n}.jpg", n)
    fields = {"image": "photo", "question": "q", "answer": "a"}
    data = build(tmp_path, annotations=path.name, fields=fields)
    assert [data.load(row, seed=0)["question_id"] for row in range(2)] == [5, 6]
    expected = ["1", "many", "3"] if suffix == "json" else ["1"]
    assert data.record(1).question.answers == expected and data.record(1).question.text == "how many, 1?"


def table(folder: Path, name: str, *rows: dict[str, Any]) -> str:
    """A file of csv or tsv with these rows about pictures 0.jpg, 1.jpg and so on; returns its name."""
    rows = tuple({"image": f"{n}.jpg", "question": "what?", **row} for n, row in enumerate(rows))
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="," if name.endswith("csv") else "\t")
        writer.writeheader()
        writer.writerows(rows)
    for n in range(len(rows)):
        save_picture(folder / f"{n}.jpg", n)
    return name


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_cell_holds_several_answers(tmp_path: Path, suffix: str) -> None:
    cells = ('["red", "red", "dark blue", 3]', "[unclear]", "red", '[{"answer": "a, b"}]')
    name = table(tmp_path, f"rows.{suffix}", *({"answers": cell} for cell in cells))
    data = build(tmp_path, annotations=name)
    expected = [["red", "red", "dark blue", "3"], ["[unclear]"], ["red"], ["a, b"]]
    assert [data.record(row).question.answers for row in range(4)] == expected
    table(tmp_path, f"apart.{suffix}", {"answer": "red| dark blue |"}, {"answer": "['x']"})
    data = build(tmp_path, annotations=f"apart.{suffix}", fields={"answer_separator": "|"})
    assert [data.record(row).question.answers for row in range(2)] == [["red", "dark blue"], ["['x']"]]
    refused(
        tmp_path,
        r"apart\..sv, line 3: the answers .*no JSON list; .*answer_separator",
        annotations=f"apart.{suffix}",
    )
    table(tmp_path, f"none.{suffix}", {"answer": "[]"})
    refused(tmp_path, "question 0 has no answer", annotations=f"none.{suffix}")


def test_lists_are_read_from_text_alone_in_files_without_types(tmp_path: Path) -> None:
    save_picture(tmp_path / "0.jpg")
    write(tmp_path / "rows.jsonl", json.dumps({"image": "0.jpg", "question": "what?", "answer": '["x"]'}))
    assert build(tmp_path, annotations="rows.jsonl").record(0).question.answers == ['["x"]']


def test_doubts_about_answers_are_told_at_every_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table(tmp_path, "label.csv", {"label": "red", "width": 4, "part": "a"})
    table(tmp_path, "joined.csv", {"answer": "red"}, {"answer": "red|blue"})
    table(tmp_path, "good.csv", {"answer": "it is red; mostly"})
    good = {"annotations": "good.csv", "fields": {"answer_separator": "|"}}
    for _ in range(2):
        caplog.clear()
        build(tmp_path, "val", annotations="label.csv", where={"part": "a"})
        build(tmp_path, "val", annotations="joined.csv")
        build(tmp_path, "val", **good)
        build(tmp_path, "val", annotations="label.csv", fields={"answer": "label"})
        told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert len(told) == 2
        assert "label.csv: no field answer, answers, text_output, so its questions can be answered" in told[0]
        assert "nothing reads label, width: " in told[0] and "datasets.own.val.fields.answer to" in told[0]
        assert "joined.csv: an answer such as 'red|blue' is taken as one" in told[1]
        assert "datasets.own.val.fields.answer_separator to '|'" in told[1]


def test_doubts_are_told_by_one_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "rank", lambda: 1)
    build(
        tmp_path, "val", annotations=table(tmp_path, "joined.csv", {"answer": "red"}, {"answer": "red|blue"})
    )
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_a_number_that_two_rows_have(tmp_path: Path) -> None:
    rows = (
        {"question_id": 7, "answer": "x"},
        {"question_id": "", "answer": "y"},
        {"question_id": 7, "answer": "z"},
    )
    table(tmp_path, "rows.csv", *rows)
    refused(tmp_path, r"rows\.csv, line 4: question 7 is in line 2 already", "val", annotations="rows.csv")
    assert len(build(tmp_path, annotations="rows.csv")) == 3, "a row an answer can be trained on"
    assert len(build(tmp_path, "val", annotations="rows.csv", limit=2)) == 2
    write(
        tmp_path / "rows.jsonl",
        "\n".join(json.dumps({**row, "image": "0.jpg", "question": "?"}) for row in rows),
    )
    refused(
        tmp_path, r"rows\.jsonl, line 3: question 7 is in line 1 already", "test", annotations="rows.jsonl"
    )


def test_a_row_that_cannot_be_used_keeps_its_number(tmp_path: Path) -> None:
    row = {"image": "0.jpg", "question": "what \ud800?", "question_id": 7, "answer": "x"}
    write(tmp_path / "rows.jsonl", json.dumps(row))
    save_picture(tmp_path / "0.jpg")
    record = build(tmp_path, annotations="rows.jsonl").record(0)
    assert "lone surrogate" in record.problem and record.question.id == "7"


def test_questions_without_answers_can_be_asked_but_not_trained_on(tmp_path: Path) -> None:
    pair(tmp_path)
    alone = {**PAIR, "annotations": None}
    data = build(tmp_path, "test", **alone)
    assert not data.answered and data.load(0, seed=0)["text_output"] == ""
    with pytest.raises(
        DataError, match=r"question 90 has no answer; a training split needs .*own\.train\.annot"
    ):
        build(tmp_path, **alone)


def test_the_embedded_world_asks_what_it_wrote(cache: Path) -> None:
    sizes = {"train": 3, "val": 4, "test": 1, "image_size": 32, "questions_per_image": 2}
    splits = build_dataset_from_preset("shapes_vqa", sizes)
    data: Any = splits["val"]
    assert len(data) == 8 and len(splits["train"]) == 6
    asked = questions(sample_scene(seed=0, split="val", index=3), count=2)
    records = [data.record(row) for row in (6, 7)]
    assert [record.question.text for record in records] == [question.text for question in asked]
    assert records[0].question.answers == [asked[0].answer] * 10
    assert records[0].image == "000003.jpg" and records[1].question.question_type == asked[1].type
    assert build_dataset_from_preset("shapes_caption", sizes)["val"].image(3) == data.image(7)
    assert len(list((cache / "shapes").iterdir())) == 1, "captions and questions share one folder"


@pytest.mark.parametrize("name", ["vqav2", "ok_vqa"])
def test_presets_read_the_official_names(name: str, cache: Path) -> None:
    prefix = "v2_" if name == "vqav2" else ""
    for split, number in (("train2014", 9), ("val2014", 42), ("test-dev2015", 1)):
        pair(cache / name, numbers=(number,), prefix="x")
        (cache / name / "xq.json").rename(cache / name / f"{prefix}OpenEnded_mscoco_{split}_questions.json")
        (cache / name / "xa.json").rename(cache / name / f"{prefix}mscoco_{split}_annotations.json")
        folder = split.replace("-dev", "")
        save_picture(cache / name / "images" / folder / f"COCO_{folder}_{number:012}.jpg", number)
    splits: Any = build_dataset_from_preset(name)
    assert splits["train"].load(0, seed=0)["question_id"] == 90
    assert splits["test"].answered == (name == "ok_vqa")
    if name == "vqav2":  # all questions of test, as dataset_card/vqav2.md says
        standard = "v2_OpenEnded_mscoco_test2015_questions.json"
        (cache / name / "v2_OpenEnded_mscoco_test-dev2015_questions.json").rename(cache / name / standard)
        data: Any = build_dataset_from_preset(name, {"test": {"questions": standard}})["test"]
        assert data.load(0, seed=0)["question_id"] == 10
        for told in ("dataset_card/vqav2.md", "docs/vqa.md", "lavis_lite/configs/datasets/vqav2.yaml"):
            assert f"datasets.vqav2.test.questions={standard}" in (REPOSITORY / told).read_text(
                encoding="utf-8"
            )


# --- mistakes -----------------------------------------------------------------------------------------------


def refused(root: Path, message: str, split: str = "train", **section: Any) -> None:
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        build(root, split, **section)
    assert "\n" not in str(caught.value)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    pair(tmp_path, numbers=(1, 2))
    pair(tmp_path, numbers=(2, 3), prefix="other_")
    other = {**PAIR, "annotations": "other_a.json"}
    refused(
        tmp_path, r"1 questions of .*q\.json have no answers in .*other_a\.json, for example 10; set", **other
    )
    pair(tmp_path, numbers=(1, 2, 3), prefix="more_")
    more = {**PAIR, "annotations": "more_a.json"}
    refused(tmp_path, r"1 annotations of .* have no question in .*, for example 30", **more)
    swapped = {**PAIR, "questions": "a.json", "annotations": "q.json"}
    refused(tmp_path, r"a\.json: no list 'questions'", **swapped)
    refused(tmp_path, r"these are VQAv2's answers; set datasets\.own\.train\.questions", annotations="a.json")
    for name, section, key in (("q", "questions", "questions"), ("a", "annotations", "annotations")):
        twice = json.loads((tmp_path / f"{name}.json").read_text())
        twice[section].append({**twice[section][0], "question_id": str(twice[section][0]["question_id"])})
        write(tmp_path / f"twice_{name}.json", twice)
        number = 10 if name == "q" else 20
        message = rf"twice_{name}\.json, {section}, row 2: question {number} is in {section}, row 0 already"
        refused(tmp_path, message, **{**PAIR, key: f"twice_{name}.json"})
    write(tmp_path / "none.json", {"questions": [{"question_id": None}]})
    refused(tmp_path, "questions, row 0: no field 'question_id'", **{**PAIR, "questions": "none.json"})


@pytest.mark.parametrize("kind", [str, float])
def test_numbers_of_one_file_are_texts_or_floats(tmp_path: Path, kind: type) -> None:
    pair(tmp_path)
    told = json.loads((tmp_path / "a.json").read_text())
    for row in told["annotations"]:
        row |= {key: kind(row[key]) for key in ("question_id", "image_id")}
    write(tmp_path / "a.json", told)
    data = build(tmp_path, **PAIR)
    assert data.load(1, seed=0)["question_id"] == 420 and data.record(1).question.answers == ANSWERS


def test_an_annotation_about_another_picture(tmp_path: Path) -> None:
    pair(tmp_path)
    told = json.loads((tmp_path / "a.json").read_text())
    told["annotations"][1]["image_id"] = 8
    write(tmp_path / "a.json", told)
    refused(
        tmp_path,
        r"a\.json, annotations, row 1: question 90 is about picture 8, but about 9 in .*q\.json, questions, row 0",
        **PAIR,
    )


def test_pictures_that_nothing_names(tmp_path: Path) -> None:
    pair(tmp_path)
    refused(
        tmp_path,
        r"question 90 is about picture 9, and nothing tells its path.*image_name",
        **{**PAIR, "image_name": None},
    )
    refused(tmp_path, r"image_name: 'a\{id\}' doesn't fit picture 9", **{**PAIR, "image_name": "a{id}"})
    write(tmp_path / "coco.json", {"images": [{"id": 9, "file_name": "COCO_000000000009.jpg"}]})
    by_file = {**PAIR, "image_name": None, "pictures": "coco.json"}
    refused(
        tmp_path,
        r"question 420 is about picture 42, which is not among the images of .*coco\.json",
        **by_file,
    )
    write(tmp_path / "rows.jsonl", '{"image": "", "question": "what?", "answer": "x"}')
    refused(tmp_path, r"rows\.jsonl, line 1: question 0 names no picture", annotations="rows.jsonl")
    refused(tmp_path, "both name pictures: keep one", **{**PAIR, "pictures": "coco.json"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": []}, "question 0 has no answer; correct the file"),
        ({"answer": None}, "question 0 has no answer; correct the file"),
        ({"answer": ["", " "]}, "question 0 has no answer; correct the file"),
        ({"answer": {"x": 1}}, "the answer must be text or a list of texts"),
        ({}, r"no field 'answer' for the answer; .*datasets\.own\.train\.fields\.answer="),
        ({"answer": "x", "question": " "}, "question 0 has no text"),
    ],
)
def test_rows_that_teach_nothing(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    save_picture(tmp_path / "1.jpg")
    write(tmp_path / "rows.jsonl", json.dumps({"image": "1.jpg", "question": "what?", **row}))
    refused(tmp_path, message, annotations="rows.jsonl")


def test_empty_lists_of_answers_in_a_pair(tmp_path: Path) -> None:
    pair(tmp_path, answers=[])
    refused(tmp_path, r"a\.json, annotations, row 1: question 90 has no answer; correct", "val", **PAIR)
    told = json.loads((tmp_path / "a.json").read_text())
    told["annotations"][1]["answers"] = None
    write(tmp_path / "a.json", told)
    refused(tmp_path, r"a\.json, annotations, row 1: question 90 has no answer; correct", "val", **PAIR)
    pair(tmp_path, answers=[["red"]])
    refused(tmp_path, r"a\.json, annotations, row 1: the answer must be text or a list", "val", **PAIR)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"images": "x"}, r"datasets\.own\.val: set datasets\.own\.val\.annotations"),
        ({"annotations": "x", "format": "vqa"}, r"'vqa' is a pair of files: set .*questions"),
        ({"annotations": "x", "questions": "y", "format": "gqa"}, "belongs to format 'vqa', not 'gqa'"),
        ({"annotations": "x", "fields": {"anwser": "a"}}, "did you mean 'answer'"),
        ({"annotations": "x", "limit": 0}, "limit must be at least 1"),
        ({"annotations": "x", "fields": {"answer_separator": ""}}, r"fields\.answer_separator is empty"),
    ],
)
def test_mistakes_in_the_configuration(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_datasets_config({"own": {"builder": "vqa", "val": section}})


def test_a_changed_answer_file_is_read_again(tmp_path: Path) -> None:
    pair(tmp_path)
    assert build(tmp_path, **PAIR).record(0).question.answers == ANSWERS
    pair(tmp_path, answers=["green"])
    assert build(tmp_path, **PAIR).record(0).question.answers == ["green"]

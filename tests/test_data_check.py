"""`lavis-lite data check`: every preset says what is missing; what is there is counted."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from data_helpers import make_jsonl, save_picture
from shard_helpers import jpeg, sample, write_shards

from lavis_lite.commands.data import data_main
from lavis_lite.common.config import PRESETS, read_yaml
from lavis_lite.datasets.builders import SPLITS
from lavis_lite.datasets.layout import COUNTS
from lavis_lite.datasets.named import preset_names

CARDS = Path(__file__).resolve().parents[1] / "dataset_card"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def check(*arguments: str) -> int:
    level = logging.getLogger("lavis_lite.datasets").level
    try:
        data_main(["check", *arguments])
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        assert logging.getLogger("lavis_lite.datasets").level == level
    return 0


@pytest.mark.parametrize("name", [name for name in preset_names() if not name.startswith("shapes")])
def test_every_preset_without_its_files_names_each_split_and_place(
    name: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(name) == 1
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines and told.err == ""
    for line in lines:
        split = line.split()[1].rstrip(":")
        assert line.startswith(f"{name} {split}: dataset '{name}': no ") and str(cache / name) in line
        assert f"dataset_card/{name}.md" in line


def test_counts_are_those_of_the_cards() -> None:
    counts = read_yaml(COUNTS)
    told = {**counts["exact"], **counts["published"]}
    assert len(told) == len(counts["exact"]) + len(counts["published"]) >= 12
    for name, splits in told.items():
        card = (CARDS / f"{name}.md").read_text(encoding="utf-8")
        for split, rows in splits.items():
            assert f"{rows:,}" in card, (name, split)


def test_every_preset_has_the_counts_of_its_card_or_a_reason_for_none() -> None:
    counts = read_yaml(COUNTS)
    lists = [counts["exact"], counts["published"], counts["uncounted"]]
    assert sorted(name for one in lists for name in one) == preset_names()
    for name in preset_names():
        section = read_yaml(PRESETS / "datasets" / f"{name}.yaml")
        told = {**counts["exact"], **counts["published"]}.get(name, counts["uncounted"].get(name))
        if isinstance(told, dict):
            assert set(told) == {split for split in SPLITS if section.get(split)}, name
        else:
            assert told, name


@pytest.mark.parametrize("card", sorted(CARDS.glob("*.md")), ids=lambda card: card.stem)
def test_exact_counts_of_a_card_are_compared_with(card: Path) -> None:
    """Each split of its table has the number that the check compares with in one of its rows."""
    exact = read_yaml(COUNTS)["exact"].get(card.stem)
    table = re.findall(r"^\| (train|val|test)\b(.*)$", card.read_text(encoding="utf-8"), re.MULTILINE)
    for split in {name for name, _ in table} if exact else ():
        told = {number for name, row in table if name == split for number in re.findall(r"[\d,]+", row)}
        assert f"{exact[split]:,}" in told, split


def test_every_card_names_its_check() -> None:
    for card in CARDS.glob("*.md"):
        # "shapes" and "shapes_video" are the worlds of several presets, such as shapes_caption.
        assert f"lavis-lite data check {card.stem}" in card.read_text(encoding="utf-8"), card


def coco(folder: Path, pictures: int) -> None:
    images, annotations = [], []
    for number in range(pictures):
        save_picture(folder / "val" / f"{number}.jpg", number)
        images.append({"id": number, "file_name": f"{number}.jpg", "domain": "in-domain"})
        annotations.append({"image_id": number, "id": number, "caption": "a caption" if number else ""})
    content = {"images": images, "annotations": annotations}
    (folder / "nocaps_val_4500_captions.json").write_text(json.dumps(content))


def test_missing_pictures_and_wrong_counts_are_told(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco(cache / "nocaps", 6)
    (cache / "nocaps/val/3.jpg").unlink()
    assert check("nocaps") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "nocaps val: 6 rows, there should be 4,500, 4 of 5 pictures looked for are there"
    assert lines[1] == f"nocaps val: missing, for example {cache}/nocaps/val/3.jpg"
    assert lines[2].startswith("nocaps val: 1 rows can't be used, for example ")


def test_rows_that_cannot_be_used_are_counted_among_all_and_not_those_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(
        tmp_path, 2, 5, make=lambda number: sample(number) if number % 2 == 0 else {"jpg": jpeg(number)}
    )
    own = {"builder": "shards", "train": {"shards": f"{tmp_path}/*.tar"}}
    (tmp_path / "own.yaml").write_text(json.dumps({"datasets": {"own": own}}))
    monkeypatch.setattr("lavis_lite.datasets.layout.SPREAD", 5)  # so every second row, each of them good
    assert check(str(tmp_path / "own.yaml")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "own train: 10 rows, 5 of 5 pictures looked for are there"
    assert lines[1].startswith("own train: 5 rows can't be used, for example ") and "000000001" in lines[1]


def test_what_is_whole_passes(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(cache / "cc3m" / "shards", 2, 3)
    assert check("cc3m") == 0
    told = "cc3m train: 6 rows, 0% of the 3,318,333 published, 6 of 6 pictures looked for are there\n"
    assert capsys.readouterr().out == told
    make_jsonl(tmp_path / "files", 4)
    own = {"root": str(tmp_path / "files"), "train": {"annotations": "rows.jsonl", "images": "images"}}
    (tmp_path / "own.yaml").write_text(json.dumps({"datasets": {"own": own}}))
    assert check(str(tmp_path / "own.yaml"), "--all") == 0
    assert capsys.readouterr().out == "own train: 4 rows, 4 of 4 pictures looked for are there\n"


def test_rows_that_options_choose_are_not_compared_with_the_preset_s(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cache / "vqav2"
    save_picture(folder / "images/test2015/COCO_test2015_000000000001.jpg", 1)
    asked = {"questions": [{"image_id": 1, "question": "what?", "question_id": 10}]}
    for part in ("test-dev2015", "test2015"):
        (folder / f"v2_OpenEnded_mscoco_{part}_questions.json").write_text(json.dumps(asked))
    alone = ["datasets.vqav2.train=null", "datasets.vqav2.val=null"]
    whole = f"datasets.vqav2.test.questions={folder}/v2_OpenEnded_mscoco_test2015_questions.json"
    assert check("vqav2", "--options", *alone, "datasets.vqav2.test.images=images") == 1
    assert "there should be 107,394" in capsys.readouterr().out
    for other in (whole, "datasets.vqav2.test.limit=1", "datasets.vqav2.limit=1"):
        assert check("vqav2", "--options", *alone, other) == 0
        told = capsys.readouterr().out
        assert told.endswith(
            "not compared with a count: the options ask for other rows than the preset has\n"
        )


def test_a_stream_is_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "shards", 2, 3)
    train = {"shards": f"pipe:cat {tmp_path}/shards/{{00000..00001}}.tar", "samples": 12345}
    own = {"builder": "shards", "train": train}
    (tmp_path / "own.yaml").write_text(json.dumps({"datasets": {"own": own}}))
    assert check(str(tmp_path / "own.yaml")) == 0
    told = capsys.readouterr().out
    assert (
        "own train: a stream of 2 shards" in told
        and "not counted: `lavis-lite shards check` reads it" in told
    )
    assert "12,345" not in told


def test_the_embedded_world_is_drawn_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"datasets.shapes_caption.{split}=3" for split in ("train", "val", "test")]
    assert check("shapes_caption", "--options", *small) == 0
    told = capsys.readouterr().out
    assert (
        told.count("3 rows, 3 of 3 pictures") == told.count("not compared with a count: drawn, as many") == 3
    )


def test_an_unknown_name_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("coco_captions") == 2
    assert "did you mean 'coco_caption'" in capsys.readouterr().err

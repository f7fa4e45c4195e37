"""Every annotation format gives the same rows, a broken file one clear line; tables stay out of memory."""

from __future__ import annotations

import csv
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import save_picture

from lavis_lite.common.errors import DataError
from lavis_lite.datasets.readers import Fields
from lavis_lite.datasets.records import RecordTable, Source, open_records


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def table(path: Path, **options: Any) -> RecordTable:
    return open_records(Source(annotations=path, images=path.parent, **options))


def rows(path: Path, **options: Any) -> list[tuple[str, list[str]]]:
    return [(record.image, record.captions) for record in table(path, **options)]


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


EXPECTED = [("a.jpg", ["a cat", "ein Kätzchen"]), ("b/c.png", ['two dogs, "running"'])]
RECORDS = [{"image": image, "caption": captions} for image, captions in EXPECTED]
SINGLE = [{"url": image, "text": text} for image, texts in EXPECTED for text in texts]
SINGLE_EXPECTED = [(image, [text]) for image, texts in EXPECTED for text in texts]
MAPPED = {"fields": Fields(image="url", caption="text")}


def test_lists_of_captions_in_json_jsonl_and_parquet(tmp_path: Path) -> None:
    write(tmp_path / "a.json", RECORDS)
    write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(record) for record in RECORDS) + "\n")
    write(tmp_path / "lines.json", "\n".join(json.dumps(record) for record in RECORDS))
    pq.write_table(
        pa.Table.from_pylist([{**r, "bytes": b"\xff\x00"} for r in RECORDS]), tmp_path / "a.parquet"
    )
    for name in ("a.json", "a.jsonl", "lines.json", "a.parquet"):
        assert rows(tmp_path / name) == EXPECTED, name


def test_single_captions_with_a_field_map_in_every_format(tmp_path: Path) -> None:
    write(tmp_path / "a.json", SINGLE)
    write(tmp_path / "a.jsonl", "\n".join(json.dumps(record) for record in SINGLE))
    pq.write_table(pa.Table.from_pylist(SINGLE), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:  # as spreadsheets save it
        writer = csv.DictWriter(file, ["url", "text"])
        writer.writeheader()
        writer.writerows(SINGLE)
    write(tmp_path / "a.tsv", "text\turl\n" + "".join(f"{r['text']}\t{r['url']}\n" for r in SINGLE))
    for name in ("a.json", "a.jsonl", "a.parquet", "a.csv", "a.tsv"):
        assert rows(tmp_path / name, **MAPPED) == SINGLE_EXPECTED, name


def test_csv_fields_may_hold_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'image,caption\na.jpg,"two\nlines"\nb.jpg,one\n')
    assert rows(path) == [("a.jpg", ["two\nlines"]), ("b.jpg", ["one"])]


def test_coco_is_grouped_by_picture_in_the_order_of_images(tmp_path: Path) -> None:
    content = {
        "images": [
            {"id": 9, "file_name": "9.jpg"},
            {"id": 4, "file_name": "4.jpg"},
            {"id": 5, "file_name": "5.jpg"},
        ],
        "annotations": [
            {"image_id": 4, "caption": "four one"},
            {"image_id": 9, "caption": "nine"},
            {"image_id": 4, "caption": "four two\n"},
        ],
    }
    found = table(write(tmp_path / "captions.json", content))
    assert [tuple(record) for record in found] == [
        ("9.jpg", ["nine"], 9, None, None, None),
        ("4.jpg", ["four one", "four two"], 4, None, None, None),
    ]


def test_a_group_is_read_from_the_declared_field_in_every_format(tmp_path: Path) -> None:
    images = [
        {"id": n, "file_name": f"{n}.jpg", "domain": domain} for n, domain in enumerate(["in", "out", ""])
    ]
    coco = {"images": images, "annotations": [{"image_id": n, "caption": "a"} for n in range(3)]}
    entries = [{"filename": "a.jpg", "sentences": [{"raw": "a"}], "domain": 7}]
    listed = [
        {"image": "a.jpg", "caption": "one", "where": "in"},
        {"image": "a.jpg", "caption": "", "where": "x"},
    ]

    def groups(content: Any, name: str, field: str | None) -> list[str | None]:
        found = table(
            write(tmp_path / f"{name}.json", content), fields=Fields(group=field), group_by_image=True
        )
        return [record.group for record in found]

    assert groups(coco, "coco", "domain") == ["in", "out", None]
    assert groups(coco, "ungrouped", None) == [None] * 3
    assert groups({"images": entries}, "karpathy", "domain") == ["7"]
    assert groups(listed, "listed", "where") == ["in"]
    with pytest.raises(
        DataError, match=r"no field 'domian' for the group.*did you mean 'domain'.*fields\.group"
    ):
        groups(coco, "mistyped", "domian")


def test_karpathy_file_with_a_selected_split(tmp_path: Path) -> None:
    def image(number: int, split: str) -> dict[str, Any]:
        sentences = [{"raw": f"sentence {number}"}, {"raw": "other"}]
        return {
            "filepath": "val2014",
            "filename": f"{number}.jpg",
            "cocoid": number,
            "split": split,
            "sentences": sentences,
        }

    path = write(
        tmp_path / "dataset_coco.json", {"images": [image(1, "train"), image(2, "restval"), image(3, "test")]}
    )
    found = table(path, select={"split": ["train", "restval"]})
    assert [(record.image, record.image_id) for record in found] == [
        ("val2014/1.jpg", 1),
        ("val2014/2.jpg", 2),
    ]
    assert found[0].captions == ["sentence 1", "other"]
    with pytest.raises(DataError, match=r"no rows with datasets\.custom\.train\.where"):
        table(path, select={"split": ["dev"]})
    with pytest.raises(DataError, match="no field 'splti'"):
        table(path, select={"splti": ["train"]})


def test_karpathy_row_list_joins_rows_of_a_picture_on_request(tmp_path: Path) -> None:
    content = [
        {"image": "a.jpg", "caption": "one", "image_id": "coco_1"},
        {"image": "b.jpg", "caption": "two", "image_id": "coco_2"},
        {"image": "a.jpg", "caption": "three", "image_id": "coco_1"},
    ]
    path = write(tmp_path / "karpathy.json", content)
    apart = table(path)
    assert len(apart) == 3 and apart[0].image_id == apart[2].image_id != apart[1].image_id
    assert rows(path, group_by_image=True) == [("a.jpg", ["one", "three"]), ("b.jpg", ["two"])]


def test_a_row_for_each_caption_on_request(tmp_path: Path) -> None:
    content = [
        {"image": "a.jpg", "caption": ["one", "two"], "image_id": 7},
        {"image": "b.jpg", "caption": ["three"], "image_id": None},
        {"image": "c.jpg", "caption": ["four", "five"], "image_id": None},
        {"image": "d.jpg", "caption": [], "image_id": None},
    ]
    found = table(write(tmp_path / "a.json", content), split_captions=True)
    whole = [(record.image, record.captions) for record in found]
    assert whole[:5] == [
        (f"{n}.jpg", [t]) for n, t in zip("aabcc", ["one", "two", "three", "four", "five"], strict=True)
    ]
    assert [record.image_id for record in found][:5] == [7, 7, None, -3, -3]
    assert len(found) == 6 and not found[5].captions  # told as unreadable, not lost
    parted = table(tmp_path / "a.json", split_captions=True, limit=1)
    assert len(parted) == 1 and parted[0].captions == ["one"]


def test_declared_numbers_are_kept_and_absent_ones_are_null(tmp_path: Path) -> None:
    numbers = [7, "7", 7.0, 2**62 + 1, "picture 7"]
    content = [{"image": "a.jpg", "caption": "x", "image_id": number} for number in numbers]
    found = [record.image_id for record in table(write(tmp_path / "a.json", content))]
    assert found[:4] == [7, 7, 7, 2**62 + 1]
    assert 0 <= found[4] < 2**63
    assert table(write(tmp_path / "b.json", RECORDS))[0].image_id is None


def test_folder_of_pictures_with_text_beside_them(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for name in ("b/2.png", "1.jpg", "no_text.jpg", "latin.jpg", ".hidden/3.jpg"):
        save_picture(root / name)
    (root / "1.txt").write_text("first\n\nsecond\n", encoding="utf-8")
    (root / "b" / "2.txt").write_text("third", encoding="utf-8")
    (root / "latin.txt").write_bytes("Kätzchen".encode("latin1"))
    source = Source(annotations=None, images=root)
    found = {record.image: record for record in open_records(source)}
    assert list(found) == ["1.jpg", "latin.jpg", "no_text.jpg", os.path.join("b", "2.png")]
    assert found["1.jpg"].captions == ["first", "second"]
    assert f"{root / 'latin.txt'} is not valid UTF-8 (byte 1)" in (found["latin.jpg"].problem or "")
    assert "no caption file" in (found["no_text.jpg"].problem or "")
    # Other files in it, which a viewer or a run leaves there, make no other table; a picture does.
    before = open_records(source).path
    (root / "Thumbs.db").write_bytes(b"")
    (root / "b" / "results.json").write_text("{}")
    assert open_records(source).path == before
    save_picture(root / "z.jpg")
    assert open_records(source).path != before
    (root / "z.jpg").unlink()
    # An edited text is noticed although its folder's time stays.
    (root / "latin.txt").write_text("kitten", encoding="utf-8")
    assert [record.captions for record in open_records(source)][1] == ["kitten"]


def test_an_unchanged_file_is_not_converted_again_and_a_changed_one_is(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.json", RECORDS)
    first = table(path).path
    written = first.stat().st_mtime_ns
    assert table(path).path == first and first.stat().st_mtime_ns == written
    write(path, RECORDS[:1])
    assert rows(path) == EXPECTED[:1]
    assert table(path, limit=1).path not in (first, table(path).path)
    assert not [p for p in (cache / "tables").iterdir() if p.name.startswith(".tmp")]


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(RECORDS[0]) + "\n{broken\n")
    with pytest.raises(DataError):
        table(path)
    assert list((cache / "tables").iterdir()) == []


GOOD = b'{"image": "a.jpg", "caption": "x"}\n'
INSTANCES = b'{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": [0]}]}'
USED = r"datasets\.custom\.train"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            GOOD + b'{"image": "b.jpg", "caption": "K\xe4t"}\n',
            r"a\.jsonl, line 2: not valid UTF-8 \(byte 0xe4\).*iconv",
        ),
        ("a.csv", b"image,caption\na.jpg,x\nb.jpg,K\xe4t\n", r"a\.csv, line 3: not valid UTF-8"),
        ("a.json", b'[{"image": "a.jpg",\n "caption": "K\xe4t"}]', r"a\.json, line 2: not valid UTF-8"),
        (
            "a.json",
            b'[{"image": "a.jpg",\n "caption" "x"}]',
            r"json, line 2, column 12: broken json: Expecting ':'",
        ),
        ("a.jsonl", GOOD + b'{"image": "b.jpg"\n', r"a\.jsonl, line 2, column \d+: broken json"),
        ("a.jsonl", b'["a.jpg", "x"]\n', r"line 1: expected an object with fields, got list"),
        (
            "a.jsonl",
            b'{"picture": "a.jpg", "caption": "x"}\n',
            r"no field 'image' for the image; fields there: picture, caption; "
            rf"say which one it is with {USED}\.fields\.image=<field>",
        ),
        (
            "a.jsonl",
            GOOD + b'{"image": "b.jpg", "title": "x"}\n',
            r"line 2: no field 'caption' for the caption",
        ),
        ("a.jsonl", b'{"image": 5, "caption": "x"}\n', r"line 1: the picture's path is int, not text"),
        (
            "a.jsonl",
            b'{"image": "a", "caption": ["x", 3]}\n',
            r"line 1: the caption must be text or a list of",
        ),
        ("a.csv", b"image,caption\na.jpg,x,y\n", r"line 2: more values than the header has names"),
        ("a.csv", b'image,caption\na.jpg,"x" y\n', r"a\.csv, line 2: "),
        ("a.json", b'{"images": [], "annotations": []}', rf"no rows \({USED}\)"),
        (
            "a.json",
            INSTANCES,
            r"no field 'caption'; fields there: image_id, bbox; this is not a captions file",
        ),
        (
            "a.json",
            b'{"rows": 5}',
            r"expected a list of rows, or COCO's 'images' and 'annotations'; got: rows",
        ),
        ("a.parquet", b"PAR1 no", r"a\.parquet, about row 0"),
        ("a.xlsx", b"", r"unknown suffix '\.xlsx'; name its format: json, jsonl, csv, tsv, parquet"),
        ("a.jsonl", b"", r"a\.jsonl: no rows"),
    ],
)
def test_broken_annotation_files_say_where_and_what(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        table(tmp_path / name)
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_rows_without_a_usable_caption_are_problems_not_errors(tmp_path: Path) -> None:
    content = [
        {"image": "a.jpg", "caption": " "},
        {"image": "b.jpg", "caption": None},
        {"image": "", "caption": "x"},
        {"image": "c.jpg", "caption": "broken \ud800 text"},
        {"image": "d.jpg", "caption": ["", "fine"]},
    ]
    found = list(table(write(tmp_path / "a.json", content)))
    assert [record.problem is None for record in found] == [False, False, False, False, True]
    assert found[4].captions == ["fine"]
    assert "row 0: the caption is empty" in (found[0].problem or "")


def test_an_unwritable_cache_names_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "file", "")
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set LAVIS_LITE_CACHE to a folder with room"):
        table(write(tmp_path / "a.json", RECORDS))


MEASURE = """
import json, resource, sys
from pathlib import Path
import pyarrow as pa
from lavis_lite.datasets.records import Source, open_records
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table = open_records(Source(annotations=path, images=path.parent))
converted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
held = pa.total_allocated_bytes()
total = sum(len(table[row].captions[0]) for row in range(0, len(table), 7))
print(json.dumps({"rows": len(table), "grown_mb": (converted - before) / 1024, "held": held}))
"""


def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    """200,000 rows: converted piece by piece, held in no memory of Arrow's own, pickled as a path."""
    path = tmp_path / "many.jsonl"
    line = json.dumps(
        {"image": "folder/%06d.jpg", "caption": "a caption of usual length about picture %06d and more"}
    )
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(line % (row, row) + "\n" for row in range(200_000))
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    measured = json.loads(run.stdout)
    assert measured["rows"] == 200_000
    assert measured["held"] < 1 << 20, measured  # the table is 20 MB
    assert measured["grown_mb"] < 60, measured  # all rows as Python objects: over 100 MB
    assert time.perf_counter() - start < 60
    opened = table(path)
    assert len(pickle.dumps(opened)) < 1000
    assert pickle.loads(pickle.dumps(opened))[199_999] == opened[199_999]
    assert opened[199_999].image == "folder/199999.jpg"

"""Local tar shards: a dataset like any other, whatever is broken in them."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import make_jsonl, warnings_logged
from shard_helpers import jpeg, number_in, sample, section, write_shards

from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.builders import build_datasets
from lavis_lite.datasets.images import decode_image
from lavis_lite.datasets.loader import TrainLoader
from lavis_lite.datasets.order import mixed
from lavis_lite.datasets.shard_check import check_shards, check_streams
from lavis_lite.datasets.shard_rows import SampleForm
from lavis_lite.datasets.shard_urls import expand
from lavis_lite.datasets.shards import index_path, read_index, rows_of_shards, scan_shard, write_index
from lavis_lite.datasets.tar_members import Address, read_member, samples_of, split_name
from lavis_lite.datasets.tar_streams import stream_samples


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))


def build(pattern: str, **train: Any) -> Any:
    return build_datasets({"web": section(pattern, **train)})["web"]["train"]


def take(loader: TrainLoader, count: int, start: int = 0) -> list[dict[str, Any]]:
    return list(itertools.islice(loader.batches(start), count))


def captions(batches: list[dict[str, Any]]) -> list[int]:
    return [number_in(text) for batch in batches for text in batch["text_input"]]


def test_shards_give_what_their_files_would(tmp_path: Path) -> None:
    data = build(write_shards(tmp_path / "shards", 3, 4))
    assert len(data) == 12
    make_jsonl(tmp_path, 12)
    for number in (0, 5, 11):
        row = data[number]
        assert row["captions"] == [f"row {number} caption 0", f"row {number} caption 1"]
        assert row["image"].tobytes() == data.image(number).tobytes()
        assert abs(row["image"].getpixel((20, 15))[0] - number * 37 % 256) < 4
    files = build_datasets(
        {
            "web": {
                "train": {"annotations": str(tmp_path / "rows.jsonl"), "images": str(tmp_path / "images")},
                "vis_processor": section("")["vis_processor"],
            }
        }
    )["web"]["train"]
    for mine, theirs in zip(
        take(TrainLoader([data], batch_size=4), 6), take(TrainLoader([files], batch_size=4), 6), strict=True
    ):
        assert mine["text_input"] == theirs["text_input"] and torch.equal(mine["image"], theirs["image"])


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"txt": b"one\n\n two \n"}, ["one", "two"]),
        ({"txt": b"ignored", "json": b'{"caption": "one"}'}, ["one"]),
        ({"txt": b"web", "json": b'{"url": "x", "width": 3}'}, ["web"]),
        ({"json": b'{"caption": "web", "captions": ["one", "two"]}'}, ["one", "two"]),
        ({"json": b'{"caption": "web", "captions": []}', "txt": b"ignored"}, ["web"]),
        ({"json": b'{"captions": []}', "txt": b"web"}, ["web"]),
        ({"json": b'{"caption": "", "text": " "}', "txt": b"web"}, ["web"]),
    ],
)
def test_captions_come_from_json_or_txt(
    tmp_path: Path, members: dict[str, bytes], expected: list[str]
) -> None:
    data = build(write_shards(tmp_path, 1, 1, make=lambda number: {"jpg": jpeg(number), **members}))
    assert data[0]["captions"] == expected


def test_other_names_and_pictures_are_configured(tmp_path: Path) -> None:
    def make(number: int) -> dict[str, bytes]:
        about = json.dumps({"alt": f"row {number}", "image_id": 7, "caption": "no"}).encode()
        return {"seg.png": b"no picture", "left.jpg": jpeg(number), "json": about}

    pattern = write_shards(tmp_path, 1, 3, make=make)
    data = build(pattern, image="left.jpg", fields={"caption": "alt"})
    assert [data[row]["captions"] for row in range(3)] == [["row 0"], ["row 1"], ["row 2"]]
    assert {data[row]["image_id"] for row in range(3)} == {7}
    with pytest.raises(
        DataError, match=r"none of the samples .* no picture among its members \(json, left\.jpg, seg"
    ):
        build(pattern)


def test_a_broken_tar_gives_what_is_before_the_break_and_counts_once(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 3, 20)
    broken = tmp_path / "00001.tar"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    (tmp_path / "00002.tar").write_bytes(b"\x00garbage" * 300)
    with warnings_logged() as lines:
        data = build(pattern)
    assert len(lines) == 2 and "00001.tar" in lines[0] and "00002.tar" in lines[1]
    assert 25 < len(data) < 40
    rows = {number_in(data.captions(row)[0]) for row in range(len(data)) if data.captions(row)}
    assert rows == set(range(len(data) - 2))
    loader = TrainLoader([data], batch_size=len(data) // 2, max_bad_fraction=0.2)
    with warnings_logged() as lines:
        seen = captions(take(loader, 4))
    assert len(seen) == 4 * (len(data) // 2) and loader.bad_images > 0
    assert any("00001.tar: it" in line for line in lines) and all("replaced" in line for line in lines)


def test_a_broken_member_is_replaced_like_an_unreadable_picture(tmp_path: Path) -> None:
    def make(number: int) -> dict[str, bytes]:
        return {**sample(number), **({"jpg": b"not a picture"} if number == 3 else {})}

    loader = TrainLoader(
        [build(write_shards(tmp_path, 2, 10, make=make))], batch_size=10, max_bad_fraction=0.3
    )
    with warnings_logged() as lines:
        seen = captions(take(loader, 4))
    assert 3 not in seen and len(seen) == 40 and loader.bad_images >= 2
    assert len(lines) == 1 and "00000.tar::000000003.jpg@" in lines[0] and lines[0].endswith("not a picture")
    strict = TrainLoader([build(f"{tmp_path}/*.tar")], batch_size=10, max_bad_fraction=0)
    with pytest.raises(DataError, match=r"run\.max_bad_fraction"):
        take(strict, 4)


def test_the_order_is_a_function_of_seed_and_epoch_and_ranks_share_it(tmp_path: Path) -> None:
    data = build(write_shards(tmp_path, 3, 8))
    whole = take(TrainLoader([data], batch_size=6), 8)
    epochs = [captions(whole[:4]), captions(whole[4:])]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs) and epochs[0] != epochs[1]
    assert captions(take(TrainLoader([data], batch_size=6, seed=1), 4)) != epochs[0]
    ranks = [
        take(TrainLoader([data], batch_size=3, rank=rank, world_size=2, num_workers=rank), 8)
        for rank in (0, 1)
    ]
    for number, batch in enumerate(whole):
        parts = [rank[number] for rank in ranks]
        assert parts[0]["text_input"] + parts[1]["text_input"] == batch["text_input"]


def test_resuming_in_mid_epoch_is_bit_exact(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 3, 8)
    whole = take(TrainLoader([build(pattern)], batch_size=5), 9)
    rest = take(TrainLoader([build(pattern)], batch_size=5, num_workers=2), 6, start=3)
    for first, second in zip(whole[3:], rest, strict=True):
        assert first["text_input"] == second["text_input"]
        assert torch.equal(first["image"], second["image"]) and torch.equal(first["index"], second["index"])


def test_a_shard_changed_after_it_was_indexed_is_noticed(tmp_path: Path) -> None:
    write_shards(tmp_path, 1, 3)
    (first, second, _) = samples_of(tmp_path / "00000.tar")
    address = second.members["jpg"]
    assert Address.parse(str(address)) == address and read_member(address) == jpeg(1)
    assert Address.parse("photos/a.jpg") is None and Address.parse("a.tar") is None
    with pytest.raises(UnreadableSample, match="was changed after"):
        read_member(address._replace(offset=first.members["json"].offset))
    with pytest.raises(UnreadableSample, match="ends before its member"):
        read_member(address._replace(size=1 << 20))
    with pytest.raises(UnreadableSample, match="No such file"):
        read_member(address._replace(tar="nowhere.tar"))


def test_long_names_and_odd_members(tmp_path: Path) -> None:
    key = "folder.with.dots/" + "x" * 150
    write_shards(tmp_path, 1, 1, make=lambda number: {"jpg": jpeg(number), "txt": b"one"})
    with tarfile.open(tmp_path / "long.tar", "w") as archive:
        archive.add(tmp_path, arcname="folder.with.dots", recursive=False)
        for name, data in ((f"{key}.JPG", jpeg(0)), (f"{key}.txt", "größer".encode()), ("noextension", b"?")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    data = build(str(tmp_path / "long.tar"))
    assert data[0]["captions"] == ["größer"] and len(data) == 1
    assert split_name("a.b/c.seg.PNG") == ("a.b/c", "seg.png") and split_name("a.b/c") is None


@pytest.mark.parametrize("second", [("jpg", "json"), ("json", "jpg"), ("jpg", "txt")])
def test_neighbours_with_one_key_are_two_samples(tmp_path: Path, second: tuple[str, str]) -> None:
    texts = [json.dumps({"caption": "one"}).encode(), b"two" if "txt" in second else b'{"caption": "two"}']
    shard = tmp_path / "00000.tar"
    with tarfile.open(shard, "w") as archive:
        for number, extensions in enumerate((("jpg", "json"), second)):
            for extension in extensions:
                data = jpeg(number) if extension == "jpg" else texts[number]
                info = tarfile.TarInfo(f"000.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    data = build(str(shard))
    assert [data[row]["captions"] for row in range(len(data))] == [["one"], ["two"]]
    pictures = [data.image(row).tobytes() for row in range(2)]
    assert pictures == [decode_image(io.BytesIO(jpeg(number)), "").tobytes() for number in range(2)]
    streamed = [set(sample.members) for sample in stream_samples(f"pipe:cat {shard}")]
    assert streamed == [{"jpg", "json"}, set(second)]
    members = [sample.members["jpg"] for sample in stream_samples(f"pipe:cat {shard}")]
    assert members == [jpeg(0), jpeg(1)]
    for report in (
        *check_shards([str(shard)], SampleForm()),
        *check_streams([f"pipe:cat {shard}"], SampleForm()),
    ):
        assert report.samples == 2 and report.bad == ["sample 000: its key comes 2 times"]


def test_the_index_beside_a_shard_is_used_while_it_fits(tmp_path: Path) -> None:
    write_shards(tmp_path, 1, 5)
    shard = tmp_path / "00000.tar"
    assert read_index(shard) is None
    assert write_index(shard) == 5 and index_path(shard).name == "00000.arrow"
    scanned = scan_shard(shard, SampleForm())
    assert read_index(shard) == scanned
    os.utime(shard, (1, 1))  # a copy
    assert read_index(shard) == scanned
    write_shards(tmp_path, 1, 6)
    assert read_index(shard) is None
    assert len(next(rows_of_shards([shard], SampleForm()))) == 6
    index_path(shard).write_bytes(b"broken")
    assert read_index(shard) is None


def test_many_shards_are_indexed_by_several_processes_with_the_same_result(tmp_path: Path) -> None:
    write_shards(tmp_path, 17, 2)
    shards = sorted(tmp_path.glob("*.tar"))
    alone = [scan_shard(shard, SampleForm()) for shard in shards]
    assert list(rows_of_shards(shards, SampleForm())) == alone


def test_missing_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, 2, 3)
    with warnings_logged() as lines:
        assert len(build(f"{tmp_path}/{{00000..00004}}.tar")) == 6
    assert lines == [f"dataset 'web': 3 of 5 shards are missing, for example {tmp_path}/00002.tar"]
    with pytest.raises(DataError, match=r"no shard .*/7\.tar; set datasets\.web\.train\.shards=<path>"):
        build(f"{tmp_path}/{{7..9}}.tar")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({}, r"datasets\.web\.train: set datasets\.web\.train\.shards to tar files"),
        ({"shards": "a.tar", "shuffle": 0}, r"datasets\.web\.train\.shuffle must be at least 1"),
        ({"shards": "http://x/a.tar"}, r"datasets\.web\.train\.samples: how many samples"),
        ({"shards": "a.tar.gz", "stream": False, "samples": 3}, r"stream=false: only local \.tar"),
        ({"shards": "pipe:cat a.tar", "samples": 3, "limit": 1}, r"a stream knows neither"),
        ({"shard": "a.tar"}, r"unknown key 'datasets\.web\.train\.shard'.*'shards'"),
    ],
)
def test_mistakes_are_one_line(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_datasets({"web": {"builder": "shards", "train": train or {"limit": None}}})


def test_a_stream_is_no_evaluation_split() -> None:
    with pytest.raises(ConfigError, match=r"datasets\.web\.val: a stream is for training"):
        build_datasets({"web": {"builder": "shards", "val": {"shards": "http://x/a.tar", "samples": 3}}})


def test_shards_and_files_are_mixed_by_ratio(tmp_path: Path) -> None:
    make_jsonl(tmp_path / "files", 30, captions=1)
    mix = {
        "web": {**section(write_shards(tmp_path / "shards", 2, 30)), "ratio": 3},
        "files": {
            "train": {
                "annotations": str(tmp_path / "files/rows.jsonl"),
                "images": str(tmp_path / "files/images"),
            },
            "vis_processor": section("")["vis_processor"],
            "ratio": 1,
        },
    }
    built = build_datasets(mix)
    datasets = [built["web"]["train"], built["files"]["train"]]
    names = {0: "web", 1: "files"}
    ids = {
        name: {
            built[name]["train"]._image_id(row, built[name]["train"].record(row))
            for row in range(60 - 30 * n)
        }
        for n, name in names.items()
    }
    batches = take(TrainLoader(datasets, [3, 1], batch_size=2, seed=5), 24)
    drawn = [name for batch in batches for name in ids if ids[name] >= set(batch["image_id"].tolist())]
    expected = [names[number] for number, _ in itertools.islice(mixed([3, 1], seed=5), 24)]
    assert drawn == expected and {"web", "files"} == set(expected)


def test_patterns_stand_for_the_same_shards_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "web[1]"  # glob takes it for web1
    folder.mkdir()
    for name in ("00.tar", "01.tar", "{x}.tar"):
        (folder / name).touch()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("WEB", str(folder))
    both = [str(folder / "00.tar"), str(folder / "01.tar")]
    for pattern in (
        "{00..01}.tar",
        "0*.tar",
        "0?.tar",
        "00.tar::01.tar",
        "~/{00..01}.tar",
        "$WEB/{00..01}.tar",
    ):
        assert expand(pattern, folder) == both, pattern
    assert expand("{x}.tar", folder) == [str(folder / "{x}.tar")]
    assert expand("9*.tar", folder) == [str(folder / "9*.tar")] and expand("9.tar") == ["9.tar"]
    assert expand("pipe:cat ~/{0..1}.tar", folder) == ["pipe:cat ~/0.tar", "pipe:cat ~/1.tar"]
    assert expand("{x}.tar::00.tar", folder) == [str(folder / "{x}.tar"), both[0]]
    many = "::".join(["00.tar", "01.tar"] * 1000)  # joined, longer than a file's name may be
    assert expand(many, folder) == both * 1000
    assert expand("https://x/{0..1}.tar::a.tar", folder)[1:] == ["https://x/1.tar", str(folder / "a.tar")]


def test_rows_known_to_be_unusable_are_told_of_or_end_the_run_before_it_begins(tmp_path: Path) -> None:
    def make(number: int) -> dict[str, bytes]:
        return {**sample(number), **({} if number % 6 == 0 else {"json": b"{}"})}

    data = build(write_shards(tmp_path / "most", 2, 60, make=make))
    assert data.problems()[0] == 100
    with pytest.raises(
        DataError, match=r"'web': 100 of 120 rows \(83\.3%\) can't be used, .*no caption .*fraction=0\.01"
    ):
        TrainLoader([data], batch_size=4)
    with warnings_logged() as lines:
        TrainLoader([data], batch_size=4, max_bad_fraction=0.9)
        TrainLoader([data], batch_size=4, max_bad_fraction=0.9, rank=1, world_size=2)
    assert len(lines) == 1 and "100 of 120 rows (83.3%) can't be used" in lines[0]
    # A mix that hardly draws it is as good as its draws are.
    good = build_datasets({"good": section(write_shards(tmp_path / "good", 1, 120))})["good"]["train"]
    with pytest.raises(DataError):
        TrainLoader([data, good], [1, 1], batch_size=4, max_bad_fraction=0.2)
    TrainLoader([data, good], [1, 9], batch_size=4, max_bad_fraction=0.2)
    # The error names where most of them come from, and what is never drawn is no matter.
    few = lambda number: {**sample(number), **({"json": b"{}"} if number % 6 == 0 else {})}  # noqa: E731
    other = build_datasets({"few": section(write_shards(tmp_path / "few", 1, 120, make=few))})["few"]["train"]
    for mix in ([other, data], [data, other]):
        with pytest.raises(DataError, match="'web': 100 of 120 rows"):
            TrainLoader(mix, batch_size=4)
    with warnings_logged() as lines:
        TrainLoader([data, good], [0, 1], batch_size=4)
    assert not lines


def test_samples_without_a_question_are_told_of(tmp_path: Path) -> None:
    def make(number: int) -> dict[str, bytes]:
        about = {"question": "what?", "answers": ["a"]} if number % 2 else {"caption": "a dog"}
        return {"jpg": jpeg(number), "json": json.dumps(about).encode()}

    pattern = write_shards(tmp_path, 1, 16, make=make)
    with warnings_logged() as lines:
        build_datasets({"asked": {"builder": "vqa_shards", "train": {"shards": pattern}}})
    assert (
        len(lines) == 1 and "'asked': 8 of 16 samples looked up in" in lines[0] and "no question" in lines[0]
    )

"""`lavis-lite shards make` and `check`: every dataset goes in and comes out again, whatever happens on the way."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from data_helpers import make_jsonl, warnings_logged
from shard_helpers import jpeg, number_in, sample, section, write_shards

from lavis_lite.commands.shards import shards_main
from lavis_lite.common.locks import locked
from lavis_lite.common.logging import duration
from lavis_lite.datasets import shard_writer
from lavis_lite.datasets.builders import build_datasets
from lavis_lite.datasets.named import build_named_split
from lavis_lite.datasets.tar_streams import stream_samples

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A project file with one dataset of 23 pictures."""
    make_jsonl(tmp_path / "files", 23)
    path = tmp_path / "mine.yaml"
    content = {
        "datasets": {"mine": {"root": str(tmp_path / "files"), "train": {"annotations": "rows.jsonl"}}}
    }
    content["datasets"]["mine"]["train"]["images"] = "images"
    path.write_text(json.dumps(content))
    return path


def make(source: Path | str, out: Path, *options: str) -> None:
    shards_main(["make", str(source), "--out", str(out), "--samples-per-shard", "5", *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read_back(folder: Path) -> Any:
    return build_datasets({"web": section(f"{folder}/*.tar")})["web"]["train"]


def test_what_goes_in_comes_out(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(source, tmp_path / "out", "--workers", "2")
    assert "23 samples of 23 rows in 5 shards" in capsys.readouterr().out
    names = [f"{number:05}.{suffix}" for number in range(5) for suffix in ("arrow", "tar")]
    assert sorted(contents(tmp_path / "out")) == sorted([*names, ".lock", "index.json"])
    before, after = build_named_split(str(source), "train"), read_back(tmp_path / "out")
    assert len(after) == 23
    for row in range(23):
        assert after[row]["captions"] == before[row]["captions"]
        assert after[row]["image"].tobytes() == before[row]["image"].tobytes()
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert [entry["nsamples"] for entry in index["shardlist"]] == [5, 5, 5, 5, 3]


@pytest.mark.parametrize("level", [logging.NOTSET, logging.DEBUG])
def test_what_is_logged_of_datasets_is_as_before_afterwards(
    level: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("lavis_lite.datasets")
    monkeypatch.setattr(logger, "level", logger.level)
    logger.setLevel(level)
    make(source, tmp_path / "out")
    assert logger.level == level
    with pytest.raises(SystemExit):
        make("nothing_like_it", tmp_path / "other")
    assert logger.level == level


def test_the_shards_do_not_depend_on_workers_and_can_be_shuffled(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "one")
    make(source, tmp_path / "two", "--workers", "2")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    make(source, tmp_path / "mixed", "--shuffle", "1")
    order = [read_back(tmp_path / "mixed").captions(row)[0] for row in range(23)]
    assert order != sorted(order, key=lambda text: int(text.split()[1]))
    assert sorted(order) == sorted(f"row {row} caption 0" for row in range(23))


def test_shards_can_be_cut_anew(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "five")
    again = tmp_path / "again.yaml"
    again.write_text(json.dumps({"datasets": {"again": section(f"{tmp_path}/five/*.tar")}}))
    shards_main(["make", str(again), "--out", str(tmp_path / "ten"), "--samples-per-shard", "10"])
    first, second = read_back(tmp_path / "five"), read_back(tmp_path / "ten")
    assert len(list((tmp_path / "ten").glob("*.tar"))) == 3
    assert [first[row]["captions"] for row in range(23)] == [second[row]["captions"] for row in range(23)]
    assert first.image(7).tobytes() == second.image(7).tobytes()


@pytest.mark.parametrize("picture", ["jpg", "png"])  # before and after the .json in the tar
@pytest.mark.parametrize("options", [[], ["--shuffle", "3"]])
def test_shards_that_are_cut_anew_keep_what_else_they_hold(
    tmp_path: Path, picture: str, options: list[str]
) -> None:
    def make_one(number: int) -> dict[str, bytes]:
        about = {
            "text": [f"row {number}"] * 2,
            "url": f"http://{number}",
            "scores": [number],
            "image_id": number,
        }
        if number == 4:
            return {picture: jpeg(number), "txt": b"row 4\nrow 4"}
        extra = {"cls": str(number).encode(), "seg.png": jpeg(number + 50), "gif": b"other", "txt": b"alt"}
        return {picture: jpeg(number), "json": json.dumps(about).encode(), **extra}

    write_shards(tmp_path / "web", 2, 6, make=make_one)
    again = tmp_path / "again.yaml"
    image = {"image": picture, "split_captions": True}
    again.write_text(json.dumps({"datasets": {"again": section(f"{tmp_path}/web/*.tar", **image)}}))
    make(again, tmp_path / "out", *options)
    samples = [
        sample for shard in sorted((tmp_path / "out").glob("*.tar")) for sample in stream_samples(str(shard))
    ]
    numbers = []
    for _, members in samples:
        about = json.loads(members["json"])
        numbers.append(number := number_in(about["captions"][0]))
        assert members[picture] == jpeg(number) and about["captions"] == [f"row {number}"]
        if number == 4:
            assert set(members) == {picture, "json", "txt"} and set(about) <= {"captions", "image_id"}
            continue
        assert set(members) == {picture, "json", "txt", "cls", "seg.png"}
        assert (members["cls"], members["seg.png"]) == (str(number).encode(), jpeg(number + 50))
        assert (about["url"], about["scores"], about["image_id"]) == (f"http://{number}", [number], number)
    assert sorted(numbers) == sorted([*range(12)] * 2) and (numbers == sorted(numbers)) == (not options)


def test_neighbours_of_one_key_keep_their_own_fields_and_members(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "0.tar"), encoder=False) as writer:
        for number in range(3):
            about = json.dumps({"text": f"row {number}", "url": f"http://{number}"}).encode()
            members = {"json": about, "photo.jpg": jpeg(number), "txt": b"alt %d" % number}
            for extension, content in members.items():  # the picture in the middle
                writer.write({"__key__": "k", extension: content})
    again = tmp_path / "again.yaml"
    read = section(f"{tmp_path}/0.tar", image="photo.jpg")
    again.write_text(json.dumps({"datasets": {"again": read}}))
    make(again, tmp_path / "out")
    samples = [s for shard in sorted((tmp_path / "out").glob("*.tar")) for _, s in stream_samples(str(shard))]
    assert [json.loads(members["json"])["url"] for members in samples] == [f"http://{n}" for n in range(3)]
    assert [members["txt"] for members in samples] == [b"alt %d" % n for n in range(3)]


def test_numbers_groups_and_questions_are_kept(tmp_path: Path) -> None:
    make_jsonl(tmp_path, 4)
    rows = [
        {
            "image": f"{row}.jpg",
            "question": f"what {row}?",
            "answer": ["a", "a", "b"],
            "question_id": 70 + row,
        }
        | {"image_id": 9, "answer_type": "other"}
        for row in range(4)
    ]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    train = {"annotations": "questions.json", "images": "images"}
    spec = {"datasets": {"asked": {"builder": "vqa", "root": str(tmp_path), "train": train}}}
    (tmp_path / "asked.yaml").write_text(json.dumps(spec))
    make(tmp_path / "asked.yaml", tmp_path / "out")
    shards = {"builder": "vqa_shards", "train": {"shards": f"{tmp_path}/out/*.tar"}}
    before = build_named_split(str(tmp_path / "asked.yaml"), "train")
    after = build_datasets({"asked": shards})["asked"]["train"]
    for row in range(4):
        one, two = before[row], after[row]
        assert one.pop("image").tobytes() == two.pop("image").tobytes() and one == two
        assert before.record(row).question == after.record(row).question


def test_unreadable_rows_are_left_out_and_told(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "files/images/3.jpg").unlink()
    (tmp_path / "files/images/9.jpg").write_bytes(b"")
    make(source, tmp_path / "out")
    told = capsys.readouterr()
    assert "21 samples of 23 rows" in told.out
    assert "2 rows could not be read and are left out, for example" in told.err and "3.jpg" in told.err
    assert len(read_back(tmp_path / "out")) == 21


def test_a_killed_run_is_taken_up_again(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "whole", "--workers", "1")
    command = [
        sys.executable,
        "-m",
        "lavis_lite.cli",
        "shards",
        "make",
        str(source),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--samples-per-shard", "5", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("*.tar")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "out/.tmp-00004.tar-left-over").write_bytes(b"half")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items())


def test_a_second_process_on_the_same_folder_is_refused_and_breaks_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".tmp-00000.tar-1").write_bytes(b"half of the first one's shard")
    with locked(out / ".lock", what="is the first one"), pytest.raises(SystemExit) as exit_code:
        make(source, out)
    told = capsys.readouterr().err
    assert exit_code.value.code == 1 and told.count("\n") == 1
    assert "another process makes shards in" in told and (out / ".tmp-00000.tar-1").is_file()
    make(source, out)
    assert not (out / ".tmp-00000.tar-1").exists() and len(list(out.glob("*.tar"))) == 5
    with pytest.raises(SystemExit):
        make(source, out / "index.json")
    assert "a file has that name" in capsys.readouterr().err


def test_how_far_it_is_is_told_now_and_then(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "LINE_SECONDS", 0.0)
    make(source, tmp_path / "out")
    lines = [line for line in capsys.readouterr().err.splitlines() if " of 5 shards, " in line]
    assert len(lines) == 4 and lines[0].endswith(" left")


def test_the_time_left_is_reckoned_by_the_shards_made_now(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 5, 10, 110, 210])  # the two that were there took 5 s each
    monkeypatch.setattr(shard_writer.time, "monotonic", lambda: next(clock))
    shards = [shard_writer.Written(f"{number}.tar", 1, 1, "", []) for number in range(4)]
    with warnings_logged(logging.INFO) as lines:
        monkeypatch.setattr(shard_writer, "LINE_SECONDS", 0.0)
        list(shard_writer._told(shards, 4, {"0.tar", "1.tar"}))
    assert lines == ["1 of 4 shards", "2 of 4 shards", f"3 of 4 shards, {duration(100)} left"]


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = """
import os, pathlib, sys, time
from lavis_lite.datasets.shards import in_processes
def work(number):
    pathlib.Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(300)
list(in_processes(work, range(2), 2))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 60
    while len(numbers := [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(_runs(number) for number in numbers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(number: int) -> bool:
    state = Path(f"/proc/{number}/stat")
    with contextlib.suppress(OSError):
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_folder_of_something_else_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(source, tmp_path / "out")
    for arguments in (["--shuffle", "1"], ["--samples-per-shard", "6"]):
        with pytest.raises(SystemExit) as exit_code:
            make(source, tmp_path / "out", *arguments)
        assert exit_code.value.code == 2
        assert "holds shards made with other settings" in capsys.readouterr().err
    write_shards(tmp_path / "others", 1, 1)
    with pytest.raises(SystemExit):
        make(source, tmp_path / "others")
    assert "holds shards that this command didn't make" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coco_captions"], "did you mean 'coco_caption'"),
        (["nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
        (["coco_caption", "--options", "run.seed=3"], "options here are of the form datasets.coco_caption."),
        (["coco_caption", "--split", "tain"], "no split 'tain'"),
        (["nocaps"], "dataset 'nocaps' has no split 'train'; splits: val"),
        (["shapes_caption", "--samples-per-shard", "0"], "--samples-per-shard must be at least 1, got 0"),
    ],
)
def test_mistakes_of_make(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--options", *(f"datasets.shapes_caption.{split}=2" for split in ("train", "val", "test"))]
    options = small if arguments[0] == "shapes_caption" else []
    with pytest.raises(SystemExit) as exit_code:
        shards_main(["make", *arguments, "--out", str(tmp_path / "out"), *options])
    assert exit_code.value.code in (1, 2)
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def check(*arguments: str) -> int:
    try:
        shards_main(["check", *arguments])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_check_finds_nothing_in_whole_shards(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(source, tmp_path / "out")
    capsys.readouterr()
    assert check(f"{tmp_path}/out/*.tar", "--deep") == 0
    assert capsys.readouterr().out == "5 of 5 shards are whole: 23 samples, 46 captions, 0 bad samples\n"
    assert check(f"{tmp_path}/out/{{00000..00004}}.tar", "--readers", "6") == 1
    assert "5 shards are too few for 6 readers" in capsys.readouterr().err
    assert check(f"pipe:cat {tmp_path}/out/{{00000..00004}}.tar") == 0
    assert "5 of 5 shards are whole: 23 samples, 46 captions" in capsys.readouterr().out


def test_check_takes_names_that_begin_with_a_dot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:  # as `tar -C dir .` names them
        for number in range(2):
            for extension, content in sample(number).items():
                info = tarfile.TarInfo(f"./{number}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert check(f"{tmp_path}/00000.tar") == 0, capsys.readouterr().out


def test_check_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def bad(number: int) -> dict[str, bytes]:
        wrong: dict[int, dict[str, bytes]] = {
            1: {"jpg": jpeg(1)},
            2: {"txt": b"no picture"},
            3: {"jpg": jpeg(3), "json": b"{"},
            4: {"jpg": b"no picture", "txt": b"one"},
        }
        return wrong.get(number, sample(number))

    write_shards(tmp_path, 3, 6)
    write_shards(tmp_path, 1, 6, make=bad)
    (tmp_path / "00002.tar").write_bytes((tmp_path / "00002.tar").read_bytes()[:5000])
    assert check(f"{tmp_path}/{{00000..00003}}.tar") == 1
    told = capsys.readouterr().out
    assert "00000.tar: sample 000000001: no .json or .txt among its members (jpg)" in told
    assert "00000.tar: sample 000000002: no picture among its members (txt)" in told
    assert "00000.tar: sample 000000003: broken json" in told
    assert "00002.tar: " in told and "00003.tar: no such file" in told
    assert told.splitlines()[-1].startswith("1 of 4 shards are whole") and "3 bad samples" in told
    assert check(f"{tmp_path}/00000.tar", "--deep") == 1
    assert "and 1 more bad samples" in capsys.readouterr().out
    assert check(f"{tmp_path}/nowhere/*.tar") == 1
    assert "no shard" in capsys.readouterr().err


def test_check_says_of_streams_what_it_says_of_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_one(number: int) -> dict[str, bytes]:
        wrong = {
            1: {"jpg": jpeg(1)},
            4: {"jpg": b"no picture", "txt": b"one"},
            5: {"jpg": jpeg(5), "txt": b""},
        }
        return wrong.get(number, sample(number))

    write_shards(tmp_path, 2, 4, make=make_one)
    with tarfile.open(tmp_path / "00000.tar", "a") as tar:  # the first key again
        info = tarfile.TarInfo("000000000.txt")
        tar.addfile(info, io.BytesIO(b""))
    local, streamed = f"{tmp_path}/{{00000..00001}}.tar", f"pipe:cat {tmp_path}/{{00000..00001}}.tar"
    for options in ([], ["--deep"], ["--deep", "--workers", "2"], ["--caption-field", "alt"]):
        told = []
        for pattern in (local, streamed):
            assert check(pattern, *options) == 1
            told.append(capsys.readouterr().out.replace("pipe:cat ", ""))
        assert told[0] == told[1]
        if "--caption-field" not in options:  # which leaves more to say than is shown
            assert "sample 000000000: its key comes 2 times" in told[0]
        assert ("sample 000000004: not a picture" in told[0]) == ("--deep" in options)
    assert "9 samples, 1 captions, 9 bad samples" in told[0]  # that of a .txt


def test_check_reads_captions_from_the_field_that_training_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_one(number: int) -> dict[str, bytes]:
        return {"jpg": jpeg(number), "json": b'{"alt": "a dog"}'}

    pattern = write_shards(tmp_path, 1, 3, make=make_one)
    assert check(pattern) == 1
    capsys.readouterr()
    for one in (pattern, f"pipe:cat {pattern}", f"{pattern}::pipe:cat {pattern}"):
        assert check(one, "--caption-field", "alt") == 0
        assert "3 captions, 0 bad samples" in capsys.readouterr().out or "::" in one


def test_check_compares_with_the_index(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(source, tmp_path / "out")
    shard = tmp_path / "out/00001.tar"
    content = bytearray(shard.read_bytes())
    content[900] ^= 255
    shard.write_bytes(content)
    assert check(str(shard), "--deep") == 1
    assert "its checksum is not that of index.json" in capsys.readouterr().out
    write_shards(tmp_path / "out", 1, 4)
    assert check(f"{tmp_path}/out/00000.tar") == 1
    assert "it has 4 samples" in capsys.readouterr().out

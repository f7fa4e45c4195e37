"""Building and changing an index: nothing twice after SIGKILL, nothing half done."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from data_helpers import warnings_logged
from search_world import QUERIES, WIDTH, built_index, colour_encoder, interrupted, names_of, save_pictures

from lavis_lite.common.errors import ConfigError, DataError, InputError
from lavis_lite.search import (
    BuildOptions,
    Searcher,
    add_images,
    build_index,
    check_index,
    compact_index,
    delete_images,
    open_index,
)
from lavis_lite.search.build import locked
from lavis_lite.search.manifest import load_manifest
from lavis_lite.search.sources import short_name

TESTS = Path(__file__).resolve().parent


@pytest.fixture
def built(tmp_path: Path) -> Path:
    return built_index(tmp_path)


def test_a_broken_picture_is_counted_logged_and_left_out(tmp_path: Path) -> None:
    save_pictures(tmp_path / "pictures" / "below", 5)
    (tmp_path / "pictures" / "below" / "002.png").write_bytes(b"no picture")
    (tmp_path / "pictures" / "notes.txt").write_text("not looked at")
    with warnings_logged() as messages:
        done = build_index(
            tmp_path / "pictures", tmp_path / "idx", colour_encoder(), BuildOptions(batch_size=2)
        )
    assert (done.images, done.changed, done.unreadable, done.recall) == (4, 4, 1, None)
    assert len(messages) == 1 and "002.png: not a picture" in messages[0]
    assert names_of(tmp_path / "idx") == ["000.png", "001.png", "003.png", "004.png"]


def test_each_picture_is_found_by_its_own_text_and_by_itself(tmp_path: Path) -> None:
    colours = save_pictures(tmp_path / "pictures", 8)
    encoder = colour_encoder()
    build_index(tmp_path / "pictures", tmp_path / "idx", encoder, BuildOptions(dtype="fp32"))
    searcher = Searcher(open_index(tmp_path / "idx"), encoder)
    for number, colour in enumerate(colours):
        path = tmp_path / "pictures" / f"{number:03}.png"
        for hits in (searcher.search(" ".join(map(str, colour))), searcher.search(image=path)):
            assert hits[0].image == str(path) and hits[0].score == pytest.approx(1, abs=1e-5)
            assert [hit.rank for hit in hits] == list(range(1, 9))


def test_a_killed_build_goes_on_and_encodes_nothing_twice(tmp_path: Path) -> None:
    colours = save_pictures(tmp_path / "pictures", 13)
    log, out = tmp_path / "log", tmp_path / "idx"
    command = [sys.executable, str(TESTS / "search_world.py"), str(tmp_path / "pictures"), str(out), str(log)]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    batches = out / "building" / "batches.jsonl"
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (batches.exists() and batches.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(DataError, match="its build was interrupted; run the same `index build` again"):
        open_index(out)
    done = 2 * batches.read_bytes().count(b"\n")
    assert done < 13
    encoder = colour_encoder()
    summary = build_index(tmp_path / "pictures", out, encoder, BuildOptions(batch_size=2))
    assert encoder.model.images_seen == 13 - done and summary.images == 13
    begun = len(log.read_text().splitlines())
    assert done <= begun <= done + 2  # only the batch in flight was read in vain
    assert names_of(out) == [f"{number:03}.png" for number in range(13)]
    searcher = Searcher(open_index(out), encoder)
    found = [searcher.search(" ".join(map(str, colour)), top=1)[0].image[-7:] for colour in colours]
    assert found == [f"{number:03}.png" for number in range(13)]


@pytest.mark.parametrize("damage", ["line", "vectors", "both"])
def test_what_a_crash_left_half_written_is_cut_off(damage: str, tmp_path: Path) -> None:
    save_pictures(tmp_path / "pictures", 6)
    interrupted(tmp_path, batches=2)
    building = tmp_path / "idx" / "building"
    if damage in ("line", "both"):
        with (building / "batches.jsonl").open("ab") as file:
            file.write(b'{"names": ["/x.png"], "unread')
    if damage in ("vectors", "both"):
        with (building / "vectors.bin").open("r+b") as file:
            file.truncate(3 * QUERIES * WIDTH * 2 + 5)  # within the second batch
    encoder = colour_encoder()
    assert (
        build_index(tmp_path / "pictures", tmp_path / "idx", encoder, BuildOptions(batch_size=2)).images == 6
    )
    assert encoder.model.images_seen == {"line": 2, "vectors": 4, "both": 4}[damage]
    check_index(tmp_path / "idx")
    assert names_of(tmp_path / "idx") == [f"{number:03}.png" for number in range(6)]


def test_an_unfinished_build_is_not_gone_on_with_by_another_model(tmp_path: Path) -> None:
    save_pictures(tmp_path / "pictures", 6)
    interrupted(tmp_path, batches=1)
    with pytest.raises(
        DataError, match=r"building' was begun with model colours/test 0+, not colours/test 0+7; go on"
    ):
        build_index(tmp_path / "pictures", tmp_path / "idx", colour_encoder(7))


def test_an_unfinished_build_is_not_gone_on_with_from_other_pictures(tmp_path: Path) -> None:
    save_pictures(tmp_path / "pictures", 6)
    save_pictures(tmp_path / "others", 3, seed=9)
    interrupted(tmp_path, batches=1)
    with pytest.raises(DataError, match=r"was begun with images .*pictures, not .*others; go on"):
        build_index(tmp_path / "others", tmp_path / "idx", colour_encoder())


def test_add_takes_only_what_is_new(built: Path, tmp_path: Path) -> None:
    save_pictures(tmp_path / "more", 3, seed=9)
    encoder = colour_encoder()
    assert add_images(tmp_path / "more", built, encoder).images == 15
    save_pictures(tmp_path / "more", 4, seed=9)
    done = add_images(tmp_path / "more", built, encoder)
    assert (done.images, done.changed, encoder.model.images_seen) == (16, 1, 4)
    assert add_images(tmp_path / "more", built, encoder).changed == 0
    assert len(set(names_of(built))) == 16 - 4  # both folders have 000.png to 003.png
    check_index(built)


def test_adding_only_unreadable_pictures_leaves_the_index_as_it_is(built: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    before = (built / "index.json").read_bytes()
    for _ in range(2):
        done = add_images(tmp_path / "pictures", built, colour_encoder())
        assert (done.images, done.changed, done.unreadable) == (12, 0, 1)
    assert (built / "index.json").read_bytes() == before
    assert len(list((built / "parts").iterdir())) == 1 and not (built / "building").exists()


def test_a_journal_whose_images_are_in_the_index_is_forgotten(built: Path, tmp_path: Path) -> None:
    header = {"command": "build", "model": "colours/test", "dtype": "fp16", "parts": []}
    (built / "building").mkdir()
    (built / "building" / "header.json").write_text(json.dumps(header))
    save_pictures(tmp_path / "more", 2, seed=9)
    assert add_images(tmp_path / "more", built, colour_encoder()).images == 14
    assert not (built / "building").exists()


def test_a_name_is_a_name_before_it_is_a_pattern(tmp_path: Path) -> None:
    save_pictures(tmp_path / "pictures", 3)
    for old, new in (("000", "ph[1]"), ("001", "ph1"), ("002", "x[1]ph1")):
        (tmp_path / "pictures" / f"{old}.png").rename(tmp_path / "pictures" / f"{new}.png")
    build_index(tmp_path / "pictures", tmp_path / "idx", colour_encoder())
    assert delete_images(tmp_path / "idx", ["ph[1].png"]).changed == 1
    assert names_of(tmp_path / "idx") == ["ph1.png", "x[1]ph1.png"]
    assert delete_images(tmp_path / "idx", ["ph[1].png"]).changed == 1  # now it fits as a pattern
    assert names_of(tmp_path / "idx") == ["x[1]ph1.png"]
    assert delete_images(tmp_path / "idx", [str(tmp_path / "pictures" / "x[1]ph1.png")]).images == 0


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        ("001.png", ["000.png", "002.png"]),
        ("a.tar::001.png", ["000.png", "002.png"]),
        ("00[01].png", ["002.png"]),
        ("a.tar::*", []),
        ("/a.tar::*", None),
        ("1.png", None),
        ("", None),
    ],
)
def test_members_of_a_tar_file_are_deleted_by_their_names(
    wanted: str, left: list[str] | None, tmp_path: Path
) -> None:
    make_shard(tmp_path / "a.tar", 3, seed=0)
    build_index(str(tmp_path / "a.tar"), tmp_path / "idx", colour_encoder())
    if left is None:
        with pytest.raises(InputError, match="fits no image"):
            delete_images(tmp_path / "idx", [wanted])
        return
    delete_images(tmp_path / "idx", [wanted])
    assert [short_name(name)[-7:] for _, name in open_index(tmp_path / "idx").store.names()] == left


@pytest.mark.parametrize("there", [True, False])
def test_a_mistyped_index_leaves_no_trace(there: bool, tmp_path: Path) -> None:
    save_pictures(tmp_path / "pictures", 1)
    typo = tmp_path / "typo"
    if there:
        typo.mkdir()
    for change in (
        lambda: delete_images(typo, ["a"]),
        lambda: compact_index(typo),
        lambda: add_images(tmp_path / "pictures", typo, colour_encoder()),
    ):
        with pytest.raises(DataError, match="no index at"):
            change()
    assert not there or not list(typo.iterdir())
    assert typo.exists() == there


def test_an_index_is_replaced_at_once_and_only_if_asked(built: Path, tmp_path: Path) -> None:
    save_pictures(tmp_path / "other", 3, seed=4)
    with pytest.raises(
        DataError, match=r"there is an index at .* already: `index add` adds to it, --replace"
    ):
        build_index(tmp_path / "other", built, colour_encoder())
    reader = Searcher(open_index(built), colour_encoder())
    broken = colour_encoder(1)
    broken.encode_images = None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        build_index(tmp_path / "other", built, broken, replace_old=True)
    assert len(names_of(built)) == 12
    assert build_index(tmp_path / "other", built, colour_encoder(1), replace_old=True).images == 3
    assert len(reader.search("9 9 9", top=50)) == 12  # who opened the old one goes on with it
    assert len(names_of(built)) == 3 and len(list((built / "parts").iterdir())) == 1


def test_another_model_is_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"was built by colours/test \(weights 00000000\), and this is colours/test"
    ):
        Searcher(open_index(built), colour_encoder(5))
    with pytest.raises(DataError, match="name that model with --model"):
        add_images(tmp_path / "pictures", built, colour_encoder(5))


def test_one_process_at_a_time_changes_an_index(built: Path) -> None:
    with locked(built), pytest.raises(DataError, match="another process is changing the index"):
        delete_images(built, ["000.png"])
    assert delete_images(built, ["000.png"]).images == 11


def test_an_approximate_index_grows_with_its_images(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    save_pictures(tmp_path / "pictures", 30)
    options, encoder = BuildOptions(kind="IVF4,Flat"), colour_encoder()
    first = build_index(tmp_path / "pictures", tmp_path / "idx", encoder, options)
    assert first.recall is not None and first.recall >= 0.99
    assert first.picture_recall is not None and first.picture_recall >= 0.9
    save_pictures(tmp_path / "more", 20, seed=3)
    add_images(tmp_path / "more", tmp_path / "idx", encoder)
    index = open_index(tmp_path / "idx")
    assert index.candidates is not None and index.manifest.candidates is not None
    assert index.candidates.index.ntotal == 50 * QUERIES and index.manifest.candidates.trained_on == 30
    save_pictures(tmp_path / "many", 30, seed=5)
    add_images(tmp_path / "many", tmp_path / "idx", encoder)
    assert open_index(tmp_path / "idx").manifest.candidates.trained_on == 80  # type: ignore[union-attr]
    assert len(list((tmp_path / "idx").glob("candidates-*"))) == 1
    compact_index(tmp_path / "idx")
    exact = Searcher(open_index(tmp_path / "idx"), encoder).search("200 30 30", exact=True)
    assert Searcher(open_index(tmp_path / "idx"), encoder).search("200 30 30") == exact


def test_a_wrong_kind_is_said_before_anything_is_encoded(built: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    encoder = colour_encoder()
    for kind, said in (("IVVF4", "could not parse"), ("IVF64,Flat", "at least 64 vectors, and there are 36")):
        with pytest.raises(ConfigError, match=said):
            build_index(tmp_path / "pictures", tmp_path / "new", encoder, BuildOptions(kind=kind))
    # An index of few pictures grows into one that needs faiss.
    grown = replace(load_manifest(built), kind="IVF64,Flat")
    grown.save(built)
    save_pictures(tmp_path / "more", 3, seed=9)
    with pytest.raises(ConfigError, match="at least 64 vectors, and there are 45"):
        add_images(tmp_path / "more", built, encoder)
    assert encoder.model.images_seen == 0 and not (tmp_path / "new").exists()
    assert not (built / "building").exists()


def test_an_unknown_type_of_stored_numbers_is_a_line() -> None:
    with pytest.raises(ConfigError, match="--dtype must be one of fp16, fp32, got fp8"):
        BuildOptions(dtype="fp8")


def test_a_file_can_not_be_an_index(tmp_path: Path) -> None:
    save_pictures(tmp_path / "pictures", 1)
    (tmp_path / "file").touch()
    for place in ("file", "file/idx"):
        with pytest.raises(DataError, match="can't be an index's folder: there is a file of that name"):
            build_index(tmp_path / "pictures", tmp_path / place, colour_encoder())


def make_shard(path: Path, count: int, *, seed: int) -> None:
    save_pictures(path.parent / f"of_{path.stem}", count, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            tar.add(path.parent / f"of_{path.stem}" / f"{number:03}.png", f"{number:03}.png")
            text = tarfile.TarInfo(f"{number:03}.txt")
            text.size = 3
            tar.addfile(text, io.BytesIO(b"abc"))


def test_shards_by_pattern_and_a_shard_that_breaks_off(tmp_path: Path) -> None:
    for number in range(3):
        make_shard(tmp_path / f"{number:02}.tar", 4, seed=number)
    whole = (tmp_path / "01.tar").read_bytes()
    (tmp_path / "01.tar").write_bytes(whole[: 2 * 3 * 1024 + 700])
    encoder = colour_encoder()
    with warnings_logged() as messages:
        done = build_index(str(tmp_path / "{00..02}.tar"), tmp_path / "idx", encoder)
    assert 8 <= done.images < 12 and any("01.tar" in message for message in messages)
    hits = Searcher(open_index(tmp_path / "idx"), encoder).search("9 9 9", top=20)
    assert f"{tmp_path}/02.tar::003.png" in {hit.image for hit in hits}
    assert add_images(str(tmp_path / "*.tar"), tmp_path / "idx", encoder).changed == 0
    with pytest.raises(DataError, match=r"1 of 4 are missing, first '.*03\.tar'"):
        build_index(str(tmp_path / "{00..03}.tar"), tmp_path / "new", encoder)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere", "--images '.*nowhere': no such folder or tar file"),
        ("empty", "--images '.*empty': there are no pictures"),
        ("file.txt", "neither a folder nor an uncompressed .tar file"),
        ("broken", "none of the 1 pictures can be read; the first: .*a.png: the file is empty"),
    ],
)
def test_sources_without_a_picture(where: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").touch()
    with pytest.raises(DataError, match=message):
        build_index(tmp_path / where, tmp_path / "idx", colour_encoder())
    with pytest.raises(DataError, match="no index at"):
        open_index(tmp_path / "idx")

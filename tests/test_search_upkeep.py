"""Upkeep of an index: `compact` and `check`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_helpers import warnings_logged
from search_world import QUERIES, WIDTH, built_index, colour_encoder, interrupted, names_of, save_pictures

from lavis_lite.cli import main
from lavis_lite.common.errors import DataError, InputError
from lavis_lite.search import (
    BuildOptions,
    Searcher,
    add_images,
    build_index,
    candidates,
    check_index,
    compact_index,
    delete_images,
    open_index,
)
from lavis_lite.search.manifest import FileSum, load_manifest


@pytest.fixture
def built(tmp_path: Path) -> Path:
    return built_index(tmp_path)


def test_an_approximate_index_outlives_its_last_image(tmp_path: Path) -> None:
    save_pictures(tmp_path / "pictures", 6)
    index = tmp_path / "idx"
    build_index(tmp_path / "pictures", index, colour_encoder(), BuildOptions(kind="hnsw", target=0.9))
    save_pictures(tmp_path / "pictures", 7)
    add_images(tmp_path / "pictures", index, colour_encoder())
    assert load_manifest(index).target == 0.9
    assert delete_images(index, ["*.png"]).images == 0
    assert Searcher(open_index(index), colour_encoder()).search("9 9 9", top=5) == []
    assert compact_index(index).changed == 7
    assert Searcher(open_index(index), colour_encoder()).search("9 9 9", top=5) == []


def test_compacting_waits_for_an_unfinished_add_or_does_without(built: Path, tmp_path: Path) -> None:
    save_pictures(tmp_path / "more", 4, seed=9)
    interrupted(tmp_path, batches=1, images="more", change=add_images)
    delete_images(built, ["000.png"])
    shutil.rmtree(tmp_path / "more")  # the same command would find nothing any more
    with pytest.raises(
        DataError, match=r"an unfinished add or build: finish it .*, or remove '.*idx/building'"
    ):
        compact_index(built)
    shutil.rmtree(built / "building")
    assert compact_index(built).images == 11


def test_an_index_of_too_few_images_for_its_kind_is_compacted_to_another(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    save_pictures(tmp_path / "pictures", 12)
    index, encoder = tmp_path / "idx", colour_encoder()
    build_index(tmp_path / "pictures", index, encoder, BuildOptions(kind="IVF16,Flat"))
    delete_images(index, ["00[0-4].png"])
    with warnings_logged() as messages:
        assert compact_index(index).images == 7  # of 21 vectors, enough for 16 cells
    assert not messages and load_manifest(index).kind == "IVF16,Flat"
    delete_images(index, ["00[5-7].png"])
    with warnings_logged() as messages:
        done = compact_index(index)
    assert (done.images, done.changed, done.recall) == (4, 3, None)
    assert messages == [
        "'IVF16,Flat' is trained on at least 16 vectors, and 12 are left: the index is of --kind auto now, which is "
        "exact search"
    ]
    check_index(index)
    assert len(Searcher(open_index(index), encoder).search("9 9 9")) == 4
    save_pictures(tmp_path / "more", 1, seed=9)
    assert add_images(tmp_path / "more", index, encoder).images == 5


def test_deleted_images_are_not_found_and_compacting_removes_them(built: Path, tmp_path: Path) -> None:
    assert delete_images(built, ["00[0-3].png", str(tmp_path / "pictures" / "011.png")]).images == 7
    left = [f"{number:03}.png" for number in range(4, 11)]
    assert names_of(built) == left
    searcher = Searcher(open_index(built), colour_encoder())
    assert sorted(hit.image[-7:] for hit in searcher.search("9 9 9", top=50)) == left
    before = {hit.image: hit.score for hit in searcher.search("9 200 9", top=50)}
    assert compact_index(built).changed == 5
    assert sum(file.stat().st_size for file in built.rglob("vectors.bin")) == 7 * QUERIES * WIDTH * 2
    searcher = Searcher(open_index(built), colour_encoder())
    assert {hit.image: hit.score for hit in searcher.search("9 200 9", top=50)} == pytest.approx(before)
    with pytest.raises(InputError, match=r"'nothing\.\*' fits no image"):
        delete_images(built, ["004.png", "nothing.*"])
    assert names_of(built) == left
    # A deleted picture that is still in the folder comes back with the next add.
    assert add_images(tmp_path / "pictures", built, colour_encoder()).images == 12


@pytest.mark.parametrize(
    "file", ["vectors.bin", "names.arrow", "index.json", "deleted-*.npy", "candidates-*.faiss"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_corruption_is_one_clear_line(file: str, damage: str, tmp_path: Path) -> None:
    save_pictures(tmp_path / "pictures", 20)
    kind = "IVF2,Flat" if file.startswith("cand") else "flat"
    if kind != "flat":
        pytest.importorskip("faiss")
    build_index(tmp_path / "pictures", tmp_path / "idx", colour_encoder(), BuildOptions(kind=kind))
    delete_images(tmp_path / "idx", ["003.png"])
    victim = next((tmp_path / "idx").rglob(file))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(content if damage == "flip" else content[:-9])
    said = "no index at" if (file, damage) == ("index.json", "gone") else "corrupt index: "
    for opened in (open_index, check_index):
        with pytest.raises(DataError, match=said) as caught:
            opened(tmp_path / "idx")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [open_index, check_index])
@pytest.mark.parametrize("times", [2, 3])
def test_an_index_that_changes_while_it_is_read_is_not_corrupt(
    times: int, read: Callable[[Path], Any], built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, left = FileSum.check, iter([f"{number:03}.png" for number in range(times)])

    def slow(file: FileSum, root: Path, *, content: bool) -> None:
        """Another process has deleted a picture and compacted before the first file is looked at."""
        name = next(left, None) if file.path.endswith("vectors.bin") else None
        if name:
            delete_images(root, [name])
            compact_index(root)
        check(file, root, content=content)

    monkeypatch.setattr(FileSum, "check", slow)
    if times == 3:
        with pytest.raises(DataError, match="was replaced 3 times while it was read; try again"):
            read(built)
    else:
        found = read(built)
        assert getattr(found, "manifest", found).images == 10


def test_both_recalls_are_said_and_a_low_one_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    save_pictures(tmp_path / "pictures", 20)
    index = tmp_path / "idx"
    monkeypatch.setattr(candidates, "measure_recall", lambda *_: 0.75)
    with warnings_logged() as messages:
        done = build_index(tmp_path / "pictures", index, colour_encoder(), BuildOptions(kind="IVF4,Flat"))
    assert (done.recall, done.picture_recall) == (1.0, 0.75)
    assert len(messages) == 1 and "finds 0.7500 of a picture's exact first 100, not 0.99" in messages[0]
    for command, said in (("check", "IVF4,Flat, recall "), ("compact", "recall of the exact first 100: ")):
        main(["index", command, str(index)])
        assert f"{said}1.0000 for texts, 0.7500 for pictures" in capsys.readouterr().out
    entry = load_manifest(index).candidates
    assert entry is not None
    replace(load_manifest(index), candidates=replace(entry, picture_recall=None)).save(index)
    main(["index", "check", str(index)])
    assert "recall 1.0000 for texts; " in capsys.readouterr().out

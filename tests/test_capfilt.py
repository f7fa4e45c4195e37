"""CapFilt: which captions are made, which stay, what is read and what is written."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from capfilt_helpers import (
    MODELS,
    capfilt,
    fake_models,
    jpeg_bytes,
    read_shard,
    score_of,
    web_shards,
    write_shard,
)
from data_helpers import make_jsonl, save_picture
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from lavis_lite.capfilt import worker
from lavis_lite.capfilt.inputs import ImageFolder, Item, TarShards
from lavis_lite.capfilt.output import PieceWriter
from lavis_lite.capfilt.selection import candidates, ranked
from lavis_lite.capfilt.settings import load_settings, parse_model
from lavis_lite.capfilt.tally import BINS, Tally, added, bin_of
from lavis_lite.capfilt.worker import uniform_draws
from lavis_lite.cli import main
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.datasets.builders import build_dataset_from_preset
from lavis_lite.datasets.tar_members import Address, samples_of
from lavis_lite.models.decoding import draw_from_nucleus


def shown_pictures(page: Path) -> list[str]:
    return re.findall(r"data:image/jpeg;base64,[^\"]+", page.read_text())


# Which captions are drawn


def test_a_draw_is_the_place_where_the_nucleus_reaches_the_number() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = (torch.randn(200, 12, generator=generator) * 2).softmax(-1)
    chance = torch.rand(200, generator=generator)
    chance[:2] = torch.tensor([0.0, 1 - 2**-24])
    drawn = draw_from_nucleus(probs, 0.8, chance).tolist()
    for row, (own, number) in enumerate(zip(probs.tolist(), chance.tolist(), strict=True)):
        order, nucleus = sorted(range(12), key=lambda token: -own[token]), []
        while sum(own[token] for token in nucleus) < 0.8:
            nucleus.append(order[len(nucleus)])
        whole, reached = sum(own[token] for token in nucleus), 0.0
        for token in nucleus:
            reached += own[token]
            if reached > number * whole + 1e-6:
                break
        assert drawn[row] == token


def test_draws_have_the_probabilities_of_the_nucleus() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).expand(20_000, 4)
    drawn = draw_from_nucleus(probs, 0.9, torch.rand(20_000, generator=torch.Generator().manual_seed(1)))
    shares = torch.bincount(drawn, minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.02)


def test_draws_depend_on_seed_and_key_alone() -> None:
    draws = uniform_draws(0, "000012", 10, 20)
    assert torch.equal(draws, uniform_draws(0, "000012", 10, 20)) and draws.shape == (10, 20)
    assert not torch.equal(draws, uniform_draws(1, "000012", 10, 20))
    assert not torch.equal(draws, uniform_draws(0, "000013", 10, 20))


# Which captions stay


def test_candidates_are_different_and_the_webs_come_first() -> None:
    found = candidates(["A Dog.", " ", "a  cat"], ["a dog", "a bird!", "", "A bird", "a cat on a mat"])
    assert [(c.text, c.source) for c in found] == [
        ("A Dog.", "web"),
        ("a cat", "web"),
        ("a bird!", "synthetic"),
        ("a cat on a mat", "synthetic"),
    ]


def test_the_best_come_first_and_of_equals_the_webs() -> None:
    entries = candidates(["w"], ["x", "y", "z"])
    assert [c.text for c in ranked(entries, [0.5, 0.7, 0.5, -0.1])] == ["x", "w", "y", "z"]


def test_tallies_add_up() -> None:
    parts = []
    for number in range(2):
        tally = Tally()
        scored = ranked(candidates(["w"], ["x", "y"]), [0.9 - number, 0.5, 0.1])
        tally.add(str(number), scored, scored[:2])
        tally.add_unreadable("no such file")
        parts.append(tally)
    total = added(parts)
    assert (total.pictures, total.web, total.synthetic, total.with_web) == (2, 2, 4, 2)
    assert (total.web_kept, total.synthetic_kept, total.web_only, total.synthetic_only) == (1, 3, 0, 1)
    assert total.reasons == {"no such file": 2} and sum(total.histograms["kept"]) == 4
    assert total.histograms["web"][bin_of(0.9)] == 1 and total.examples == []
    assert (bin_of(-1.0), bin_of(-7.0), bin_of(1.0)) == (0, 0, BINS - 1)


# What is read


def items(source: Any) -> list[Item]:
    return [item for number in range(len(source)) for item in source.open(number)]


def test_captions_of_shards_are_found_where_they_usually_are(tmp_path: Path) -> None:
    jpg = jpeg_bytes(0)
    write_shard(
        tmp_path / "a.tar",
        [
            ("0", {"jpg": jpg, "json": b'{"caption": "from json", "url": "u"}', "txt": b"from txt"}),
            ("1", {"txt": b"one\ntwo", "png": jpg, "json": b'{"url": "u"}'}),
            ("2", {"jpg": jpg, "json": b'{"captions": ["p", "q"], "caption": "before"}'}),
            ("3", {"jpg": jpg}),
            ("4", {"txt": b"no picture"}),
            ("5", {"jpg": jpg, "json": b"{broken"}),
            ("6", {"jpg": jpg, "txt": b"caf\xe9"}),
        ],
    )
    found = items(TarShards(str(tmp_path / "a.tar")))
    assert [item.captions for item in found[:4]] == [["from json"], ["one", "two"], ["p", "q"], []]
    assert found[1].content == jpg and [item.problem is None for item in found] == [True] * 4 + [False] * 3
    problems = [str(item.problem) for item in found[4:]]
    assert "no picture among its members (txt)" in problems[0]
    assert "broken json" in problems[1] and "not valid UTF-8 (byte 3)" in problems[2]
    url = items(TarShards(str(tmp_path / "a.tar"), caption_field="url"))[0]
    assert url.captions == ["u"]


def test_a_cut_shard_is_used_up_to_the_cut_and_a_cut_stream_is_not(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [(str(n), {"jpg": jpeg_bytes(n), "txt": b"t"}) for n in range(6)])
    size = next(
        offset for offset in range(512, 99999, 512) if path.read_bytes()[offset:].startswith(b"3.jpg")
    )
    path.write_bytes(path.read_bytes()[: size + 600])
    piece = TarShards(str(path)).open(0)
    assert [item.key for item in piece] == ["0", "1", "2"] and "ends within member 3.jpg" in str(piece.damage)
    with pytest.raises(DataError, match=r"can't be read: broken after member 3\.jpg"):
        list(TarShards(f"pipe:cat {path}").open(0))
    with pytest.raises(DataError, match="can't be read"):
        list(TarShards(f"pipe:cat {path}.gone").open(0))


def test_a_shard_that_is_cut_between_two_members_does_not_count_as_whole(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [(str(n), {"jpg": jpeg_bytes(n), "txt": b"t"}) for n in range(3)])
    second = next(Address(*sample.members["jpg"]) for sample in samples_of(path) if sample.key == "2")
    path.write_bytes(path.read_bytes()[: second.offset - 512])
    piece = TarShards(str(path)).open(0)
    assert [item.key for item in piece] == ["0"] and "cut off after member 1.txt" in str(piece.damage)


def test_a_name_that_comes_twice_is_two_samples(tmp_path: Path) -> None:
    twice = [("0", {"jpg": jpeg_bytes(0)}), ("0", {"jpg": jpeg_bytes(1)}), ("1", {"jpg": jpeg_bytes(2)})]
    piece = TarShards(str(write_shard(tmp_path / "a.tar", twice))).open(0)
    assert [item.key for item in piece] == ["0", "0", "1"] and piece.damage is None


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_name_that_comes_twice_is_two_names_in_the_output(kind: str, tmp_path: Path) -> None:
    told = [("k", 0), ("k", 1), ("k_2", 2), ("k", 3)]
    samples = [(key, {"jpg": jpeg_bytes(n), "json": b'{"url": "%d"}' % n}) for key, n in told]
    path = write_shard(tmp_path / "web/0.tar", samples)
    shards = str(path) if kind == "file" else f"pipe:cat {path}"
    arguments = ["--shards", shards, *MODELS, "--out", str(tmp_path / "out")]
    assert capfilt(*arguments) == [4]
    with (tmp_path / "out/000000.tar").open("rb") as file:
        read = list(group_by_keys(tar_file_expander([{"url": "", "stream": file}])))
    assert [sample["__key__"] for sample in read] == ["k", "k_2", "k_2_2", "k_3"]
    assert [sample["jpg"] for sample in read] == [jpeg_bytes(n) for n in range(4)]
    assert [json.loads(sample["json"])["url"] for sample in read] == ["0", "1", "2", "3"]
    assert len(set(shown_pictures(tmp_path / "out/report.html"))) == 2


def test_a_shard_that_was_written_with_one_key_twice_gets_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "web/0.tar", [("k", {"jpg": jpeg_bytes(n)}) for n in range(2)])
    arguments = ["--shards", str(path), *MODELS, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(PieceWriter, "_new_key", lambda _, key: key)
    assert capfilt(*arguments) == [2]
    assert list(read_shard(tmp_path / "out/000000.tar")) == ["k"]
    assert len(shown_pictures(tmp_path / "out/report.html")) == 2


def test_what_is_known_of_a_picture_goes_on_into_the_output(tmp_path: Path) -> None:
    about = {"caption": "c", "image_id": 7, "group": "g", "url": "u", "source": "web site"}
    write_shard(tmp_path / "web/0.tar", [("0", {"jpg": jpeg_bytes(0), "json": json.dumps(about).encode()})])
    for shards in ("{}", "pipe:cat {}"):
        out = tmp_path / f"out{len(shards)}"
        capfilt("--shards", shards.format(tmp_path / "web/0.tar"), *MODELS, "--out", str(out))
        written = read_shard(out / "000000.tar")["0"]
        assert (written["image_id"], written["group"], written["url"]) == (7, "g", "u")
        assert "caption" not in written and set(written["source"]) <= {"web", "synthetic"}


def test_which_member_is_the_picture_may_be_said(tmp_path: Path) -> None:
    """By default it is the first that is one of a picture, which here is a mask."""
    mask, photo = jpeg_bytes(1), jpeg_bytes(2)
    samples = [("0", {"mask.jpg": mask, "jpeg": mask, "photo.jpg": photo}), ("1", {"jpeg": mask})]
    path = write_shard(tmp_path / "web/0.tar", samples)
    for shards in (str(path), f"pipe:cat {path}"):
        out = tmp_path / f"out{len(shards)}"
        capfilt("--shards", shards, "--image", "photo.jpg", *MODELS, "--out", str(out))
        assert {key: sample["jpg"] for key, sample in read_shard(out / "000000.tar").items()} == {"0": photo}
        tally = json.loads((out / "summary.json").read_text())["tally"]
        assert tally["reasons"] == {"no .photo.jpg among its members (jpeg)": 1}
        with pytest.raises(SystemExit) as ended:  # other pictures are another job
            capfilt("--shards", shards, "--image", "jpeg", *MODELS, "--out", str(out))
        assert ended.value.code == 2


def test_rows_of_a_folder_keep_pictures_without_a_caption(tmp_path: Path) -> None:
    annotations = make_jsonl(tmp_path, 5, captions=2, image_id=7)
    with annotations.open("a") as file:
        file.write('\n{"image": "0.jpg", "caption": "", "image_id": 1}')
        file.write('\n{"image": "gone.jpg", "caption": "c", "image_id": 2}')
    source = ImageFolder(tmp_path / "images", annotations, shard_size=3)
    assert len(source) == 3 and source.name(2).startswith("rows 6 to 6 of")
    found = items(source)
    assert found[0].captions == ["row 0 caption 0", "row 0 caption 1"]
    assert found[4].about == {"image": "4.jpg", "image_id": 7} and found[4].key == "000000004"
    assert found[5].problem is None and found[5].captions == []
    source.records = [source.records[0]._replace(group="g")]  # type: ignore[assignment]
    assert source.item(0).about == {"image": "0.jpg", "image_id": 7, "group": "g"}
    assert found[6].problem == "no such file"


def test_pictures_of_a_folder_need_no_caption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "b/c.png"):
        save_picture(tmp_path / "pics" / name, len(name))
    arguments = ["--images", str(tmp_path / "pics"), *MODELS]
    capfilt(*arguments, "--out", str(tmp_path / "bare"))
    rows = [json.loads(line) for line in (tmp_path / "bare/annotations.jsonl").open()]
    assert [(row["image"], row["source"]) for row in rows] == [
        ("a.jpg", ["synthetic"] * 2),
        ("b/c.png", ["synthetic"] * 2),
    ]
    # Captions beside some of them compete, and the rest needs none still.
    (tmp_path / "pics/a.txt").write_text("from the web")
    found = items(ImageFolder(tmp_path / "pics", None, shard_size=9))
    assert [item.captions for item in found] == [["from the web"], []]
    # Training needs them as before: it doesn't take the table that CapFilt had made.
    (tmp_path / "pics/a.txt").unlink()
    with pytest.raises(
        DataError, match=r"none with a .txt file beside it; set datasets\..*train\.annotations"
    ):
        build_dataset_from_preset("plain", {"train": {"images": str(tmp_path / "pics")}})


# What is written


def test_the_output_holds_the_best_captions_with_scores_and_sources(tmp_path: Path) -> None:
    pattern = web_shards(tmp_path / "web", 2, 5)
    arguments = ["--shards", pattern, *MODELS, "--num-captions", "4", "--keep", "3", "--seed", "5"]
    capfilt(*arguments, "--out", str(tmp_path / "out"))
    samples = read_shard(tmp_path / "out" / "000001.tar")
    assert list(samples) == [f"001000{n}" for n in range(5)]
    for number, (key, sample) in enumerate(samples.items()):
        assert sample["jpg"] == jpeg_bytes(5 + number)
        draws = uniform_draws(5, key, 4, 20)
        assert len(sample["captions"]) == 3 and sample["scores"] == sorted(sample["scores"], reverse=True)
        assert sample["scores"] == [round(score_of(text), 6) for text in sample["captions"]]
        web = f"web text 1 {number}"
        assert [text == web for text in sample["captions"]] == [s == "web" for s in sample["source"]]
        # Whoever was left out scores less than all that stayed.
        assert web in sample["captions"] or score_of(web) <= sample["scores"][-1]
        assert draws.shape == (4, 20)
    assert list(read_shard(tmp_path / "out" / "000000.tar")) == ["0000000", "0000002", "0000003", "0000004"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["tally"]["pictures"] == 9 and summary["tally"]["reasons"] == {"not a picture": 1}
    manifest = json.loads((tmp_path / "out" / "000001.json").read_text())
    digest = subprocess.run(["sha256sum", tmp_path / "out/000001.tar"], capture_output=True, text=True)
    assert digest.stdout.split()[0] == manifest["files"]["000001.tar"]["sha256"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "data:image/jpeg" in page
        and "web text 1 0" in page
        and "http" not in page.replace("http://www.w3", "")
    )


def test_captions_dont_depend_on_batches_or_on_what_else_is_there(tmp_path: Path) -> None:
    pattern = web_shards(tmp_path / "web", 2, 5)
    first = capfilt("--shards", pattern, *MODELS, "--out", str(tmp_path / "a"), "--batch-size", "16")
    second = capfilt(
        "--shards", f"{tmp_path}/web/00001.tar", *MODELS, "--out", str(tmp_path / "b"), "--batch-size", "2"
    )
    assert first == [4, 5] and second == [2, 2, 1]
    assert (tmp_path / "a/000001.tar").read_bytes() == (tmp_path / "b/000000.tar").read_bytes()


def test_pictures_of_a_folder_become_a_dataset_by_yaml(tmp_path: Path) -> None:
    annotations = make_jsonl(tmp_path, 6, captions=1)
    save_picture(tmp_path / "images" / "2.jpg", 2)
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "images" / "3.png")
    annotations.write_text(annotations.read_text().replace("3.jpg", "3.png"))
    out = tmp_path / "out"
    arguments = ["--images", str(tmp_path / "images"), "--annotations", str(annotations), *MODELS]
    capfilt(*arguments, "--shard-size", "4", "--out", str(out))
    shard = read_shard(out / "000000.tar")
    assert shard["000000003"]["jpg"].startswith(b"\xff\xd8\xff") and shard["000000003"]["image"] == "3.png"
    section = {"train": {"annotations": str(out / "annotations.jsonl"), "images": str(tmp_path / "images")}}
    rows = build_dataset_from_preset("capfilt_output", section)["train"]
    assert len(rows) == 6
    drawn = {rows.load(0, seed=seed)["text_input"] for seed in range(30)}
    kept = [rows.text_processor(text) for text in shard["000000000"]["captions"]]
    assert len(kept) == 2 and drawn == set(kept)
    # The same without the pictures.
    capfilt(*arguments, "--shard-size", "4", "--no-tars", "--out", str(tmp_path / "bare"))
    assert (tmp_path / "bare/annotations.jsonl").read_bytes() == (out / "annotations.jsonl").read_bytes()
    assert not list((tmp_path / "bare").glob("*.tar"))
    assert shown_pictures(tmp_path / "bare/report.html") == shown_pictures(out / "report.html") != []


def test_what_is_done_is_not_done_again_and_a_lost_shard_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--shards", web_shards(tmp_path / "web", 2, 5), *MODELS, "--out", str(tmp_path / "out")]
    assert capfilt(*arguments) == [4, 5]
    said = capsys.readouterr().out
    assert "9 pictures with 18 captions in 2 shards" in said and "1 unreadable (1 not a picture)" in said
    assert capfilt(*arguments) == []
    before = (tmp_path / "out/000001.tar").read_bytes()
    (tmp_path / "out/000001.tar").unlink()
    assert capfilt(*arguments) == [5]
    assert (tmp_path / "out/000001.tar").read_bytes() == before


@pytest.mark.parametrize("out", ["pics/out", "pics"])
def test_a_job_that_writes_among_its_pictures_goes_on(out: str, tmp_path: Path) -> None:
    pictures = tmp_path / "pics"
    for number in range(3):
        save_picture(pictures / f"{number}.jpg", number)
    before = ImageFolder(pictures, None, shard_size=2).about
    arguments = ["--images", str(pictures), "--shard-size", "2", *MODELS, "--out", str(tmp_path / out)]
    assert capfilt(*arguments) == [2, 1]
    assert ImageFolder(pictures, None, shard_size=2).about == before
    (tmp_path / out / "000001.tar").unlink()
    assert capfilt(*arguments) == [1]


# Mistakes


def test_a_shard_that_cant_be_read_now_leaves_the_others_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web_shards(tmp_path / "web", 2, 3)
    late = tmp_path / "late.tar"
    pattern = f"pipe:cat {late}::{tmp_path}/web/00001.tar"
    arguments = ["--shards", pattern, *MODELS, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        capfilt(*arguments)
    said = capsys.readouterr()
    reason = f"pipe:cat {late}: can't be read: its command ended with exit code 1"
    assert ended.value.code == 1 and f"1 of 2 shards could not be read, for example {reason}; " in said.err
    assert "3 pictures with 6 captions in 1 shards" in said.out and f"{late} (1 of 2 shards)" in said.out
    assert (tmp_path / "out/000001.json").is_file() and not (tmp_path / "out/000000.json").exists()
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["unreadable"] == {f"pipe:cat {late}": "can't be read: its command ended with exit code 1"}
    assert "Shards that could not be read" in (tmp_path / "out/report.html").read_text()
    # Whoever can do without it says so, and nothing is tried again.
    assert capfilt(*arguments, "--skip-unreadable-shards") == []
    late.write_bytes((tmp_path / "web/00000.tar").read_bytes())
    assert capfilt(*arguments) == [2]
    assert len(read_shard(tmp_path / "out/000000.tar")) == 2
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["shards"], summary["unreadable"]) == (2, {})
    assert not list((tmp_path / "out").glob("*.failed"))


def test_a_process_that_is_late_leaves_what_the_others_gave_up(tmp_path: Path) -> None:
    log = tmp_path / "log"
    web_shards(tmp_path / "web", 1, 3)
    pattern = f"pipe:echo tried >>{log}; false::{tmp_path}/web/00000.tar"
    arguments = ["--shards", pattern, *MODELS, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        capfilt(*arguments)
    (tmp_path / "out/summary.json").unlink()  # as long as the others haven't written it
    with pytest.raises(SystemExit):
        capfilt(*arguments)
    assert log.read_text().split() == ["tried"] * 3
    with pytest.raises(SystemExit):  # now it is a call of its own
        capfilt(*arguments)
    assert log.read_text().split() == ["tried"] * 6


def test_all_shards_unreadable_is_told_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shards", "pipe:false", *MODELS, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        capfilt(*arguments)
    assert ended.value.code == 1 and "1 of 1 shards could not be read" in capsys.readouterr().err
    assert (tmp_path / "out/report.html").is_file()


def test_a_shard_that_fails_rests_before_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, begun = tmp_path / "log", time.monotonic()
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.02)
    arguments = ["--shards", f"pipe:date +%s.%N >>{log}; false", *MODELS, "--out", str(tmp_path / "out")]
    with fake_models(), monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(worker, "RETRY_SECONDS", 0.3)
        main(["capfilt", *arguments])
    times = [float(line) for line in log.read_text().split()]
    assert len(times) == 3 and times[2] - times[0] > 0.55 and time.monotonic() - begun > 0.55


def test_a_restart_that_meets_a_bad_shard_first_counts_what_is_done(tmp_path: Path) -> None:
    web_shards(tmp_path / "web", 1, 9)
    bad, late = [("x", {"jpg": b"broken"}), ("y", {"jpg": b"broken"})], tmp_path / "late.tar"
    pattern = f"{tmp_path}/web/00000.tar::pipe:cat {late}"
    arguments = ["--shards", pattern, *MODELS, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        capfilt(*arguments)
    write_shard(late, bad)
    capfilt(*arguments)
    assert json.loads((tmp_path / "out/summary.json").read_text())["tally"]["unreadable"] == 3


def test_presets_are_read_and_what_is_given_wins(tmp_path: Path) -> None:
    paper = load_settings("paper", {})
    assert (paper.num_captions, paper.keep, paper.rank_by) == (10, 2, "itc")
    assert parse_model(paper.captioner, "captioner").name == "Salesforce/blip-image-captioning-large"
    assert parse_model(paper.ranker, "ranker").name == "openai/clip-vit-large-patch14"
    assert load_settings("shapes", {"keep": 3}).keep == 3
    (tmp_path / "own.yaml").write_text("captioner: hf:x\nranker: blip2/shapes:run:1\nkep: 3\n")
    with pytest.raises(ConfigError, match="did you mean 'keep'"):
        load_settings(str(tmp_path / "own.yaml"), {})
    assert parse_model("blip2/shapes:hub:a/b", "ranker").checkpoint == "hub:a/b"
    with pytest.raises(ConfigError, match="name a model with --ranker"):
        load_settings(None, {"captioner": "hf:x"})

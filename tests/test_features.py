"""Stored features part by part: rounding, the pictures' views, the files, the keys."""

from __future__ import annotations

import collections
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import make_jsonl
from feature_world import noise_pictures
from PIL import Image
from shard_helpers import write_shards
from stage1_helpers import TinyPatches

from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.feature_config import FeatureConfig
from lavis_lite.common.fingerprint import describe, tensors_digest
from lavis_lite.common.sizes import parse_bytes, show_bytes
from lavis_lite.datasets import feature_store
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.builders import build_datasets
from lavis_lite.datasets.feature_store import FeatureStore, Layout, StoredViews
from lavis_lite.datasets.image_text import ImageTextDataset
from lavis_lite.datasets.order import CHOICE, seed_of
from lavis_lite.datasets.pictures import Pictures, ViewReader, joined_contents
from lavis_lite.image_features import ImageFeatures
from lavis_lite.models.vision.tower import VisionTower
from lavis_lite.processors import build_processor

PROCESSORS = (
    "blip2_image_train",
    "blip_image_train",
    "blip_image_eval",
    "shapes_image_train",
    "shapes_image_eval",
)


def dataset(folder: Path, **section: Any) -> ImageTextDataset:
    train = {"annotations": "rows.jsonl", "images": "images", **section}
    processors = {"train": {"name": "blip2_image_train", "image_size": 16}}
    own = {"root": str(folder), "train": train, "vis_processor": processors}
    built = build_datasets({"own": own})["own"]["train"]
    assert isinstance(built, ImageTextDataset)
    return built


# Rounding


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_is_the_cast(precision: Any, dtype: torch.dtype) -> None:
    features = torch.randn(2, 5, 7) * 30
    stored = ImageFeatures.rounded(features, precision)
    assert stored.values.dtype == dtype and stored.scale is None
    assert torch.equal(stored.float(), features.to(dtype).float())


def test_int8_is_off_by_half_a_step_of_each_token_at_most() -> None:
    features = torch.randn(3, 5, 40) * torch.logspace(-3, 3, 5)[:, None]
    features[1, 2] = 0.0
    stored = ImageFeatures.rounded(features, "int8")
    step = features.abs().amax(-1, keepdim=True) / 127
    assert stored.values.dtype == torch.int8
    assert ((stored.float() - features).abs() <= step * 0.5001).all()
    assert torch.equal(stored.float()[1, 2], torch.zeros(40))
    again = ImageFeatures.rounded(stored.float(), "int8")
    assert torch.equal(again.values, stored.values)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_batch_of_features_behaves_like_a_batch_of_images(precision: Any) -> None:
    rows = [ImageFeatures.rounded(torch.randn(4, 6), precision) for _ in range(3)]
    batch = ImageFeatures.stack(rows)
    assert len(batch) == 3 and batch.device.type == "cpu"
    assert torch.equal(batch.to("cpu").float()[1], rows[1].float())


def test_the_tower_takes_the_features_of_a_frozen_encoder_only() -> None:
    features = ImageFeatures.rounded(torch.randn(2, 4, 24), "bf16")
    assert torch.equal(VisionTower(TinyPatches())(features), features.values.float())
    with pytest.raises(ConfigError, match="encoder that is trained"):
        VisionTower(TinyPatches(), freeze=False)(features)
    with pytest.raises(
        ConfigError, match=r"\[2, 4, 24\] are of another encoder: 'encoder' makes \[B, P, 32\]"
    ):
        VisionTower(TinyPatches(width=32))(features)


# Pictures and their views


def test_rows_of_one_picture_share_its_number(tmp_path: Path) -> None:
    make_jsonl(tmp_path, 4, captions=3)
    split = dataset(tmp_path, split_captions=True)
    pictures = Pictures(split)
    assert (len(split), len(pictures)) == (12, 4)
    assert [pictures.of_row(row) for row in range(12)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for row in range(12):
        assert pictures.path(pictures.of_row(row)) == split.image_path(row)


def test_parts_with_equal_names_have_pictures_of_their_own(tmp_path: Path) -> None:
    for part in ("a", "b"):
        noise_pictures(tmp_path / part, 3)
    parts = [{"annotations": f"{part}/rows.jsonl", "images": f"{part}/images"} for part in ("a", "b")]
    built = build_datasets({"own": {"root": str(tmp_path), "train": parts}})["own"]["train"]
    assert isinstance(built, ImageTextDataset)
    pictures = Pictures(built)
    assert [pictures.of_row(row) for row in range(6)] == list(range(6))
    assert [pictures.path(number) for number in range(6)] == [built.image_path(row) for row in range(6)]
    views = [pictures.views(number, count=1, seed=0) for number in (0, 3)]
    assert not torch.equal(*views)


def test_a_view_is_a_function_of_seed_picture_and_number(tmp_path: Path) -> None:
    noise_pictures(tmp_path, 6)
    pictures, fewer = Pictures(dataset(tmp_path)), Pictures(dataset(tmp_path, limit=3))
    state = torch.get_rng_state()
    four = pictures.views(2, count=4, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(fewer.views(2, count=2, seed=0), four[:2])
    assert not torch.equal(pictures.views(2, count=4, seed=1), four)
    assert len({view.numpy().tobytes() for view in four}) == 4
    # Two pictures alike but for their name are cropped differently.
    (tmp_path / "images" / "4.jpg").write_bytes((tmp_path / "images" / "2.jpg").read_bytes())
    assert not torch.equal(pictures.views(4, count=4, seed=0), four)


def contents_of(pictures: Pictures, numbers: range) -> str:
    return joined_contents(pictures.content(number) for number in numbers)


def test_what_files_are_is_told_in_parts(tmp_path: Path) -> None:
    make_jsonl(tmp_path, 6)
    pictures, own = Pictures(dataset(tmp_path)), range(3, 6)
    before, contents, others = pictures.files(own), contents_of(pictures, own), pictures.files(range(0, 3))
    changed, path = [], tmp_path / "images" / "4.jpg"
    os.utime(path, (5, 5))
    changed.append((pictures.files(own), contents_of(pictures, own)))
    path.write_bytes(bytes(reversed(path.read_bytes())))
    changed.append((pictures.files(own), contents_of(pictures, own)))
    path.write_bytes(b"longer" + path.read_bytes())
    changed.append((pictures.files(own), contents_of(pictures, own)))
    path.unlink()
    changed.append((pictures.files(own), contents_of(pictures, own)))
    assert [files.times == before.times for files, _ in changed] == [False] * 4
    assert [files.state == before.state for files, _ in changed] == [True, True, False, False]
    assert [found == contents for _, found in changed] == [True, False, False, False]
    assert pictures.files(range(0, 3)) == others


def test_files_of_shards_are_told_by_member(tmp_path: Path) -> None:
    write_shards(tmp_path, 1, 3)
    built = build_datasets({"own": {"builder": "shards", "train": {"shards": f"{tmp_path}/00000.tar"}}})
    pictures, own = Pictures(built["own"]["train"]), range(0, 3)
    before, contents = pictures.files(own), contents_of(pictures, own)
    os.utime(tmp_path / "00000.tar", (5, 5))
    after = pictures.files(own)
    assert after.state == before.state and after.times != before.times
    assert contents_of(pictures, own) == contents


def test_an_unreadable_picture_is_told_with_its_reason(tmp_path: Path) -> None:
    make_jsonl(tmp_path, 4)
    (tmp_path / "images" / "1.jpg").write_bytes(b"")
    viewed = ViewReader(Pictures(dataset(tmp_path)), count=2, seed=0)[[0, 1, 2]]
    assert viewed.numbers == [0, 2] and viewed.views is not None and viewed.views.shape == (4, 3, 16, 16)
    assert viewed.failures == [(1, str(tmp_path / "images" / "1.jpg"), "the file is empty")]
    pictures = Pictures(dataset(tmp_path))
    assert viewed.contents == [pictures.content(0), None, pictures.content(2)]
    assert ViewReader(pictures, count=2, seed=0)[[1]].views is None


def test_a_pictures_file_is_read_once_for_its_content_and_its_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that can be read now and not a moment later is either encoded or one to be tried again."""
    make_jsonl(tmp_path, 2)
    read: list[str] = []

    def once(path: str) -> bytes:
        read.append(path)
        if read.count(path) > 1:
            raise UnreadableSample(path, "Stale file handle")
        return Path(path).read_bytes()

    monkeypatch.setattr("lavis_lite.datasets.pictures.read_bytes", once)
    viewed = ViewReader(Pictures(dataset(tmp_path)), count=2, seed=0)[[0, 1]]
    assert viewed.numbers == [0, 1] and not viewed.failures and None not in viewed.contents


# The files


def filled(folder: Path, pictures: Pictures, precision: Any = "int8") -> tuple[FeatureStore, ImageFeatures]:
    layout = Layout(views=2, tokens=3, width=5, precision=precision, per_shard=4)
    states = [pictures.files(numbers).state for numbers in layout.shards(len(pictures))]
    store = FeatureStore(folder, layout, len(pictures), states)
    features = ImageFeatures.rounded(torch.randn(len(pictures), 2, 3, 5), precision)
    for shard in range(len(states)):
        own = store.numbers(shard)
        part = slice(own.start, own.stop)
        scale = None if features.scale is None else features.scale[part].contiguous()
        store.write(
            shard,
            ImageFeatures(features.values[part].contiguous(), scale),
            {1: "broken"} if not shard else {},
            contents_of(pictures, own),
        )
    return store, features


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_features_come_back_from_disk_as_they_were(tmp_path: Path, precision: Any) -> None:
    make_jsonl(tmp_path, 10)
    store, features = filled(tmp_path / "store", Pictures(dataset(tmp_path)), precision)
    assert store.missing() == [] and [len(store.numbers(shard)) for shard in range(3)] == [4, 4, 2]
    for opened in (store, pickle.loads(pickle.dumps(store))):
        for number in (0, 3, 4, 9):
            for view in (0, 1):
                got = opened.read(number, view)
                assert isinstance(got, ImageFeatures)
                assert torch.equal(got.float(), features.float()[number, view])
        assert opened.read(1, 0) == "broken"
    on_disk = sum(path.stat().st_size for path in store.folder.iterdir())
    assert store.size() < on_disk < store.size() + 3 * 400


def test_a_file_cut_short_or_of_other_pictures_is_missing(tmp_path: Path) -> None:
    make_jsonl(tmp_path, 10)
    pictures = Pictures(dataset(tmp_path))
    store, _ = filled(tmp_path / "store", pictures)
    store.path(1).write_bytes(store.path(1).read_bytes()[:-1])
    assert store.missing() == [1]
    with pytest.raises(
        DataError, match=r"000001.safetensors: .*the same command again builds what is missing"
    ):
        store.read(5, 0)
    (tmp_path / "images" / "9.jpg").write_bytes(b"x")
    changed = FeatureStore(
        store.folder, store.layout, 10, [*store.states[:2], pictures.files(range(8, 10)).state]
    )
    assert changed.missing() == [1, 2]
    with pytest.raises(DataError, match="other pictures now"):
        changed.read(9, 0)


def test_rows_draw_all_views_and_keep_their_texts(tmp_path: Path) -> None:
    make_jsonl(tmp_path, 6, captions=3)
    rows = dataset(tmp_path)
    store, features = filled(tmp_path / "store", Pictures(rows))
    stored = rows.with_features(StoredViews(Pictures(rows), store))
    assert rows.stored is None
    drawn = set()
    for seed in range(12):
        fresh, other = rows.load(4, seed=seed), stored.load(4, seed=seed)
        assert {k: v for k, v in fresh.items() if k != "image"} == {
            k: v for k, v in other.items() if k != "image"
        }
        view = seed_of(CHOICE, seed) % 2
        assert torch.equal(other["image"].float(), features.float()[4, view])
        drawn.add(view)
    assert drawn == {0, 1}
    batch = stored.collate([stored.load(row, seed=0) for row in (0, -1)])
    assert torch.equal(batch["image"].float()[1], stored.load(5, seed=0)["image"].float())
    with pytest.raises(UnreadableSample, match=r"images/1.jpg: broken"):
        stored.load(1, seed=0)


def test_questions_about_one_picture_share_its_features(tmp_path: Path) -> None:
    make_jsonl(tmp_path, 2)
    asked = [{"image": f"{n % 2}.jpg", "question": f"what is {n}?", "answer": f"it is {n}"} for n in range(6)]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    section = {
        "builder": "vqa",
        "root": str(tmp_path),
        "train": {"annotations": "questions.json", "images": "images"},
    }
    rows = build_datasets({"own": section})["own"]["train"]
    assert isinstance(rows, ImageTextDataset)
    pictures = Pictures(rows)
    assert (len(rows), len(pictures)) == (6, 2)
    store, features = filled(tmp_path / "store", pictures, "bf16")
    store.write(0, features, {}, "")
    stored = rows.with_features(StoredViews(pictures, store))
    sample, fresh = stored.load(4, seed=0), rows.load(4, seed=0)
    assert sample["text_input"] == fresh["text_input"] == "what is 4?" and sample["text_output"] == "it is 4"
    assert torch.equal(sample["image"].float(), stored.load(0, seed=0)["image"].float())
    assert stored.collate([sample])["question_id"] == rows.collate([fresh])["question_id"]


def test_files_have_the_size_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    # ViT-g at 224 pixels: 257 tokens x 1408 numbers.
    layout = Layout.of(4, 257, 1408, "bf16")
    assert layout.picture_bytes == 4 * 257 * 1408 * 2
    assert 0.9 < layout.per_shard * layout.picture_bytes / feature_store.SHARD_BYTES <= 1
    assert Layout.of(4, 257, 1408, "int8").picture_bytes == 4 * 257 * (1408 + 4)
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 1)
    assert Layout.of(4, 257, 1408, "bf16").per_shard == 1


# Keys


def test_processors_made_alike_have_one_description_in_every_process() -> None:
    code = (
        "import lavis_lite; from lavis_lite.processors import build_processor; from lavis_lite.common.fingerprint "
        f"import describe; [print(describe(build_processor({{'name': n}}, where='x'))) for n in {PROCESSORS}]"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "3", "OMP_NUM_THREADS": "1"}
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    own = [describe(build_processor({"name": name}, where="x")) for name in PROCESSORS]
    assert other.stdout.splitlines() == own and " at 0x" not in other.stdout
    small = [describe(build_processor({"name": name, "image_size": 32}, where="x")) for name in PROCESSORS]
    assert len({*own, *small}) == 2 * len(PROCESSORS)


def test_a_description_tells_every_change() -> None:
    class Thing:
        def __init__(self, value: Any) -> None:
            self.value = value
            self.itself = self

    values: list[Any] = [
        *(1, 1.0, "1", b"1", None, [1], {1}, {"a": 1}, collections.OrderedDict(b=1), torch.ones(1)),
        *(
            torch.zeros(1),
            torch.zeros(1).bfloat16(),
            torch.zeros(1).numpy(),
            torch.bfloat16,
            Thing(2),
            describe,
        ),
        *(
            Image.Resampling.BICUBIC,
            Image.Resampling.BILINEAR,
            torch.nn.ReLU(),
            torch.nn.Linear(1, 1, bias=False),
        ),
    ]
    texts = [describe(Thing(value)) for value in values]
    assert len(set(texts)) == len(texts)
    assert describe(Thing({"a": 1, "b": 2})) == describe(Thing({"b": 2, "a": 1}))


def test_a_digest_tells_one_changed_bit_and_a_changed_name() -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2).bfloat16()}
    changed = {**tensors, "a": torch.tensor([1.0, 1.0, 1.0 + 2**-23])}
    named = {"a": tensors["a"], "c": tensors["b"]}
    shaped = {**tensors, "b": tensors["b"].reshape(4)}
    assert len({tensors_digest(one) for one in (tensors, changed, named, shaped)}) == 4
    assert tensors_digest(dict(reversed(tensors.items()))) == tensors_digest(tensors)


# Settings


@pytest.mark.parametrize(
    ("text", "count"),
    [("20GB", 20 * 10**9), ("1.5 tb", 15 * 10**11), ("3MiB", 3 * 2**20), (77, 77), ("12", 12)],
)
def test_sizes_are_read(text: int | str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["much", "-3GB", "20 G B", "3XB", ""])
def test_what_is_no_size_is_an_error_with_its_key(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"run.features.max_bytes: expected a number of bytes such as 500MB or 20GB"
    ):
        FeatureConfig(max_bytes=text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (1_310_720_000, "1.31 GB")]
)
def test_sizes_are_written(count: int, text: str) -> None:
    assert show_bytes(count) == text


def test_no_views_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"run.features.views must be at least 1, got 0"):
        FeatureConfig(views=0)

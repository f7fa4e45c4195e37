"""Order, mixing, resuming and bad rows of the loaders, mostly watched on a dataset of numbers."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import NumberDataset, make_jsonl, warnings_logged

from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.datasets.bad_rows import ReadCounter
from lavis_lite.datasets.builders import build_datasets
from lavis_lite.datasets.loader import TrainLoader, eval_loader
from lavis_lite.datasets.order import TABLE_LENGTH, hashed, mixed, permuted, seed_of


def take(loader: TrainLoader, count: int, start: int = 0) -> list[dict[str, Any]]:
    return list(itertools.islice(loader.batches(start), count))


def numbers(loader: TrainLoader, count: int, start: int = 0) -> list[tuple[str, list[int], list[int]]]:
    return [(b["name"], b["index"].tolist(), b["seed"].tolist()) for b in take(loader, count, start)]


@pytest.mark.parametrize("length", [1, 2, 3, 10, 1000, TABLE_LENGTH, TABLE_LENGTH + 1, 100_003])
def test_permutations_are_bijections_that_the_key_changes(length: int) -> None:
    positions = np.arange(length)
    first, second = permuted(positions, length, 1), permuted(positions, length, 2)
    assert sorted(first.tolist()) == list(range(length))
    assert length < 10 or (first != second).mean() > 0.5
    # Any part is what the whole says it is: positions are independent of each other.
    assert permuted(positions[length // 2 :], length, 1).tolist() == first[length // 2 :].tolist()


def test_long_permutations_look_random() -> None:
    length = 200_000
    order = permuted(np.arange(length), length, 5)
    counts = np.histogram(order[: length // 10], bins=50, range=(0, length))[0]
    expected = length / 500
    assert ((counts - expected) ** 2 / expected).sum() < 85  # chi-square, 49 degrees of freedom: 0.1%
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01
    assert (np.diff(order) == 1).sum() < 10


def test_seeds_of_numbers_are_the_hash_of_their_array() -> None:
    for key in [(0,), (1, 2, 3), (2**63 - 1, 5), (7, 0, 0, 0)]:
        assert seed_of(*key) == int(hashed(*key)[0]) >> 1
    assert len({seed_of(a, b) for a in range(100) for b in range(100)}) == 10_000


def test_an_epoch_shows_every_row_at_most_once_and_the_next_in_another_order() -> None:
    loader = TrainLoader([NumberDataset(50)], batch_size=8)
    assert loader.batches_per_epoch == 6
    batches = numbers(loader, 12)
    first = [row for _, rows, _ in batches[:6] for row in rows]
    second = [row for _, rows, _ in batches[6:] for row in rows]
    assert len(set(first)) == len(set(second)) == 48 and first != second
    assert set(range(50)) == set(first) | set(second)
    # Augmentation: another seed for the same row in another epoch.
    seeds = {
        row: seed for _, rows, all_seeds in batches[:6] for row, seed in zip(rows, all_seeds, strict=True)
    }
    again = {
        row: seed for _, rows, all_seeds in batches[6:] for row, seed in zip(rows, all_seeds, strict=True)
    }
    assert all(seeds[row] != again[row] for row in seeds.keys() & again.keys())


def test_the_seed_decides_the_order() -> None:
    data = [NumberDataset(50)]
    assert numbers(TrainLoader(data, batch_size=8, seed=1), 3) == numbers(
        TrainLoader(data, batch_size=8, seed=1), 3
    )
    assert numbers(TrainLoader(data, batch_size=8, seed=1), 3) != numbers(
        TrainLoader(data, batch_size=8, seed=2), 3
    )


def test_resuming_at_any_batch_continues_the_stream() -> None:
    data = [NumberDataset(50, bad=[3, 4], name="a"), NumberDataset(31, name="b")]
    options: dict[str, Any] = {"batch_size": 4, "max_bad_fraction": 0.5}
    whole = numbers(TrainLoader(data, [2, 1], **options), 40)
    for start in (1, 13, 39):
        assert numbers(TrainLoader(data, [2, 1], **options), 40 - start, start) == whole[start:]


def test_the_global_batch_is_the_same_for_any_world_size() -> None:
    data = [NumberDataset(70, bad=[5], name="a"), NumberDataset(5, name="b")]
    one = numbers(TrainLoader(data, [1, 1], batch_size=12, max_bad_fraction=0.5), 10)
    for world in (2, 3):
        parts = [
            numbers(
                TrainLoader(
                    data, [1, 1], batch_size=12 // world, rank=rank, world_size=world, max_bad_fraction=0.5
                ),
                10,
            )
            for rank in range(world)
        ]
        for number, (name, rows, seeds) in enumerate(one):
            assert {part[number][0] for part in parts} == {name}  # all ranks draw the same dataset
            assert [row for part in parts for row in part[number][1]] == rows
            assert [seed for part in parts for seed in part[number][2]] == seeds


def test_ratios_decide_how_often_a_dataset_is_drawn() -> None:
    draws = Counter(dataset for dataset, _ in itertools.islice(mixed([3, 1, 0], seed=7), 20_000))
    assert set(draws) == {0, 1}
    assert abs(draws[0] / 20_000 - 0.75) < 0.0125  # 4 standard deviations
    by_rows = TrainLoader([NumberDataset(90), NumberDataset(10)], batch_size=5)
    names = Counter(dataset for dataset, _ in itertools.islice(mixed(by_rows.weights, seed=1), 2000))
    assert abs(names[0] / 2000 - 0.9) < 0.03


def test_within_a_mix_each_dataset_goes_through_its_own_epochs() -> None:
    loader = TrainLoader([NumberDataset(20, name="a"), NumberDataset(40, name="b")], [1, 1], batch_size=10)
    assert loader.batches_per_epoch == 6
    rows: dict[str, list[int]] = {"a": [], "b": []}
    for name, index, _ in numbers(loader, 30):
        rows[name] += index
    assert all(Counter(rows["a"][:20])[row] == 1 for row in range(20))
    assert all(Counter(rows["b"][:40])[row] == 1 for row in range(40))


def test_a_dataset_smaller_than_a_batch_wraps_around_with_one_line() -> None:
    with warnings_logged() as lines:
        loader = TrainLoader([NumberDataset(3)], batch_size=8)
        batches = numbers(loader, 3)
    rows = [row for _, index, _ in batches for row in index]
    assert len(rows) == 24 and all(sorted(rows[n : n + 3]) == [0, 1, 2] for n in range(0, 24, 3))
    assert len({seed for _, _, seeds in batches for seed in seeds}) == 24
    assert loader.batches_per_epoch == 1
    assert lines == [
        "dataset 'numbers' has 3 rows, fewer than the global batch of 8: rows repeat within a batch"
    ]


def test_unreadable_rows_are_replaced_counted_and_logged_once() -> None:
    loader = TrainLoader([NumberDataset(40, bad=[7, 9])], batch_size=8, max_bad_fraction=0.2)
    with warnings_logged() as lines:
        batches = numbers(loader, 15)
    assert all(len(index) == 8 and not {7, 9} & set(index) for _, index, _ in batches)
    assert loader.seen == 120 and loader.bad_images >= 6
    assert sorted(lines) == [
        f"unreadable, replaced by another row: /pictures/numbers/{row}.jpg: no such file" for row in (7, 9)
    ]


def test_too_many_unreadable_rows_stop_the_run() -> None:
    loader = TrainLoader([NumberDataset(1000, bad=range(0, 1000, 10))], batch_size=10, max_bad_fraction=0.01)
    with pytest.raises(
        DataError, match=r"reads failed, more than run\.max_bad_fraction=0\.01 allows, for example /pic"
    ):
        take(loader, 100)
    assert 100 <= loader.seen <= 1000  # not at the first unlucky rows, and not late


@pytest.mark.parametrize("workers", [0, 1])
def test_all_files_missing_stops_at_the_first_batch(workers: int) -> None:
    loader = TrainLoader([NumberDataset(1000, bad=range(1000))], batch_size=64, num_workers=workers)
    with pytest.raises(DataError, match=r"16 of 16 reads failed.*check the dataset's `images` folder"):
        take(loader, 1)


def test_zero_tolerance_stops_at_the_first_and_one_accepts_nearly_all() -> None:
    with pytest.raises(DataError, match="1 of "):
        take(TrainLoader([NumberDataset(20, bad=[3])], batch_size=2, max_bad_fraction=0), 20)
    assert (
        len(take(TrainLoader([NumberDataset(20, bad=range(15))], batch_size=2, max_bad_fraction=1.0), 20))
        == 20
    )


def test_the_limit_needs_more_than_bad_luck() -> None:
    counter = ReadCounter(0.01)
    counter.good, counter.bad = 100, 3
    assert not counter.exceeded()
    counter.good, counter.bad = 970, 30
    assert counter.exceeded()
    counter.good, counter.bad = 100_000, 900
    assert not counter.exceeded()


def test_real_pictures_with_workers_equal_those_without_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    make_jsonl(tmp_path, 12, captions=3)
    (tmp_path / "images" / "5.jpg").write_bytes(b"not a picture")
    section = {
        "root": str(tmp_path),
        "train": {"annotations": "rows.jsonl", "images": "images"},
        "vis_processor": {"train": {"name": "blip_image_train", "image_size": 32}},
    }
    data = build_datasets({"tiny": section})["tiny"]["train"]
    runs = {}
    for workers in (0, 2):
        torch.manual_seed(workers)  # must not matter
        state = torch.get_rng_state()
        runs[workers] = take(
            TrainLoader([data], batch_size=5, num_workers=workers, max_bad_fraction=1.0), 6, start=2
        )
        assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    for without, with_workers in zip(runs[0], runs[2], strict=True):
        assert without["text_input"] == with_workers["text_input"]
        for key in ("image", "image_id", "index"):
            assert torch.equal(without[key], with_workers[key])
    assert (
        len({text.split()[-1] for batch in runs[0] for text in batch["text_input"]}) == 3
    )  # captions are drawn


@pytest.mark.parametrize(("rows", "world"), [(10, 1), (10, 3), (2, 4), (17, 2)])
def test_evaluation_reads_every_row_exactly_once_over_all_ranks(rows: int, world: int) -> None:
    data = NumberDataset(rows, bad=[1])
    found: list[int] = []
    for rank in range(world):
        loader = eval_loader(data, batch_size=4, rank=rank, world_size=world, max_bad_fraction=1.0)
        batches = [batch["index"].tolist() for batch in loader]
        assert all(len(batch) <= 4 for batch in batches)
        found += [row for batch in batches for row in batch]
    assert found == [row for row in range(rows) if row != 1]


def test_evaluation_without_one_readable_row_is_an_error() -> None:
    with pytest.raises(DataError, match="dataset 'numbers': none of 3 rows could be read"):
        list(eval_loader(NumberDataset(3, bad=[0, 1, 2]), batch_size=2))


def test_evaluation_counts_and_logs_what_it_leaves_out() -> None:
    loader = eval_loader(NumberDataset(50, bad=[3]), batch_size=8, num_workers=1)
    assert len(loader) == 7
    with warnings_logged() as lines:
        for _ in range(2):
            assert sum(len(batch["index"]) for batch in loader) == 49
            assert loader.bad_images == 1
    assert lines == ["unreadable, left out of the evaluation: /pictures/numbers/3.jpg: no such file"]


def test_usage_errors() -> None:
    data = [NumberDataset(5), NumberDataset(5)]
    with pytest.raises(ConfigError, match="1 ratios for 2 datasets"):
        TrainLoader(data, [1.0], batch_size=2)
    with pytest.raises(ConfigError, match="none may be negative"):
        TrainLoader(data, [1.0, -1.0], batch_size=2)
    with pytest.raises(ConfigError, match="no dataset to train on"):
        TrainLoader([], batch_size=2)
    with pytest.raises(DataError, match="dataset 'numbers' has no rows"):
        TrainLoader([NumberDataset(0)], batch_size=2)


def test_waiting_time_is_measured() -> None:
    loader = TrainLoader([NumberDataset(50)], batch_size=8)
    take(loader, 5)
    assert 0.0 < loader.data_wait_s < 10.0


def test_closing_the_stream_ends_its_workers() -> None:
    batches = TrainLoader([NumberDataset(50)], batch_size=4, num_workers=2).batches()
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_a_program_ends_though_it_never_closed_its_stream() -> None:
    script = (
        "from data_helpers import NumberDataset\n"
        "from lavis_lite.datasets.loader import TrainLoader\n"
        "batches = TrainLoader([NumberDataset(50)], batch_size=4, num_workers=1).batches()\n"
        "next(batches)\n"
    )
    root = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root.parent)])}
    subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=True)

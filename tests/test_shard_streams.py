"""Shards read as streams: who reads what, in which order, and where a run goes on."""

from __future__ import annotations

import functools
import gzip
import http.server
import itertools
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import NumberDataset, warnings_logged
from shard_helpers import number_in, sample, section, write_shards

from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.datasets.builders import build_datasets
from lavis_lite.datasets.loader import TrainLoader, eval_loader
from lavis_lite.datasets.order import mixed, seed_of
from lavis_lite.datasets.shard_stream import ShardStream, StreamReader
from lavis_lite.datasets.stream_places import Position
from lavis_lite.datasets.tar_members import samples_of

SHARDS, SAMPLES = 6, 7


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    return write_shards(tmp_path / "shards", SHARDS, SAMPLES)


def build(pattern: str, **train: Any) -> ShardStream:
    options = {"stream": True, "samples": SHARDS * SAMPLES, "shuffle": 4, **train}
    built: Any = build_datasets({"web": section(pattern, **options)})["web"]["train"]
    assert isinstance(built, ShardStream)
    return built


def take(loader: TrainLoader, count: int, start: int = 0, places: Any = None) -> list[dict[str, Any]]:
    return list(itertools.islice(loader.batches(start, places), count))


def captions(batches: list[dict[str, Any]]) -> list[int]:
    return [number_in(text) for batch in batches for text in batch["text_input"]]


def drawn(reader: StreamReader, count: int) -> list[int]:
    return [number_in(item["text_input"]) for item in reader.take(count).samples]


def test_readers_share_an_epoch_without_overlap_in_another_order_each(pattern: str) -> None:
    stream = build(pattern)
    epochs: list[list[int]] = [[], []]
    for reader in range(3):
        mine = StreamReader(stream, seed=1, reader=reader, readers=3)
        for epoch in epochs:
            epoch += drawn(mine, 2 * SAMPLES)
    assert all(sorted(epoch) == list(range(SHARDS * SAMPLES)) for epoch in epochs)
    assert epochs[0] != epochs[1] != list(range(SHARDS * SAMPLES))
    again = StreamReader(stream, seed=1, reader=0, readers=3)
    assert drawn(again, SAMPLES) == epochs[0][:SAMPLES]
    assert drawn(StreamReader(stream, seed=2, reader=0, readers=3), SAMPLES) != epochs[0][:SAMPLES]


def test_a_block_is_shuffled_and_no_more_than_a_block_is_held(pattern: str) -> None:
    orders = [drawn(StreamReader(build(pattern, shuffle=n), seed=0, reader=0, readers=1), 42) for n in (1, 4)]
    assert all(orders[0][n] + 1 == orders[0][n + 1] for n in range(41) if (n + 1) % SAMPLES)
    for start in range(0, 40, 4):
        assert set(orders[0][start : start + 4]) == set(orders[1][start : start + 4])
    assert orders[0] != orders[1]


@pytest.mark.parametrize("taken", [0, 1, 4, 6, 14, 15, 20])
def test_a_reader_goes_on_exactly_and_opens_no_shard_that_is_done(pattern: str, taken: int) -> None:
    """The bound: what is read again begins in the shard in which the block in work begins."""
    stream = build(pattern)
    whole = StreamReader(stream, seed=1, reader=1, readers=2)
    drawn(whole, taken)
    place = whole.position
    opened: list[int] = []
    original = stream.raw

    def watched(shards: list[int], *args: Any, **kwargs: Any) -> Iterator[Any]:
        opened.extend(shards)
        return original(shards, *args, **kwargs)

    stream.raw = watched  # type: ignore[method-assign]
    rest = drawn(StreamReader(stream, seed=1, reader=1, readers=2, start=place), 30)
    first_epoch = 3 * SAMPLES
    order = stream.shards_of(0, seed=1, reader=1, readers=2)
    assert opened[: 3 - place.shard] == order[place.shard :]
    assert rest == drawn(whole, 30)
    block_begins = place.shard * SAMPLES + place.sample  # in samples of this reader's epoch
    assert block_begins <= max(taken, 1) <= block_begins + 4 and block_begins < first_epoch


def test_a_shard_that_is_gone_on_resuming_takes_nothing_from_the_next(pattern: str) -> None:
    stream = build(pattern, shuffle=1)
    reader = StreamReader(stream, seed=1, reader=0, readers=1)
    drawn(reader, 2 * SAMPLES + 4)
    order = stream.shards_of(0, seed=1, reader=0, readers=1)
    Path(stream.urls[order[2]]).unlink()
    rest = StreamReader(stream, seed=1, reader=0, readers=1, start=reader.position).take(SAMPLES)
    assert [number_in(item["text_input"]) // SAMPLES for item in rest.samples] == [order[3]] * SAMPLES
    assert [path for path, _ in rest.failures] == [stream.urls[order[2]]]


def test_a_bad_shard_that_alone_is_left_of_an_epoch_ends_no_run(pattern: str) -> None:
    stream = build(pattern, shuffle=1)
    first = TrainLoader([stream], batch_size=SAMPLES)
    take(first, SHARDS - 1)
    place = first.places["web 0/1"]
    last = stream.shards_of(0, seed=seed_of(42, 0), reader=0, readers=1)[-1]
    Path(stream.urls[last]).unlink()
    begun = place._replace(shard=SHARDS - 1, sample=3, taken=1)
    for workers, kept in ((0, begun), (1, begun), (2, place)):  # two share what is left, which is that shard
        loader = TrainLoader([stream], batch_size=SAMPLES, num_workers=workers, max_bad_fraction=1.0)
        seen = captions(take(loader, SHARDS - 1, SHARDS - 1, {"web 0/1": kept}))
        assert {number // SAMPLES for number in seen} <= set(range(SHARDS)) - {last}
    for url in {*stream.urls} - {stream.urls[last]}:
        Path(url).unlink()
    with pytest.raises(DataError, match="7 of 7 reads failed"):
        take(TrainLoader([stream], batch_size=4, max_bad_fraction=1.0), 1, 1, {"web 0/1": begun})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_in_mid_epoch_bit_for_bit(pattern: str, workers: int) -> None:
    def loader(rank: int) -> TrainLoader:
        options: dict[str, Any] = {"batch_size": 3, "rank": rank, "world_size": 2, "num_workers": workers}
        return TrainLoader([build(pattern), NumberDataset(9)], [3, 1], **options)

    whole = [take(loader(rank), 14) for rank in (0, 1)]
    first = [loader(rank) for rank in (0, 1)]
    for rank in (0, 1):
        take(first[rank], 5)
    places = {key: tuple(place) for one in first for key, place in one.places.items()}
    assert len(places) == 2 * max(1, workers)
    for rank in (0, 1):
        for expected, found in zip(whole[rank][5:], take(loader(rank), 9, 5, places), strict=True):
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                assert (
                    torch.equal(value, found[key]) if isinstance(value, torch.Tensor) else value == found[key]
                )


def test_ranks_and_workers_see_every_sample_once_an_epoch(pattern: str) -> None:
    seen: list[int] = []
    for rank in range(3):
        loader = TrainLoader([build(pattern)], batch_size=7, rank=rank, world_size=3, num_workers=2)
        seen += captions(take(loader, 2))
    assert sorted(seen) == list(range(SHARDS * SAMPLES))


def test_other_numbers_of_readers_read_what_is_left_of_the_epoch(pattern: str) -> None:
    stream = build(pattern, shuffle=SAMPLES)
    first = TrainLoader([stream], batch_size=7, num_workers=2)
    take(
        first, 10
    )  # all of epoch 0, and of each reader's three shards of epoch 1 two, the second still in work
    seed = seed_of(42, 0)
    done = {stream.shards_of(1, seed=seed, reader=reader, readers=2)[0] for reader in range(2)}
    second = TrainLoader([stream], batch_size=7, num_workers=1)
    with warnings_logged() as lines:
        seen = captions(take(second, 4, 10, first.places))
    assert len(lines) == 1 and "was read by 2 ranks x loader workers and now is by 1" in lines[0]
    left = [number for number in range(SHARDS * SAMPLES) if number // SAMPLES not in done]
    assert sorted(seen) == left
    assert second.places["web 0/1-1"] == Position(1, 3, 0, 7) and len(second.places) == 3
    # Once more, with the same number: what earlier readers did is still known.
    again = TrainLoader([stream], batch_size=7, num_workers=1)
    with warnings_logged() as lines:
        assert sorted(captions(take(again, 6, 14, second.places))) == list(range(SHARDS * SAMPLES))
    assert not lines and all(place.epoch == 2 for key, place in again.places.items() if key.endswith("/1-1"))
    # And when that epoch is over, it is forgotten.
    assert list(_places_after(stream, again.places, workers=1, start=20)) == ["web 0/1"]


def _places_after(stream: ShardStream, places: Any, *, workers: int, start: int) -> dict[str, Position]:
    loader = TrainLoader([stream], batch_size=7, num_workers=workers)
    take(loader, 1, start, places)
    return loader.places


def test_readers_without_a_shard_that_is_left_go_on_to_the_next_epoch(pattern: str) -> None:
    stream = build(pattern, shuffle=1)
    first = TrainLoader([stream], batch_size=7)
    take(first, 5)
    place = first.places["web 0/1"]
    assert place == Position(0, 4, 6, 1)
    second = TrainLoader([stream], batch_size=7, num_workers=3)
    seen = captions(take(second, 8, 5, first.places))
    # Two shards of epoch 0, one of which was read to its end but not past it; then all of epoch 1.
    assert Counter(seen).most_common(1)[0][1] == 2 and len(set(seen)) == SHARDS * SAMPLES


def test_a_rank_keeps_only_the_places_of_its_own_readers(pattern: str) -> None:
    """Else what it began with would take the place of what others have done since."""

    def run(start: int, places: Any) -> dict[str, Position]:
        kept: dict[str, Position] = {}
        for rank in (0, 1):
            loader = TrainLoader([build(pattern)], batch_size=7, rank=rank, world_size=2)
            take(loader, 1, start, places)
            kept.update(loader.places)
        return kept

    once = run(0, None)
    assert all(
        place.shard + place.sample < whole.shard + whole.sample
        for place, whole in zip(once.values(), run(1, once).values(), strict=True)
    )


def test_a_stream_is_mixed_by_ratio(pattern: str) -> None:
    loader = TrainLoader([build(pattern), NumberDataset(50)], [3, 1], batch_size=2, seed=5)
    names = ["web" if "image" in batch else "numbers" for batch in take(loader, 30)]
    expected = [("web", "numbers")[number] for number, _ in itertools.islice(mixed([3, 1], seed=5), 30)]
    assert names == expected and len(set(names)) == 2
    assert loader.batches_per_epoch == SHARDS * SAMPLES // 2 + 25


def test_broken_shards_and_members_are_counted_and_skipped(pattern: str, tmp_path: Path) -> None:
    broken = tmp_path / "shards/00001.tar"
    third = list(samples_of(broken))[3].members["jpg"]
    broken.write_bytes(broken.read_bytes()[: third.offset + 100])
    (tmp_path / "shards/00002.tar").write_bytes(b"\x00garbage" * 300)

    def make(number: int) -> dict[str, bytes]:
        return {**sample(number), **({"jpg": b"no picture"} if number == 3 else {})}

    write_shards(tmp_path / "shards", 1, SAMPLES, make=make)
    loader = TrainLoader([build(pattern)], batch_size=4, max_bad_fraction=0.5)
    with warnings_logged() as lines:
        seen = Counter(captions(take(loader, 16)))
    text = "\n".join(lines)
    assert (
        "00001.tar: " in text
        and "00002.tar: " in text
        and "00000.tar, sample 000000003: not a picture" in text
    )
    assert 3 not in seen and {7, 8, 9, *range(21, 42)} <= set(seen) and not {*range(10, 21)} & set(seen)
    assert loader.bad_images >= 4
    with pytest.raises(DataError, match=r"run\.max_bad_fraction=0 allows, for example"):
        take(TrainLoader([build(pattern)], batch_size=4, max_bad_fraction=0), 12)


def test_nothing_readable_at_all_ends_the_run(pattern: str, tmp_path: Path) -> None:
    stream = build(pattern)
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.write_bytes(b"")
    with pytest.raises(DataError, match=r"6 of 6 reads failed"):
        take(TrainLoader([stream], batch_size=4, max_bad_fraction=1.0), 1)
    with pytest.raises(
        DataError, match=r"dataset 'web': no usable sample at the beginning .*00000\.tar: empty file"
    ):
        build(pattern)


@pytest.mark.parametrize("command", [True, False])
def test_an_outage_of_a_streams_source_may_pass(pattern: str, tmp_path: Path, command: bool) -> None:
    stream = build(pattern)
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.write_bytes(b"")
    if command:
        stream.urls = [f"pipe:cat {url}" for url in stream.urls]
    with pytest.raises(DataError) as caught:
        take(TrainLoader([stream], batch_size=4, max_bad_fraction=1.0), 1)
    assert caught.value.passing is command


def test_shards_with_nothing_in_them_end_the_run_with_a_reason(pattern: str, tmp_path: Path) -> None:
    stream = build(pattern)
    for shard in (tmp_path / "shards").glob("*.tar"):
        tarfile.open(shard, "w").close()
    with pytest.raises(DataError, match=r"\.tar: it has no sample"):
        take(TrainLoader([stream], batch_size=4, max_bad_fraction=1.0), 1)


def test_fewer_shards_than_readers_is_an_error_before_training(pattern: str) -> None:
    with pytest.raises(DataError, match=r"6 shards for 8 readers \(2 ranks x run\.num_workers=4\)"):
        TrainLoader([build(pattern)], batch_size=2, world_size=2, num_workers=4)


def test_keys_are_looked_at_before_training(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 2, 2, make=lambda number: {"cls": b"1", "npy": b"2"})
    with pytest.raises(DataError, match=r"sample 000000000: no picture among its members \(cls, npy\)"):
        build(pattern)


def test_samples_at_fault_are_told_of_before_training_though_others_are_good(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 5, 10)
    with warnings_logged() as lines:
        build(pattern)
    assert not lines
    (tmp_path / "00004.tar").unlink()
    with_half = write_shards(
        tmp_path / "half",
        2,
        10,
        make=lambda number: {**sample(number), **({"json": b"{}"} if number % 2 else {})},
    )
    with warnings_logged() as lines:
        build(f"pipe:cat {with_half}")
        build(f"pipe:cat {pattern} 2> /dev/null")
    assert "'web': 8 of 16 samples at the beginning of 2 shards can't be used (50%), for example " in lines[0]
    assert lines[0].endswith("half/00000.tar, sample 000000001: no caption in its .json or .txt")
    assert "'web': 1 of 17 samples at the beginning of 3 shards" in lines[1] and "exit code 1" in lines[1]


def test_a_stream_does_not_evaluate(pattern: str) -> None:
    with pytest.raises(ConfigError, match="a stream is for training"):
        eval_loader(build(pattern), batch_size=2)  # type: ignore[arg-type]


@pytest.fixture
def address(pattern: str, tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(tmp_path / "shards"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{{00000..00005}}.tar"
        server.shutdown()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def test_addresses_and_commands_give_what_files_give(pattern: str, address: str) -> None:
    local = captions(take(TrainLoader([build(pattern)], batch_size=6), 7))
    for other in (address, f"pipe:cat {pattern}"):
        assert captions(take(TrainLoader([build(other, stream=None)], batch_size=6), 7)) == local


def test_local_shards_and_streams_are_not_mixed_unless_all_are_streamed(tmp_path: Path) -> None:
    write_shards(tmp_path, 2, SAMPLES)
    one, two = tmp_path / "00000.tar", tmp_path / "00001.tar"
    joined = f"{one}::pipe:cat {two}"
    for mixed_ones in (joined, [str(one), f"pipe:cat {two}"], f"{tmp_path}/{{00000.tar,00001.tar.gz}}"):
        with pytest.raises(
            ConfigError, match=r"shards mixes local \.tar files \('.*00000\.tar'\).*stream=true"
        ):
            build(mixed_ones, stream=None)  # type: ignore[arg-type]
    streamed = build(joined, samples=2 * SAMPLES, shuffle=1)
    assert streamed.urls == [str(one), f"pipe:cat {two}"]
    assert sorted(drawn(StreamReader(streamed, seed=0, reader=0, readers=1), 14)) == list(range(14))


def test_braces_beside_a_command_may_name_missing_shards(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "shards/00001.tar").unlink()
    command = f"pipe:cat {tmp_path}/shards/00005.tar"
    with warnings_logged() as lines:
        streamed = build(f"{tmp_path}/shards/{{00000..00002}}.tar::{command}")
    assert streamed.urls == [*(f"{tmp_path}/shards/0000{number}.tar" for number in (0, 2)), command]
    assert len(lines) == 1 and "1 of 3 shards are missing" in lines[0]


def test_compressed_tars_are_streamed(pattern: str, tmp_path: Path) -> None:
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.with_suffix(".tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    packed = captions(take(TrainLoader([build(f"{pattern}.gz", stream=None)], batch_size=6), 7))
    assert packed == captions(take(TrainLoader([build(pattern)], batch_size=6), 7))


def test_an_address_or_command_that_fails_says_so(address: str) -> None:
    with pytest.raises(DataError, match=r"9\.tar: its command ended with exit code 22"):
        build(address.replace("{00000..00005}", "9"))
    with pytest.raises(DataError, match="nowhere: "):
        build("pipe:cat nowhere")


def test_a_position_is_four_numbers() -> None:
    assert Position(*[1, 2, 3, 4]) == (1, 2, 3, 4) and Position() == (0, 0, 0, 0)

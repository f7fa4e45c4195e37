"""Ranks that are started agree on a name for their start, whatever those before them have left in the store."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import Store, TCPStore

from lavis_lite.common import starts
from lavis_lite.common.errors import TrainingError

RANKS = 3
PATIENCE = timedelta(seconds=60)


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadPoolExecutor]:  # ends before what it patched
    with ThreadPoolExecutor(8) as pool:
        yield pool


def _start(
    pool: ThreadPoolExecutor, store: Store, *ranks: int, timeout: timedelta = PATIENCE
) -> list[Future[str]]:
    """Ranks in threads, each with a connection of its own, one after the other."""
    started = []
    for rank in ranks:
        started.append(pool.submit(starts.name_start, store.clone(), rank, RANKS, timeout))
        threading.Event().wait(0.1)
    return started


def _names(started: list[Future[str]]) -> set[str]:
    return {one.result(timeout=20) for one in started}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_each_start_has_a_name_of_its_own(
    store: TCPStore, pool: ThreadPoolExecutor, order: tuple[int, ...]
) -> None:
    first, second = (_names(_start(pool, store, *order)) for _ in range(2))
    assert len(first) == len(second) == 1 and first != second


def test_ranks_that_died_before_the_others_came_are_not_waited_for(
    store: TCPStore, pool: ThreadPoolExecutor
) -> None:
    """Rank 1 of a dead start has left its number, and rank 0 takes it for a living one until that has come."""
    store.set("starts/hello/1", "dead")
    early = _start(pool, store, 2, 0)
    assert not any(one.done() for one in early)
    assert len(_names(early + _start(pool, store, 1))) == 1


def test_ranks_that_linger_from_a_dead_start_take_no_place_in_the_next(
    store: TCPStore, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two still wait for rank 2, which never came, when all three are started again."""
    lingering = _start(pool, store, 0, 1)
    assert len(_names(_start(pool, store, 0, 1, 2))) == 1
    with pytest.raises(TrainingError, match="another process has become rank 0"):
        lingering[0].result(timeout=20)
    assert not lingering[1].done()
    monkeypatch.setattr(time, "monotonic", lambda: math.inf)


def test_a_rank_whose_launcher_is_gone_ends(
    store: TCPStore, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(starts.TORCHRUN, "job")
    parents = iter([7, 7, 7])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    (left,) = _start(pool, store, 1)
    with pytest.raises(TrainingError, match="rank 1 was left alone"):
        left.result(timeout=20)


@pytest.mark.parametrize("rank", [0, 1])
def test_others_that_never_come_are_one_line(store: TCPStore, pool: ThreadPoolExecutor, rank: int) -> None:
    (waiting,) = _start(pool, store, rank, timeout=timedelta(seconds=0.3))
    with pytest.raises(TrainingError, match=f"rank {rank} waited 0.005 minutes for the others"):
        waiting.result(timeout=20)

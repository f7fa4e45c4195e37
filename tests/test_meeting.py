"""Who lives, and who speaks, when an exchange between ranks has failed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from lavis_lite.common import lookout
from lavis_lite.common import meeting as module
from lavis_lite.common.meeting import Meeting


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def ranks(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Meeting]]:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "ROLL_CALL_SECONDS", 1.0)
    meetings = [Meeting(store.clone(), rank, 4, launch=store) for rank in range(4)]
    yield meetings
    for one in meetings:
        one.close()


def test_silent_ranks_are_told_from_those_that_only_wait(ranks: list[Meeting]) -> None:
    for gone in (2, 3):
        ranks[gone].close()
    assert [ranks[rank].claim() for rank in (1, 0)] == [True, False]
    assert ranks[1].roll_call() == ([2, 3], [])


@pytest.mark.parametrize("gone", [[], [2]])
def test_a_rank_that_is_busy_for_long_is_not_called_silent(ranks: list[Meeting], gone: list[int]) -> None:
    for rank in (*gone, 3):
        ranks[rank].close()
    beat = threading.Timer(2.5 if gone else 1.5, lambda: ranks[3]._store.add("beats/3", 1))
    assert [ranks[rank].claim() for rank in (1, 0)] == [True, False]
    beat.start()
    silent, calm = ranks[1].roll_call()
    assert silent == gone and 3 in calm


def test_who_has_met_no_failure_is_told_when_all_live(ranks: list[Meeting]) -> None:
    assert ranks[0].claim()
    assert ranks[0].roll_call() == ([], [1, 2, 3])


def test_a_line_is_said_once_and_a_new_start_knows_of_the_end(ranks: list[Meeting], store: TCPStore) -> None:
    assert ranks[2].ended is None
    assert [ranks[2].end(1, "one"), ranks[0].end(1, "one"), ranks[1].end(1, "another")] == [True, False, True]
    again = Meeting(PrefixStore("start_1", store), 0, 4, launch=store)
    assert again.ended == 1
    again.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(lookout, "LINGER_SECONDS", 0.5)


class Alarm:
    """What a rank that watches is told, and on whose behalf."""

    def __init__(self) -> None:
        self.rung = threading.Event()
        self.own: Meeting | None = None

    def __call__(self, own: Meeting) -> None:
        self.own = own
        self.rung.set()


def test_a_silent_rank_is_noticed_by_the_one_before_it(ranks: list[Meeting], impatient: None) -> None:
    alarms = [Alarm() for _ in ranks]
    with contextlib.ExitStack() as watches:
        for one, alarm in zip(ranks, alarms, strict=True):
            watches.enter_context(one.watching(alarm))
        ranks[2].close()
        assert alarms[1].rung.wait(10)
    assert alarms[1].own is not None
    assert alarms[1].own.roll_call() == ([2], [0, 1, 3])  # 1 beats on while its thread calls
    assert [alarm.rung.is_set() for alarm in alarms] == [False, True, False, False]


def test_a_claim_reaches_ranks_that_nobody_before_them_is_missing(
    ranks: list[Meeting], impatient: None
) -> None:
    alarm = Alarm()
    assert ranks[3].claim()
    with ranks[0].watching(alarm):
        assert alarm.rung.wait(10)


def test_who_left_in_order_and_who_is_waited_for_patiently_are_not_missed(
    ranks: list[Meeting], impatient: None
) -> None:
    alarm = Alarm()
    ranks[1].leave()
    ranks[2].leave()
    with ranks[0].watching(alarm):
        assert not alarm.rung.wait(2.0)
        ranks[3].close()  # watched now, the two before it being gone
        with ranks[0].patient():
            assert not alarm.rung.wait(1.5)
        assert alarm.rung.wait(10)


def test_the_others_stay_until_the_roll_is_called(ranks: list[Meeting]) -> None:
    staying = threading.Thread(target=ranks[1].stay)
    staying.start()
    staying.join(timeout=0.5)
    assert staying.is_alive()
    ranks[0].let_go()
    staying.join(timeout=5.0)
    assert not staying.is_alive()


def test_without_the_store_the_last_beat_tells_who_spoke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", host.port, is_master=False, wait_for_workers=False)
    one, other = (Meeting(client.clone(), rank, 2, launch=client) for rank in (1, 0))
    assert other.claim()
    threading.Event().wait(1.0)
    other.close()
    del other, host
    assert not one.claim()
    assert one.roll_call() == ([], [])
    assert one.ended is None and one.end(1, "said")
    one.stay()
    one.let_go()
    one.close()


class DyingStore(HashStore):
    """A store whose machine is lost at some moment."""

    dead = False

    def clone(self) -> DyingStore:
        return self

    def add(self, key: str, amount: int) -> int:
        if self.dead:
            raise RuntimeError("Broken pipe")
        return super().add(key, amount)


@pytest.fixture
def on_dying_store(monkeypatch: pytest.MonkeyPatch, impatient: None) -> tuple[Meeting, DyingStore]:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "PrefixStore", lambda prefix, store: store)
    store = DyingStore()
    return Meeting(store, 1, 2, launch=store), store


def test_who_watches_is_told_that_the_store_is_gone(on_dying_store: tuple[Meeting, DyingStore]) -> None:
    one, store = on_dying_store
    assert one.claim()
    alarm = Alarm()
    with one.watching(alarm), one.patient():
        threading.Event().wait(0.3)
        store.dead = True
        assert not alarm.rung.wait(1.5)  # as `patient` asks
    assert not alarm.rung.is_set()
    with one.watching(alarm):
        assert alarm.rung.wait(10)
    assert alarm.own is one and one.gone and one.claimed
    one.close()


def test_who_leaves_in_order_needs_no_store(on_dying_store: tuple[Meeting, DyingStore]) -> None:
    one, store = on_dying_store
    alarm = Alarm()
    with one.watching(alarm):
        store.dead = True
        threading.Event().wait(0.2)
        one.leave()
        assert not alarm.rung.wait(1.5)

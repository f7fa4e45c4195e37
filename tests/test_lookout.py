"""When a rank takes another one's silence for its end."""

from __future__ import annotations

from torch.distributed import HashStore

from lavis_lite.common.lookout import LINGER_SECONDS, SILENCE_SECONDS, Lookout


def _seconds(
    store: HashStore, lookout: Lookout, *, beating: int | None = None, claimed: bool = False
) -> float:
    """How long it takes, looking every half second, until the end is seen; at most ten minutes."""
    for look in range(1200):
        if beating is not None:
            store.add(f"beats/{beating}", 1)
        if lookout.sees_end(store, claimed=claimed, now=0.5 * look):
            return 0.5 * look
    return 600.0


def test_silence_is_the_end_after_a_minute_and_beats_are_not() -> None:
    store = HashStore()
    assert SILENCE_SECONDS <= _seconds(store, Lookout(0, 3)) <= SILENCE_SECONDS + 1
    assert _seconds(store, Lookout(0, 3), beating=1) == 600.0


def test_what_another_has_claimed_is_the_end_when_it_has_had_time_to_speak() -> None:
    seconds = _seconds(HashStore(), Lookout(0, 3), beating=1, claimed=True)
    assert LINGER_SECONDS <= seconds <= LINGER_SECONDS + 1


def test_who_has_left_is_watched_no_more() -> None:
    store = HashStore()
    store.set("left/1", "1")
    assert _seconds(store, Lookout(0, 2)) == 600.0  # nobody is left to watch
    assert _seconds(store, Lookout(0, 3), beating=2) == 600.0
    assert 2 * SILENCE_SECONDS <= _seconds(store, Lookout(0, 3)) <= 2 * SILENCE_SECONDS + 1


def test_a_machine_that_stood_still_has_not_watched() -> None:
    store, lookout = HashStore(), Lookout(0, 2)
    assert not any(lookout.sees_end(store, claimed=False, now=now) for now in (0.0, 0.5, 1000.0, 1000.5))


def test_after_a_false_alarm_the_watch_begins_anew() -> None:
    store, lookout = HashStore(), Lookout(0, 2)
    assert all(_seconds(store, lookout) >= SILENCE_SECONDS for _ in range(2))

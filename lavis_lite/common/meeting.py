"""What ranks leave for each other in the store they met at, beside their exchanges: who lives, who speaks, what ended.

An exchange that fails doesn't tell who is gone, and where it fails first isn't where the others learn of it. So every
rank beats in the store from a thread of its own, whatever its exchanges do. Only code that holds the interpreter's lock
keeps it from beating, for seconds where a large file is parsed: silence must last before it means that a rank ended.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator

from torch.distributed import PrefixStore, Store

from lavis_lite.common import lookout
from lavis_lite.common.lookout import Lookout

BEAT_SECONDS = 0.5
# Between two readings of a roll call: several beats, on a busy machine too.
ROLL_CALL_SECONDS = 3.0
# After the first. Where one rank alone is silent it is why an exchange failed, and two will do; of several one may only
# be busy.
READINGS = 4


class Meeting:
    """One rank's place among the others, for as long as it lives.

    torchrun's own store outlives all ranks; without torchrun it ends with rank 0, and what can't be asked any more
    is answered from what the last beat saw.

    Args:
        store: that all ranks met at, with a prefix of its own for each start of them.
        launch: the same for all starts of one launch.
    """

    def __init__(self, store: Store, rank: int, ranks: int, *, launch: Store) -> None:
        self.rank, self.ranks = rank, ranks
        self._launch: Store = PrefixStore("launch", launch)
        self._store: Store = PrefixStore("meeting", store)
        self._seen_claimed = False
        self.gone = False  # the store, as the thread that beats has found
        self._watch: tuple[Lookout, Callable[[Meeting], None]] | None = None
        self._answering: threading.Thread | None = None
        self._over = threading.Event()
        # A clone has a connection of its own: the main thread may be waiting at the store for long.
        self._thread = threading.Thread(target=self._beat, args=(self._store.clone(),), daemon=True)
        if ranks > 1:
            self._thread.start()

    def close(self) -> None:
        """Beat no more."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)

    def leave(self) -> None:
        """Beat no more, in order: nobody is to take the silence for a rank that is lost."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "1")
        self.close()

    @contextlib.contextmanager
    def watching(self, lost: Callable[[Meeting], None]) -> Iterator[None]:
        """Within the block another rank's end is noticed whatever the main thread does, in a minute or so.

        lost: called in a thread with a meeting of that thread's own; where it returns, the watch goes on. Called with
            a meeting that is `gone`, too, when the store has been for longer than a failed exchange takes to speak.
        """
        before, self._watch = self._watch, (Lookout(self.rank, self.ranks), lost)
        try:
            yield
        finally:
            self._watch = before

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Within the block no silence counts: one rank does for long what may hold its interpreter's lock."""
        before, self._watch = self._watch, None
        try:
            yield
        finally:
            if before is not None:
                self._watch = (Lookout(self.rank, self.ranks), before[1])

    def _beat(self, store: Store) -> None:
        try:
            while not self._over.is_set():
                store.add(f"beats/{self.rank}", 1)
                self._seen_claimed = store.add("claims", 0) > 0
                self._look(store)
                self._over.wait(BEAT_SECONDS)
        except RuntimeError:  # the store is gone, and with it whoever could read
            self._outlive_store()

    def _outlive_store(self) -> None:
        """Nobody can be asked any more: a main thread that hasn't learnt of it in time never may."""
        self.gone = True
        while not self._over.wait(lookout.LINGER_SECONDS):
            watch = self._watch
            if watch is not None:
                watch[1](self)

    def _look(self, store: Store) -> None:
        watch = self._watch
        if watch is None or (self._answering is not None and self._answering.is_alive()):
            return
        own, lost = watch
        if own.sees_end(store, claimed=self._seen_claimed, now=time.monotonic()):
            # Not here: the beats must go on while the roll is called.
            self._answering = threading.Thread(target=lost, args=(self._twin(),), daemon=True)
            self._answering.start()

    def _twin(self) -> Meeting:
        """This meeting with connections of its own, of which the main thread holds none."""
        twin = copy.copy(self)
        twin._store, twin._launch = self._store.clone(), self._launch.clone()
        return twin

    def end(self, code: int, line: str) -> bool:
        """Say that the run can't go on, not by a new start either; whether no rank has said this line before."""
        try:
            self._launch.set("ended", str(code))
            self._store.add("claims", 1)  # nobody is to call the roll any more
            return self._launch.add(f"lines/{line}", 1) == 1
        except RuntimeError:
            return True

    @property
    def ended(self) -> int | None:
        """The exit code of a rank that has said `end`, in this start of the ranks or one before."""
        try:
            return int(self._launch.get("ended")) if self._launch.check(["ended"]) else None
        except RuntimeError:
            return None

    @property
    def claimed(self) -> bool:
        """Whether the run can't go on for some rank, which speaks."""
        if self.gone:  # the main thread may hold the connection for ever
            return self._seen_claimed
        try:
            return self._store.add("claims", 0) > 0
        except RuntimeError:
            return self._seen_claimed

    def claim(self) -> bool:
        """Say that an exchange has failed here; whether this rank was the first, which speaks for all."""
        try:
            self._store.set(f"failed/{self.rank}", "1")
            return self._store.add("claims", 1) == 1
        except RuntimeError:
            return not self._seen_claimed

    def roll_call(self) -> tuple[list[int], list[int]]:
        """Ranks that have fallen silent, and ranks that live but have not `claim`ed; takes up to a dozen seconds.

        Both are empty where the store is gone.
        """
        try:
            before, silent = self._beats(), list(range(self.ranks))
            for reading in range(READINGS):
                time.sleep(ROLL_CALL_SECONDS)
                silent = [rank for rank, beats in enumerate(self._beats()) if beats == before[rank]]
                if not silent or (len(silent) == 1 and reading > 0):
                    break
            calm = [rank for rank in range(self.ranks) if not self._store.check([f"failed/{rank}"])]
        except RuntimeError:
            return [], []
        return silent, [rank for rank in calm if rank not in silent]

    def _beats(self) -> list[int]:
        return [self._store.add(f"beats/{rank}", 0) for rank in range(self.ranks)]

    def let_go(self) -> None:
        """End the wait of `stay`."""
        try:
            self._store.set("called", "1")
        except RuntimeError:
            return

    def stay(self) -> None:
        """Live on until the rank that speaks has called the roll: one that ended by itself would be called lost."""
        end = time.monotonic() + (READINGS + 2) * ROLL_CALL_SECONDS
        try:
            while not self._store.check(["called"]) and time.monotonic() < end:
                time.sleep(BEAT_SECONDS)
        except RuntimeError:
            return

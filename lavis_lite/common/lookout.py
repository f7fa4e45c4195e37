"""Whether the other ranks live, for a rank that can't learn it from its own exchanges.

With NCCL the main thread may wait for the device in a call that nothing interrupts, and an exchange that has lost its
partner never fails. So the thread that beats also looks after others: each rank after the next one, so that the store
is asked no more for many ranks than for few.
"""

from __future__ import annotations

from torch.distributed import Store

# Much longer than a roll call, so that a failed exchange speaks first, and than any file takes to parse that holds the
# interpreter's lock: it means the end of this process.
SILENCE_SECONDS = 60.0
# A rank for which an exchange has failed speaks within a roll call, which ends before that.
LINGER_SECONDS = 30.0
# Between two looks no more than this counts: a machine that stood still has not watched.
LOOK_SECONDS = 2.0


class Lookout:
    """What one rank has seen of the others since it began to watch."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks
        self._watched = (rank + 1) % ranks
        self._beats = -1
        self._silent = self._claimed = 0.0
        self._looked: float | None = None

    def sees_end(self, store: Store, *, claimed: bool, now: float) -> bool:
        """Whether the watched rank has been silent, or another has known of a failed exchange, for too long.

        A rank that has left in order is watched no more, but the one after it. After True the counting begins anew.
        """
        passed = min(now - self._looked, LOOK_SECONDS) if self._looked is not None else 0.0
        self._looked = now
        self._claimed = self._claimed + passed if claimed else 0.0
        beats = store.add(f"beats/{self._watched}", 0) if self._watched != self._rank else self._beats + 1
        self._silent = self._silent + passed if beats == self._beats else 0.0
        self._beats = beats
        if self._silent >= SILENCE_SECONDS and store.check([f"left/{self._watched}"]):
            self._watched, self._beats, self._silent = (self._watched + 1) % self._ranks, -1, 0.0
        if self._silent < SILENCE_SECONDS and self._claimed < LINGER_SECONDS:
            return False
        self._silent = self._claimed = 0.0
        return True

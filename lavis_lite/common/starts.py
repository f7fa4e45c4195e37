"""Which start of the ranks this is: they agree on a name for it in the store, where keys of earlier starts stay.

torchrun's count won't do: each machine has one of its own, which a start for another machine's sake leaves as it is.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store

from lavis_lite.common.errors import TrainingError

TORCHRUN = "TORCHELASTIC_RUN_ID"
# A wait in the store would be cheaper, but prints two warnings whenever it ends to look around.
POLL_SECONDS = 0.1


def name_start(store: Store, rank: int, ranks: int, timeout: timedelta) -> str:
    """A name that all ranks started together get, and none that was started before or comes after them.

    Every rank leaves a number of its own; rank 0 proposes a name to those it finds, again whenever one of them was
    of a dead rank and the living one has come. The name holds once all have heard it.

    Raises TrainingError when the others don't come within the timeout, or another process has taken this one's place.
    """
    place = _Place(PrefixStore("starts", store), rank, timeout)
    return place.propose(ranks) if rank == 0 else place.follow()


class _Place:
    """One rank in the store: hello/RANK its number, answer/NUMBER a first name, next/NAME another one or ''."""

    def __init__(self, store: Store, rank: int, timeout: timedelta) -> None:
        self.store, self.rank, self.number = store, rank, uuid.uuid4().hex
        self._parent = os.getppid() if TORCHRUN in os.environ else None
        self._minutes = timeout.total_seconds() / 60
        self._end = time.monotonic() + timeout.total_seconds()
        store.set(f"hello/{rank}", self.number)

    def propose(self, ranks: int) -> str:
        hellos = [f"hello/{rank}" for rank in range(ranks)]
        while not self.store.check(hellos):
            self._pause()
        asked: list[str] = []
        name = ""
        while True:
            numbers = [number.decode() for number in self.store.multi_get(hellos)]
            if numbers[0] != self.number:
                raise TrainingError("another process has become rank 0 while this one waited for the others")
            if numbers != asked:
                name, before, asked = uuid.uuid4().hex, name, numbers
                for number in numbers:
                    self.store.set(f"answer/{number}", name)
                if before:
                    self.store.set(f"next/{before}", name)
            heard = [f"heard/{name}/{rank}" for rank in range(1, ranks)]
            if self.store.check(heard):
                self.store.set(f"next/{name}", "")
                return name
            self._pause()

    def follow(self) -> str:
        name = self._read(f"answer/{self.number}")
        while True:
            self.store.set(f"heard/{name}/{self.rank}", "1")
            following = self._read(f"next/{name}")
            if not following:
                return name
            name = following

    def _read(self, key: str) -> str:
        while not self.store.check([key]):
            self._pause()
        return self.store.get(key).decode()

    def _pause(self) -> None:
        # torchrun was killed: the ranks of the next one take the places.
        if self._parent not in (None, os.getppid()):
            raise TrainingError(f"rank {self.rank} was left alone by the process that started it")
        if time.monotonic() > self._end:
            raise TrainingError(
                f"rank {self.rank} waited {self._minutes:g} minutes for the others to start (run.timeout): see what "
                "the other machines say, and start all of them again"
            )
        time.sleep(POLL_SECONDS)

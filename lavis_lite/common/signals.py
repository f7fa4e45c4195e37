"""SIGTERM and Ctrl-C as a request that the training loop answers between two steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
# torchrun and schedulers pass on a signal that the processes already got: copies come at once, people don't.
COPIES_SECONDS = 1.0


class StopSignals:
    """While entered, SIGTERM and SIGINT only set `received`, the first of them.

    A second Ctrl-C by a person raises KeyboardInterrupt at once. Outside the main thread, where Python allows
    no handlers, nothing is ever received.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._at > COPIES_SECONDS:
            raise KeyboardInterrupt

"""Ranks that lose each other, each started as `-m tests.fault_scenarios NAME [PROJECT]`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from lavis_lite.commands.run import evaluate_main
from lavis_lite.common import dist, lookout, meeting
from lavis_lite.runners import evaluation, faults


def lose_one_in_an_evaluation(path: str) -> None:
    """Rank 1 is killed where rank 0 waits for it."""

    def evaluate(*_: object, **__: object) -> None:
        if dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    evaluation.evaluate_splits = evaluate  # type: ignore[assignment]
    evaluate_main(["--cfg-path", path])


def lose_one_while_stuck() -> None:
    """Rank 1 is killed; rank 0 waits for a minute in C, as for a device, and Python can't interrupt it."""
    lookout.SILENCE_SECONDS = 2.0
    dist.init()
    with faults.speaking_once(lambda: "at step 5"):
        if dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ctypes.CDLL(None).sleep(60)


if __name__ == "__main__":
    meeting.ROLL_CALL_SECONDS = 1.0
    name, *arguments = sys.argv[1:]
    globals()[name](*arguments)

"""What a rank does when another one is gone: find out which, and say so in one line."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import torch.distributed as torch_dist

from lavis_lite.common import dist
from lavis_lite.common.errors import TrainingError

# How the libraries that carry tensors between processes, and the store where they meet, say that the other end is gone
# or silent. NCCL's own errors of use and of the machine (two ranks on one GPU, no memory) say none of it.
LOST = (
    "connection closed by",
    "connection reset by peer",
    "connection refused",
    "connection was likely closed",
    "broken pipe",
    "timed out",
    "timeout",
    "socket closed",
    "remote process exit",
    "communicator was aborted",
)


@contextlib.contextmanager
def naming_lost_ranks(where: Callable[[], str]) -> Iterator[None]:
    """Within the block a failed exchange with other ranks becomes one line, on the rank that finds out first.

    where: tells the step, and what to go on from.

    From then on SIGTERM is ignored: torchrun sends it as soon as it misses a rank, and the line would never be said.

    Raises TrainingError on that rank and SystemExit(1) on the others.
    """
    try:
        yield
    except RuntimeError as error:
        if dist.world_size() == 1 or not is_lost_peer(error):
            raise
        _ignore_sigterm()
        raise TrainingError(f"{_who_is_lost()} {where()}; {_reason(error)}") from error


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an exchange with another rank failed, and not something in this process."""
    text = str(error).lower()
    between_ranks = isinstance(error, torch_dist.DistError) or "gloo" in text or "nccl" in text
    return between_ranks and any(words in text for words in LOST)


def _ignore_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _who_is_lost() -> str:
    """The beginning of the line, on the rank that says it; the others end here."""
    meeting, ranks = dist.meeting(), dist.world_size()
    silent: list[int] = []
    calm: list[int] = []
    if meeting is not None:
        if not meeting.claim():
            meeting.stay()
            sys.exit(1)
        silent, calm = meeting.roll_call()
        meeting.let_go()
    if silent:
        return f"{_named(silent)} of {ranks} ended or fell silent"
    if calm:
        return f"{_named(calm)} of {ranks} did not answer, though alive,"
    return f"{_named([dist.rank()])} of {ranks} lost touch with the others"


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _reason(error: RuntimeError) -> str:
    return f"({str(error).splitlines()[0][:160]})"

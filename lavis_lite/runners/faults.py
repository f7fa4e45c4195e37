"""What a rank does when another one is gone: find out which, and say so in one line."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import torch.distributed as torch_dist

from lavis_lite.common import dist
from lavis_lite.common.errors import TrainingError

# How the libraries that carry tensors between processes say that the other end is gone, or silent.
LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out", "socket", "nccl")


@contextlib.contextmanager
def naming_lost_ranks(where: Callable[[], str]) -> Iterator[None]:
    """Within the block a failed exchange with other ranks becomes one line, on the first rank that is left.

    where: tells the step, and what to go on from.

    From then on SIGTERM is ignored: torchrun sends it as soon as it misses a rank, and the line would never be said.

    Raises TrainingError on that rank and SystemExit(1) on the others.
    """
    try:
        yield
    except RuntimeError as error:
        if dist.world_size() == 1 or not is_lost_peer(error):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        present = dist.roll_call()
        if present and present[0] != dist.rank():
            sys.exit(1)
        raise TrainingError(f"{_who(present)} {where()}; {_reason(error)}") from error


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an exchange with another rank failed, and not something in this process."""
    if isinstance(error, torch_dist.DistError):
        return True
    text = str(error).lower()
    return ("gloo" in text or "nccl" in text) and any(words in text for words in LOST)


def _who(present: list[int]) -> str:
    missing = sorted(set(range(dist.world_size())) - set(present))
    if not present or not missing:
        return f"rank {dist.rank()} of {dist.world_size()} lost touch with the others"
    ranks = ", ".join(map(str, missing))
    return f"rank{'s' if len(missing) > 1 else ''} {ranks} of {dist.world_size()} ended or fell silent"


def _reason(error: RuntimeError) -> str:
    return f"({str(error).splitlines()[0][:160]})"

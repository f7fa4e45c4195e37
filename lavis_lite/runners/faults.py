"""How one of several ranks ends when the run can't go on: what happened is said in one line, by one rank."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import torch.distributed as torch_dist

from lavis_lite.common import dist
from lavis_lite.common.errors import DISK_ERRORS, LavisLiteError, TrainingError
from lavis_lite.common.logging import say
from lavis_lite.common.lookout import LINGER_SECONDS, SILENCE_SECONDS
from lavis_lite.common.meeting import Meeting

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
# Of an OSError: a file system on other machines that can't be reached now.
HICCUPS = (errno.EIO, errno.ESTALE, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)


@contextlib.contextmanager
def speaking_once(where: Callable[[], str]) -> Iterator[None]:
    """Within the block an error of all ranks is raised on one; a failed exchange becomes an error that names the lost.

    Errors that a new start would meet again end the launch: ranks that torchrun starts then end at once (`dist.init`).
    A lost rank is what new starts are for, and so is what may pass (`may_pass`).

    where: tells the step, and what to go on from.

    From then on SIGTERM is ignored: torchrun sends it as soon as it misses a rank, and the line would never be said.

    Where the main thread waits in what can't be interrupted, the process ends all the same (`Meeting.watching`).

    Raises SystemExit on ranks whose error another one says; for lost ranks TrainingError on the first to find out.
    """
    try:
        with _watching(where):
            yield
    except LavisLiteError as error:
        if not may_pass(error):
            _end(error.exit_code, str(error))
        raise
    except OSError as error:
        if error.errno in DISK_ERRORS:
            _end(1, str(error))
        raise
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


def may_pass(error: LavisLiteError) -> bool:
    """Whether a new start may get over an error: one of a network or of a file system on it."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (ConnectionError, TimeoutError)) or getattr(found, "passing", False):
            return True
        if isinstance(found, OSError) and found.errno in HICCUPS:
            return True
        found = found.__cause__
    return False


@contextlib.contextmanager
def _watching(where: Callable[[], str]) -> Iterator[None]:
    meeting, inside = dist.meeting(), threading.Event()
    if meeting is None:
        yield
        return
    inside.set()
    try:
        with meeting.watching(lambda own: _end_from_beside(own, where, inside.is_set)):
            yield
    finally:
        inside.clear()


def _end_from_beside(meeting: Meeting, where: Callable[[], str], inside: Callable[[], bool]) -> None:
    """In a thread of a rank that hasn't learnt of a lost one: end the process, and say so where no rank has.

    Returns where all live after all, or the main thread has learnt of it meanwhile.
    """
    if meeting.gone:
        _end_without_store(meeting, where, inside)
        return
    silent: list[int] = []
    code = meeting.ended
    if code is None and not meeting.claimed:
        silent, _ = meeting.roll_call()
        if not silent:
            return
    if silent and meeting.claim():
        reason = f"(silent for {SILENCE_SECONDS:g} s)"
        say(f"error: {_silence(silent, meeting.ranks)} {where()}; {reason}")
        meeting.let_go()
    elif code is None:
        meeting.stay()
        if not inside():
            return
    sys.stdout.flush()
    os._exit(1 if code is None else code)


def _end_without_store(meeting: Meeting, where: Callable[[], str], inside: Callable[[], bool]) -> None:
    """The same where nobody can be asked: each rank says it, but where one has spoken before the store was gone."""
    if not inside():
        return
    if not meeting.claimed:
        what = f"the machine where the ranks meet does not answer rank {meeting.rank} of {meeting.ranks}"
        say(f"error: {what} {where()}; (for {LINGER_SECONDS:g} s)")
    sys.stdout.flush()
    os._exit(1)


def _ignore_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end(code: int, line: str) -> None:
    """End the launch by an error; on ranks other than the first with it, this process too."""
    meeting = dist.meeting()
    if meeting is not None:
        _ignore_sigterm()
        if not meeting.end(code, line):
            sys.exit(code)


def _who_is_lost() -> str:
    """The beginning of the line, on the rank that says it; the others end here, and all where a rank has said why."""
    meeting, ranks = dist.meeting(), dist.world_size()
    silent: list[int] = []
    calm: list[int] = []
    if meeting is not None:
        if (code := meeting.ended) is not None:
            sys.exit(code)
        if not meeting.claim():
            meeting.stay()
            sys.exit(1)
        silent, calm = meeting.roll_call()
        meeting.let_go()
    if silent:
        return _silence(silent, ranks)
    if calm:
        return f"{_named(calm)} of {ranks} did not answer, though alive,"
    return f"{_named([dist.rank()])} of {ranks} lost touch with the others"


def _silence(silent: Sequence[int], ranks: int) -> str:
    return f"{_named(silent)} of {ranks} ended or fell silent"


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _reason(error: RuntimeError) -> str:
    return f"({str(error).splitlines()[0][:160]})"

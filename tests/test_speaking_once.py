"""Who says that ranks are lost, and which errors end a launch: without processes."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch.distributed as torch_dist

from lavis_lite.common import dist
from lavis_lite.common.errors import CheckpointError, ConfigError, DataError, TrainingError
from lavis_lite.runners import faults


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5",
            True,
        ),
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation", True),
        ("NCCL communicator was aborted on rank 3: timed out", True),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:1, ncclRemoteError: a remote process exiting prematurely",
            True,
        ),
        ("NCCL error in: ProcessGroupNCCL.cpp:1, ncclInvalidUsage: Duplicate GPU detected", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
        ("CUDA out of memory", False),
    ],
)
def test_only_a_failed_exchange_means_a_lost_rank(text: str, lost: bool) -> None:
    assert faults.is_lost_peer(RuntimeError(text)) is lost
    assert faults.is_lost_peer(torch_dist.DistBackendError(text)) is lost


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("failed to recv, got 0 bytes. Connection was likely closed.", True),
        ("wait timeout after 1800000ms, keys: /start_0/group/0", True),
        (
            "The server socket has failed to listen on any local network address. port: 1, useIpv6: false",
            False,
        ),
    ],
)
def test_not_every_error_of_the_store_means_a_lost_rank(text: str, lost: bool) -> None:
    assert faults.is_lost_peer(torch_dist.DistNetworkError(text)) is lost


@pytest.fixture
def sigterm() -> Iterator[None]:
    """SIGTERM means afterwards what it did before."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class FakeMeeting:
    rank, ranks = 3, 4

    def __init__(
        self,
        first: bool,
        silent: Sequence[int] = (),
        calm: Sequence[int] = (),
        *,
        claimed: bool = False,
        gone: bool = False,
    ) -> None:
        self.first, self.silent, self.calm, self.calls = first, list(silent), list(calm), []
        self.claimed, self.gone = claimed, gone
        self.ended: int | None = None
        self.lost: Callable[[FakeMeeting], None] | None = None

    @contextlib.contextmanager
    def watching(self, lost: Callable[[FakeMeeting], None]) -> Iterator[None]:
        self.lost = lost
        yield
        self.lost = None

    def claim(self) -> bool:
        return self.first

    def roll_call(self) -> tuple[list[int], list[int]]:
        return self.silent, self.calm

    def end(self, code: int, line: str) -> bool:
        self.ended = code
        return self.first

    def let_go(self) -> None:
        self.calls.append("let_go")

    def stay(self) -> None:
        self.calls.append("stay")


def _lose(monkeypatch: pytest.MonkeyPatch, meeting: FakeMeeting | None) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    monkeypatch.setattr(dist, "rank", lambda: 3)
    monkeypatch.setattr(dist, "meeting", lambda: meeting)
    with faults.speaking_once(lambda: "at step 5"):
        raise RuntimeError("gloo: Connection closed by peer")


@pytest.mark.parametrize(
    ("meeting", "said"),
    [
        (FakeMeeting(True, [0]), "^rank 0 of 4 ended"),
        (FakeMeeting(True, [0, 2]), "^ranks 0, 2 of 4 ended"),
        (FakeMeeting(True, [0], [1, 2]), "^rank 0 of 4 ended"),
        (FakeMeeting(True, [], [1, 2]), "^ranks 1, 2 of 4 did not answer, though alive,"),
        (FakeMeeting(True), "^rank 3 of 4 lost touch"),
        (None, "^rank 3 of 4 lost touch"),
    ],
)
def test_the_rank_that_finds_out_first_speaks(
    meeting: FakeMeeting | None, said: str, monkeypatch: pytest.MonkeyPatch, sigterm: None
) -> None:
    with pytest.raises(TrainingError, match=f"{said}.*at step 5"):
        _lose(monkeypatch, meeting)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    assert meeting is None or meeting.calls == ["let_go"]


class Exited(BaseException):
    """Instead of the end of the tests' own process."""


@pytest.mark.parametrize(
    ("meeting", "ended", "code", "said"),
    [
        (
            FakeMeeting(True, [0]),
            None,
            1,
            "error: rank 0 of 4 ended or fell silent at step 5; (silent for 60 s)\n",
        ),
        (FakeMeeting(False, [0]), None, 1, ""),  # another one speaks
        (FakeMeeting(False, claimed=True), None, 1, ""),
        (FakeMeeting(True, [0]), 2, 2, ""),  # a rank has said why
        (FakeMeeting(True, [], [0]), None, None, ""),  # it was only busy
        (
            FakeMeeting(True, gone=True),
            None,
            1,
            "error: the machine where the ranks meet does not answer rank 3 of 4 at step 5; (for 30 s)\n",
        ),
        (FakeMeeting(True, claimed=True, gone=True), None, 1, ""),  # which another has said
    ],
)
def test_a_rank_whose_main_thread_is_stuck_ends_and_the_line_is_said_once(
    meeting: FakeMeeting,
    ended: int | None,
    code: int | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def exit_now(status: int) -> None:
        raise Exited(status)

    monkeypatch.setattr(os, "_exit", exit_now)
    monkeypatch.setattr(dist, "meeting", lambda: meeting)
    meeting.ended = ended
    codes = []
    with faults.speaking_once(lambda: "at step 5"):
        assert meeting.lost is not None
        try:
            meeting.lost(meeting)
        except Exited as exited:
            codes += exited.args
    assert codes == ([] if code is None else [code])
    assert capsys.readouterr().err == said
    assert meeting.lost is None  # out of the block nobody ends the process


def test_a_main_thread_that_has_learnt_of_the_end_speaks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch had begun to ask when an exchange failed here: the process must live to say its line."""
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("ended"))
    meeting = FakeMeeting(False, [0])
    faults._end_from_beside(meeting, lambda: "", lambda: False)
    assert meeting.calls == ["stay"]
    faults._end_from_beside(FakeMeeting(True, gone=True), lambda: "", lambda: False)


def test_the_others_stay_and_say_nothing(monkeypatch: pytest.MonkeyPatch, sigterm: None) -> None:
    meeting = FakeMeeting(False)
    with pytest.raises(SystemExit):
        _lose(monkeypatch, meeting)
    assert meeting.calls == ["stay"]


@pytest.mark.parametrize(
    ("error", "code"), [(TrainingError("x"), 1), (ConfigError("x"), 2), (OSError(28, "No space left"), 1)]
)
def test_an_error_that_would_come_again_ends_the_launch_and_one_rank_says_it(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, sigterm: None
) -> None:
    for first, raised in ((True, type(error)), (False, SystemExit)):
        meeting = FakeMeeting(first)
        monkeypatch.setattr(dist, "meeting", lambda meeting=meeting: meeting)
        with pytest.raises(raised) as caught, faults.speaking_once(lambda: ""):
            raise error
        assert meeting.ended == code
    assert isinstance(caught.value, SystemExit) and caught.value.code == code
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_one_process_alone_under_torchrun_ends_the_launch_too(
    monkeypatch: pytest.MonkeyPatch, sigterm: None
) -> None:
    agent = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {
        **variables,
        "TORCHELASTIC_RUN_ID": "job",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    dist.init()
    with pytest.raises(ConfigError), faults.speaking_once(lambda: ""):
        raise ConfigError("x")
    dist.shutdown()
    with pytest.raises(SystemExit) as again:
        dist.init()
    assert again.value.code == 2
    dist.shutdown()


def _caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def _passing() -> DataError:
    error = DataError("x")
    error.passing = True
    return error


@pytest.mark.parametrize(
    "error",
    [
        _passing(),
        _caused(DataError("x"), ConnectionResetError()),
        _caused(CheckpointError("x"), TimeoutError()),
        _caused(CheckpointError("x"), OSError(errno.ESTALE, "Stale file handle")),
    ],
)
def test_what_a_new_start_may_get_over_does_not_end_the_launch(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = FakeMeeting(False)
    monkeypatch.setattr(dist, "meeting", lambda: meeting)
    with pytest.raises(type(error)), faults.speaking_once(lambda: ""):
        raise error
    assert meeting.ended is None


def test_a_rank_that_said_why_it_ended_is_not_called_lost(
    monkeypatch: pytest.MonkeyPatch, sigterm: None
) -> None:
    meeting = FakeMeeting(True, [0])
    meeting.ended = 2
    with pytest.raises(SystemExit) as caught:
        _lose(monkeypatch, meeting)
    assert caught.value.code == 2 and meeting.calls == []


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="shapes"), faults.speaking_once(lambda: ""):
        raise RuntimeError("shapes differ")

"""How one of several processes ends: with its exit code, whatever gloo's threads are doing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from runner_helpers import run_ranks
from torch import nn

from lavis_lite.common import dist


def _slow_down_gloo() -> None:
    """Let gloo's threads run only when nobody else wants to: what a busy machine does to them now and then."""
    for task in Path("/proc/self/task").iterdir():
        if "gloo" in (task / "comm").read_text():
            os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))


def _rank() -> None:
    dist.init()
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    _slow_down_gloo()
    model(torch.ones(1, 2)).sum().backward()
    for _ in range(3):
        torch_dist.all_reduce(torch.ones(4))
    dist.shutdown()
    print("the work is done")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads get priorities of their own on Linux alone")
def test_a_process_ends_well_while_gloo_threads_are_late() -> None:
    outputs = run_ranks([sys.executable, __file__], timeout=240)
    assert all("the work is done" in output and "terminate called" not in output for output in outputs)


class Ended(BaseException):
    """Instead of the end of the tests' own process."""


def _end(status: int) -> None:
    raise Ended(status)


@pytest.mark.parametrize(("ending", "status"), [((), 0), ((None,), 0), ((2,), 2)])
def test_exit_codes_stay(
    ending: tuple[int | None, ...], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", _end)
    with pytest.raises(Ended) as ended, dist.ending_process():
        if ending:
            sys.exit(*ending)
    assert ended.value.args == (status,)


def test_what_python_reports_itself_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="a message"), dist.ending_process():
        sys.exit("a message")
    with pytest.raises(KeyError), dist.ending_process():
        raise KeyError


def test_alone_the_program_goes_on() -> None:
    with dist.ending_process():
        pass
    with pytest.raises(SystemExit), dist.ending_process():
        sys.exit(2)


if __name__ == "__main__":
    with dist.ending_process():
        _rank()

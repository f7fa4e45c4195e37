from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis_lite.common import dist
from lavis_lite.common.errors import ConfigError
from lavis_lite.parallel.base import build_strategy
from lavis_lite.runners.runner import Runner
from tests.dist_scenario import gradients, joined_batch
from tests.runner_helpers import (
    assert_same_bits,
    config,
    free_port,
    logged,
    project,
    run_ranks,
    start,
    train_command,
    wait_for,
    weights,
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("dist")
    run_ranks([sys.executable, "-m", "tests.dist_scenario", str(folder)])
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_have_the_gradient_of_the_joined_batch(ranks: list[dict[str, Any]]) -> None:
    joined = gradients(joined_batch())
    for found in ranks:
        assert found["loss"] == pytest.approx(joined["loss"].__float__(), abs=1e-6)
        for name, grad in joined["grads"].items():
            torch.testing.assert_close(found["grads"][name], grad, atol=1e-6, rtol=1e-5)


def test_collectives_agree_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["bools"].tolist() == [False, True, True, True] and found["bools"].dtype == torch.bool
        assert found["rows"] == [1, 2] and found["uneven"].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert found["objects"] == [["from 0"], ["from 1", "from 1"]]
        assert found["broadcast"] == {"rank": 0}
        assert found["mean"] == {"a": 1.0, "b": 0.5}
        assert math.isnan(found["nan"])
        assert found["local"] == (1, 2)
    assert [found["main"] for found in ranks] == [True, False]
    assert [found["found_cached"] for found in ranks] == [False, True]


def test_two_processes_train_as_one_with_the_joined_batch(
    ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = {"max_steps": 4, "batch_size_train": 4, "accum_grad_iters": 2}
    alone = Runner(config(tmp_path, "model.dropout=0.0", **run)).train()
    one = weights(alone.checkpoint)
    for found in ranks:
        assert one.keys() == found["whole"].keys()
        assert all(torch.allclose(one[name], found["whole"][name], atol=1e-6) for name in one)
        assert found["metrics"] == pytest.approx(alone.metrics, abs=1e-6)


def test_two_processes_resume_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["steps_again"] == 2
        assert_same_bits(found["whole"], found["resumed"])


@pytest.mark.slow
def test_torchrun_trains_logs_and_prints_once(tmp_path: Path) -> None:
    path = project(tmp_path, max_steps=2)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
    ]
    process = start([*torchrun, *train_command(path)[1:]])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("held-out split") == 1 and err.count("2 processes") == 1
    assert [row["step"] for row in logged(tmp_path / "run") if row["kind"] == "train"] == [1, 2]


def test_alone_everything_works_without_a_process_group() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    dist.init()
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert dist.all_gather_with_grad(x) is x
    assert not dist.all_gather(x).requires_grad
    assert dist.gather_objects("a") == ["a"] and dist.broadcast_object("a") == "a"
    assert dist.reduce_mean({"loss": x.sum(), "n": 2.0}) == {"loss": 6.0, "n": 2.0}
    assert dist.reduce_mean({}) == {}
    dist.barrier()
    dist.shutdown()


class OtherRank:
    """In place of the exchange with another rank, which is not done the first few times."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        local_rank: int,
        busy: int,
        lost: bool = False,
        seconds: float = 0.05,
    ) -> None:
        self.busy, self.lost, self.said = busy, lost, []
        monkeypatch.setattr(dist, "world_size", lambda: 2)
        monkeypatch.setattr(dist, "local_rank", lambda: local_rank)
        monkeypatch.setattr(dist, "MEET_SECONDS", seconds)
        monkeypatch.setattr(torch.distributed, "all_reduce", self)

    def __call__(self, flag: torch.Tensor, op: Any) -> None:
        if self.lost:
            raise RuntimeError("gloo: Connection closed by peer")
        self.said.append(int(flag))
        flag *= len(self.said) > self.busy


def test_what_the_first_process_of_a_machine_does_may_take_longer_than_an_exchange(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = OtherRank(monkeypatch, local_rank=0, busy=0)
    with dist.local_main_first():
        wait_for(lambda: len(other.said) >= 3)  # of which none takes run.timeout
    assert other.said[-1] == 1 and set(other.said[:-1]) == {0}


def test_ranks_that_wait_meet_well_within_a_short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "_timeout_seconds", dist._timeout_seconds)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**alone, dist.TORCHRUN: "job"}.items():
        monkeypatch.setenv(name, value)
    dist.init(timeout_minutes=2 / 60)
    dist.shutdown()
    other, began = OtherRank(monkeypatch, local_rank=0, busy=0, seconds=dist.MEET_SECONDS), time.monotonic()
    with dist.waiting_for_all():
        wait_for(lambda: len(other.said) >= 2)
        assert time.monotonic() - began < dist.MEET_SECONDS


def test_the_others_wait_through_many_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    other = OtherRank(monkeypatch, local_rank=1, busy=3)
    with dist.local_main_first():
        assert other.said == [1] * 4


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_rank_that_is_lost_before_all_are_done_is_an_error(
    monkeypatch: pytest.MonkeyPatch, local_rank: int
) -> None:
    OtherRank(monkeypatch, local_rank, busy=0, lost=True)
    with pytest.raises(RuntimeError, match="closed by peer"), dist.local_main_first():
        pass


def test_a_block_that_fails_exchanges_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    other = OtherRank(monkeypatch, local_rank=0, busy=0)
    with pytest.raises(KeyError), dist.local_main_first():
        raise KeyError
    assert 1 not in other.said


def test_a_strategy_that_does_not_fit_the_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        build_strategy("ddp")
    with pytest.raises(ConfigError, match="did you mean 'single'"):
        build_strategy("singel")
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="never meet"):
        build_strategy("single")

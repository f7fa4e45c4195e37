"""Ranks that are killed: the others say so and end, and torchrun's restart comes to the undisturbed run's weights."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from kills import Disturbance, is_writing, newest, ranks_of
from launcher_helpers import SHORT_ROLL_CALLS, real_launchers
from runner_helpers import (
    ROOT,
    assert_same_bits,
    config,
    environment,
    free_port,
    project,
    run_ranks,
    start,
    train_command,
    wait_for,
    weights,
)
from warm_python import WarmProcess

from lavis_lite.common.checkpoint import list_checkpoints
from lavis_lite.common.locks import locked
from lavis_lite.runners.runner import Runner

STEPS = 12
SEED = 7


def _project(folder: Path) -> Path:
    return project(folder, max_steps=STEPS, save_every=1, eval_every=4, keep_last=2, timeout=2.0)


def _torchrun(path: Path, *launch: str, options: Sequence[str]) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", *launch]
    return _cold([sys.executable, *torchrun, *train_command(path, *options)[1:]])


def _cold(command: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    env, pipe = environment(**variables), subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def _kill_when(agent: int, rank: int, condition: Callable[[], bool], pause: float = 0.0) -> None:
    end = time.monotonic() + 500
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.0005)
    time.sleep(pause)
    os.kill(ranks_of(agent)[rank], signal.SIGKILL)


def _launch_node(folder: Path, path: Path, **variables: str) -> subprocess.Popen[str]:
    launcher = real_launchers(folder) / "run_scripts" / "launch_node.sh"
    options = ["run.seed=42", "datasets.fake.seconds=0.02", SHORT_ROLL_CALLS]
    return _cold(["bash", str(launcher), "--cfg-path", str(path), "--options", *options], **variables)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
def test_killed_ranks_are_restarted_and_the_weights_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    """By a launcher; one rank is killed while it writes a checkpoint, the other at a random moment."""
    disturbed, folder = _project(tmp_path / "disturbed"), tmp_path / "disturbed"
    agent = _launch_node(tmp_path / "checkout", disturbed, NPROC="2")
    run_ranks(train_command(_project(tmp_path / "calm")), timeout=400)
    rng = random.Random(SEED)
    _kill_when(agent.pid, 0, lambda: newest(folder / "run") >= 2 and is_writing(folder / "run"))
    # A restarted rank imports torch for seconds before it makes its next checkpoint.
    _kill_when(agent.pid, 1, lambda: newest(folder / "run") >= 6, pause=0.2 * rng.random())
    _, err = agent.communicate(timeout=400)
    assert agent.returncode == 0, err[-3000:]
    # torchrun stops the rank that is left as soon as it misses the other.
    assert re.findall(r"error: rank (\d) of 2 ended", err) == ["0", "1"], err[-3000:]
    assert newest(folder / "run") == STEPS
    ends = [
        list_checkpoints(tmp_path / name / "run" / "checkpoints")[-1][1] for name in ("calm", "disturbed")
    ]
    assert_same_bits(*map(weights, ends))


@contextlib.contextmanager
def _ranks(world: int, *command: str) -> Iterator[list[WarmProcess]]:
    """The ranks of one launch without torchrun, killed with the block."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    common["LOCAL_WORLD_SIZE"] = str(world)
    ranks = [start(command, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(world)]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()


def _scenario(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "tests.fault_scenarios", name, *map(str, arguments)]


@pytest.mark.slow
def test_lost_ranks_are_named_in_one_line(tmp_path: Path) -> None:
    """Two of four; rank 1 reads for longer than the roll call takes, and knows of nothing."""
    slow = ("run.max_steps=500", "datasets.fake.seconds=1.5", "datasets.fake.slow_rank=1", SHORT_ROLL_CALLS)
    with _ranks(4, *train_command(_project(tmp_path), *slow)) as ranks:
        wait_for(lambda: newest(tmp_path / "run") >= 1, 500)
        for rank in (2, 3):
            ranks[rank].kill()
        killed = time.monotonic()
        said = "\n".join(ranks[rank].communicate(timeout=120)[1] for rank in (0, 1))
        assert time.monotonic() - killed < 60  # and not run.timeout; seconds, where the machine is not busy
        assert [ranks[rank].returncode for rank in (0, 1)] == [1, 1], said[-3000:]
    assert "Traceback" not in said, said[-3000:]
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, said[-3000:]
    named = "ranks 2, 3 of 4 ended or fell silent"
    assert re.match(rf"error: {named} at step \d+; last good checkpoint: .*step_", lines[0])


@pytest.mark.slow
def test_a_rank_lost_in_an_evaluation_is_one_line_too(tmp_path: Path) -> None:
    path = project(tmp_path, max_steps=1, timeout=2.0)
    Runner(config(tmp_path, max_steps=1, timeout=2.0)).train()
    with _ranks(2, *_scenario("lose_one_in_an_evaluation", path)) as ranks:
        err = ranks[0].communicate(timeout=120)[1]
    assert ranks[0].returncode == 1 and "Traceback" not in err, err[-3000:]
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err[-3000:]
    assert lines[0].startswith(
        "error: rank 1 of 2 ended or fell silent in the evaluation; the same command"
    ), lines


@pytest.mark.slow
def test_a_rank_that_is_stuck_outside_python_ends_with_the_line() -> None:
    with _ranks(2, *_scenario("lose_one_while_stuck")) as ranks:
        err = ranks[0].communicate(timeout=50)[1]
    assert ranks[0].returncode == 1, err
    assert err.startswith("error: rank 1 of 2 ended or fell silent at step 5; (silent for"), err


@pytest.mark.slow
def test_a_fault_that_would_come_again_is_said_once_and_not_tried_again(tmp_path: Path) -> None:
    """Losses of one rank that are not finite, under a torchrun that would start the ranks once more."""
    path = project(tmp_path, max_steps=9, max_skipped=2, save_every=1)
    bad = ("model.bad_steps=[2,3,4]", "model.bad_rank=1")
    agent = _torchrun(path, "--max-restarts=1", options=bad)
    _, err = agent.communicate(timeout=400)
    assert agent.returncode != 0
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "3 steps in a row up to step 4" in lines[0], err[-3000:]
    assert "continuing" not in err, err[-3000:]  # no restart came as far as building the run
    assert err.count("skipped: loss nan") == 3, err[-3000:]
    assert newest(tmp_path / "run") == 3


@pytest.mark.slow
def test_a_folder_in_which_another_run_trains_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run" / ".lock", what="trains"):
        agent = _torchrun(_project(tmp_path), "--max-restarts=1", options=())
        _, err = agent.communicate(timeout=400)
    assert agent.returncode == 1
    assert err.count("error: another process trains in") == err.count("error: ") == 1, err[-3000:]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("max_steps", "step", "place"),
    [(0, 0, "at step 1;"), (6, 5, "at step 6;"), (6, 6, "after step 6, the last;")],
)
def test_the_line_says_where_the_run_was(tmp_path: Path, max_steps: int, step: int, place: str) -> None:
    runner = Runner(config(tmp_path))
    runner.max_steps, runner.state.step = max_steps, step
    assert runner._where().startswith(place)


@pytest.mark.parametrize(
    ("rows", "begun", "resumed", "place"),
    [
        ([("train", 12)], 1e12, 12, "starting"),  # the log of the processes before
        ([("train", 12)], 0.0, 12, "evaluating"),
        ([("train", 6)], 0.0, 6, "starting"),
        ([("train", 7)], 0.0, 6, "training"),
        ([("train", 12)], 0.0, 10, "evaluating"),
        ([], 0.0, 0, "starting"),
    ],
)
def test_a_kill_says_what_it_hit(
    tmp_path: Path, rows: list[tuple[str, int]], begun: float, resumed: int, place: str
) -> None:
    text = "".join(json.dumps({"kind": kind, "step": step}) + "\n" for kind, step in rows)
    (tmp_path / "log.jsonl").write_text(text)
    run = Disturbance(None, tmp_path, last_step=12, resumed=resumed, begun=begun)  # type: ignore[arg-type]
    assert run._place() == place

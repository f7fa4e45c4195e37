"""The launchers with stubs for python and SLURM's commands: which processes they start, and what preemption does."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from kills import newest, ranks_of
from launcher_helpers import SHORT_ROLL_CALLS, launchers, real_launchers, write_script
from runner_helpers import ROOT, environment, free_port, logged, project, wait_for

PYTHON = '#!/bin/sh\nif [ "$1" = -c ]; then echo "$GPUS"; else echo "$@"; fi\n'
# As the real one: a step's processes have a group of their own, and srun answers SIGTERM by killing them.
STEP = """#!/bin/bash
trap 'sleep "${SAVING:-0}"; echo saved; exit "${ENDS:-143}"' TERM
echo $$ > "$READY.step"
echo ready > "$READY"
while [ "$LONG" = 1 ]; do sleep 0.02; done
"""
SRUN = """#!/bin/bash
trap 'echo "srun: forcing job termination"; kill -KILL -- -$(cat "$READY.step"); exit 137' TERM
echo "srun $*"
setsid "$(dirname "$0")/step" &
wait $!
"""
SCANCEL = """#!/bin/bash
echo "scancel $*"
kill -TERM -- -"$(cat "$READY.step")"
"""
NAMED = r"(?:benchmarks|docs|projects|run_scripts|tests)/[\w./-]+\.(?:yaml|sh|py|md)"
SCONTROL = '#!/bin/sh\nif [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "scontrol $*"; fi\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    launchers(tmp_path)
    write_script(tmp_path / ".venv" / "bin" / "python", PYTHON)
    for name, text in (("srun", SRUN), ("step", STEP), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        write_script(tmp_path / "bin" / name, text)
    return tmp_path


def _start(checkout: Path, script: str, **variables: str) -> subprocess.Popen[str]:
    path = f"{checkout / 'bin'}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(checkout / "run_scripts" / script), "--cfg-path", "a file.yaml"],
        env={"PATH": path, "GPUS": "0", "READY": str(checkout / "ready"), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=checkout / "bin",
    )


def _output(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=60)
    return out


def test_files_that_launchers_and_their_documentation_name_exist() -> None:
    texts = [*(ROOT / "run_scripts").glob("*.sh"), ROOT / "docs" / "parallel.md"]
    named = [(text.name, name) for text in texts for name in re.findall(NAMED, text.read_text())]
    assert len({text for text, _ in named}) >= 4
    assert [(text, name) for text, name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(("variables", "count"), [({}, 1), ({"GPUS": "8"}, 8), ({"NPROC": "2"}, 2)])
def test_one_node_gets_a_process_for_each_gpu(checkout: Path, variables: dict[str, str], count: int) -> None:
    said = _output(_start(checkout, "launch_node.sh", **variables))
    assert said == (
        f"-m torch.distributed.run --standalone --nproc-per-node={count} --max-restarts=3 train.py "
        "--cfg-path a file.yaml\n"
    )


def test_nodes_meet_at_the_head(checkout: Path) -> None:
    said = _output(_start(checkout, "launch_nodes.sh", NODES="2", HEAD="node1:29500", GPUS="4", RESTARTS="0"))
    assert "--nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=node1:29500" in said
    assert said.endswith("--max-restarts=0 train.py --cfg-path a file.yaml\n")


@pytest.mark.parametrize("script", ["launch_node.sh", "launch_nodes.sh"])
def test_a_wrong_configuration_is_said_once_and_nothing_is_started(checkout: Path, script: str) -> None:
    wrong = 'echo "error: run.max_stepz"; exit 2'
    check = f'#!/bin/sh\ncase "$*" in "train.py --cfg-path a file.yaml --print-config") {wrong};; *) echo 0;; esac\n'
    write_script(checkout / ".venv" / "bin" / "python", check.replace('max_stepz"', 'max_stepz" >&2'))
    process = _start(checkout, script, NODES="1", HEAD="here:1")
    assert _output(process) == "error: run.max_stepz\n" and process.returncode == 2


def test_nodes_without_a_head_is_an_error(checkout: Path) -> None:
    process = _start(checkout, "launch_nodes.sh", NODES="2")
    assert "set HEAD to host:port" in _output(process) and process.returncode != 0


SLURM = {"SLURM_JOB_ID": "20003", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}


def test_slurm_starts_a_launcher_on_each_node(checkout: Path) -> None:
    process = _start(checkout, "slurm.sh", **SLURM, SLURM_SUBMIT_DIR=str(checkout))
    said = _output(process)
    assert "run_scripts/launch_nodes.sh --cfg-path a file.yaml" in said and process.returncode == 0
    assert "requeue" not in said


def test_a_preempted_job_saves_and_is_queued_again(checkout: Path) -> None:
    process = _start(checkout, "slurm.sh", **SLURM, SLURM_SUBMIT_DIR=str(checkout), LONG="1")
    wait_for((checkout / "ready").exists)
    process.send_signal(signal.SIGTERM)
    said = _output(process)
    assert process.returncode == 0, said
    assert "scancel --signal=TERM 20003\n" in said  # with --batch it would reach the script alone
    assert said.index("saved") < said.index("scontrol requeue 20003")


def test_a_second_signal_does_not_cut_the_saving(checkout: Path) -> None:
    process = _start(checkout, "slurm.sh", **SLURM, SLURM_SUBMIT_DIR=str(checkout), LONG="1", SAVING="1")
    wait_for((checkout / "ready").exists)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    said = _output(process)
    assert process.returncode == 0 and said.count("saved") == 1
    assert said.index("saved") < said.index("scontrol requeue 20003")


def test_a_run_that_finishes_as_the_signal_comes_is_not_queued_again(checkout: Path) -> None:
    process = _start(checkout, "slurm.sh", **SLURM, SLURM_SUBMIT_DIR=str(checkout), LONG="1", ENDS="0")
    wait_for((checkout / "ready").exists)
    process.send_signal(signal.SIGTERM)
    assert "requeue" not in _output(process) and process.returncode == 0


INSTALLING = """#!/bin/sh
case "$*" in
*venv*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
*pip*) echo began >> log; sleep 0.5; echo ended >> log;;
esac
"""


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_machines_that_share_a_folder_install_by_turns(tmp_path: Path) -> None:
    (tmp_path / "run_scripts").mkdir()
    shutil.copy(ROOT / "run_scripts" / "environment.sh", tmp_path / "run_scripts")
    for name in ("pyproject.toml", "setup.py"):
        (tmp_path / name).write_text("")
    write_script(tmp_path / "python", INSTALLING)
    source = ["bash", "-c", f"source {tmp_path}/run_scripts/environment.sh ''"]
    env = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python")}
    processes = [subprocess.Popen(source, env=env, cwd=tmp_path) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text().split() == ["began", "ended"]


def _nodes(folder: Path, path: Path, *options: str, **variables: str) -> list[subprocess.Popen[str]]:
    """NODES real launchers, as if on machines of their own."""
    command = [
        "bash",
        str(real_launchers(folder) / "run_scripts" / "launch_nodes.sh"),
        "--cfg-path",
        str(path),
    ]
    head = {"HEAD": f"127.0.0.1:{free_port()}", "CUDA_VISIBLE_DEVICES": "", "GPUS": "0"}
    return [
        subprocess.Popen(
            [*command, "--options", *options],
            env=environment(**head, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(int(variables["NODES"]))
    ]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
def test_two_nodes_train_one_model_and_start_again_where_one_loses_its_rank(tmp_path: Path) -> None:
    """The other's launcher starts its rank again for the first one's sake, or after its end: they count differently."""
    run = tmp_path / "run"
    path = project(tmp_path, max_steps=8, save_every=1, log_every=1, timeout=2.0)
    options = ("datasets.fake.seconds=0.05", SHORT_ROLL_CALLS)
    nodes = _nodes(tmp_path / "checkout", path, *options, NODES="2", NPROC="1", RESTARTS="1")
    wait_for(lambda: newest(run) >= 2, 200)
    (killed,) = ranks_of(nodes[1].pid).values()
    os.kill(killed, signal.SIGKILL)
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "".join(said).count("2 processes") == 2  # one for each start
    assert [row["step"] for row in logged(run) if row["kind"] == "train"] == list(range(1, 9))


@pytest.mark.slow
def test_a_stopped_launcher_does_not_end_as_a_finished_one(tmp_path: Path) -> None:
    """Which is how slurm.sh tells whether a job has to be queued again."""
    path = project(tmp_path, max_steps=100_000)
    nodes = _nodes(tmp_path / "checkout", path, "run.log_every=1", NODES="1", NPROC="2", RESTARTS="0")
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size > 0, 200)
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    said = [node.communicate(timeout=200)[0] for node in nodes]
    assert 0 not in [node.returncode for node in nodes], said
    assert any((tmp_path / "run" / "checkpoints").iterdir())

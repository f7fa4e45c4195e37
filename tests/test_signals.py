from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.logging import read_rows
from lavis_lite.common.signals import StopSignals
from lavis_lite.runners.runner import Runner
from tests.runner_helpers import assert_same_bits, config, project, train_command, wait_for, weights


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        (signal.SIGTERM, "SIGTERM", 0),
        pytest.param(signal.SIGINT, "Ctrl-C", 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, name: str, code: int
) -> None:
    run_dir = tmp_path / "run"
    path = project(tmp_path, max_steps=1000, log_every=1, num_workers=1)
    # In a session of its own: the signal reaches the loader's worker too, as from a scheduler or a terminal.
    process = subprocess.Popen(
        train_command(path, "datasets.fake.seconds=0.005"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: len(read_rows(run_dir / "log.jsonl")) >= 2)
    os.killpg(process.pid, number)
    os.killpg(process.pid, number)  # torchrun and schedulers pass on what the processes already got
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    checkpoint = ckpt.newest(run_dir)
    assert checkpoint is not None
    step = ckpt.load_state(checkpoint)["step"]
    assert f"stopped by {name} after step {step} of 1000: {checkpoint}; the same command continues it" in err
    assert "Traceback" not in err
    assert read_rows(run_dir / "log.jsonl")[-1]["step"] == step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_and_going_on_is_bit_exact(tmp_path: Path, number: signal.Signals) -> None:
    whole = Runner(config(tmp_path / "whole")).train()
    runner = Runner(config(tmp_path / "parts"))
    original = runner.log

    def log() -> None:
        original()
        if runner.state.step == 2:
            os.kill(os.getpid(), number)

    runner.log = log  # type: ignore[method-assign]
    before = signal.getsignal(number)
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    else:
        assert not runner.train().finished
    assert runner.state.step == 3  # ranks agree in the step after
    assert signal.getsignal(number) == before
    result = Runner(config(tmp_path / "parts")).train()
    assert_same_bits(weights(whole.checkpoint), weights(result.checkpoint))


def test_a_second_ctrl_c_by_a_person_interrupts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [10.0]
    monkeypatch.setattr("lavis_lite.common.signals.time.monotonic", lambda: clock[0])
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        clock[0] += 2.0
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert stop.received == signal.SIGINT

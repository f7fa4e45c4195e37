from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from data_helpers import save_picture

from lavis_lite.cli import main
from lavis_lite.common import device as dev
from lavis_lite.common import dist
from lavis_lite.common.errors import ConfigError

CPU = torch.device("cpu")


def test_flags_come_from_the_first_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert dev.cpu_flags(cpuinfo) == {"fpu", "avx2", "amx_bf16"}
    cpuinfo.write_text("CPU part : 0xd0c\n")
    assert dev.cpu_flags(cpuinfo) == dev.cpu_flags(tmp_path / "absent") == frozenset()


@pytest.mark.parametrize(
    ("flags", "expected"), [({"avx2"}, "fp32"), ({"avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16")]
)
def test_precision_on_a_cpu_follows_its_features(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], expected: str
) -> None:
    monkeypatch.setattr(dev, "cpu_flags", lambda: frozenset(flags))
    assert dev.choose_precision("auto", CPU) == expected
    assert dev.choose_precision("fp16", CPU) == "fp16"


def test_autocast_computes_in_the_named_precision() -> None:
    x = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with dev.autocast(CPU, precision):
            assert (x @ x).dtype == dtype


def test_a_device_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert dev.choose_device() == CPU
    for name, message in (("cuda:1", "finds no GPU"), ("mps", "no Apple GPU"), ("gpu", "not a device")):
        with pytest.raises(ConfigError, match=rf"^run\.device: .*{message}"):
            dev.choose_device(name)
        with pytest.raises(ConfigError, match=f"^--device: (?!.*run).*{message}"):
            dev.choose_device(name, where="--device")


@pytest.mark.parametrize(
    "command",
    [
        "generate --model blip2_opt/shapes --image {}/0.jpg",
        "answer --model blip2_opt/shapes --image {}/0.jpg --question what",
        "explain --model blip2/shapes --image {}/0.jpg --text dog --out {}/page.html",
        "index build --out {}/index --model blip2/shapes --images {}",
    ],
)
def test_commands_name_their_own_argument(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_picture(tmp_path / "0.jpg", 0)
    with pytest.raises(SystemExit):
        main([*command.replace("{}", str(tmp_path)).split(), "--device", "gpu"])
    assert "error: --device: 'gpu' is not a device; use auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cores", "idle", "processes", "workers", "expected"),
    [
        (2, 1.9, 1, 0, 2),  # two free cores
        (2, 1.9, 1, 1, 1),  # the second one is the worker's
        (2, 1.1, 1, 0, 1),  # another program has one
        (2, 0.0, 1, 4, 1),
        (8, 8.0, 2, 4, 3),
        (128, 128.0, 1, 0, 32),
        (0.5, 2.0, 1, 0, 1),  # a container's quota
        (4, 10.0, 1, 0, 4),  # a quota on a large machine, most of which others use
        (2, math.inf, 1, 0, 2),  # nothing tells
    ],
)
def test_threads_are_the_cores_that_would_idle(
    monkeypatch: pytest.MonkeyPatch, cores: float, idle: float, processes: int, workers: int, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(dev, "available_cores", lambda: cores)
    monkeypatch.setattr(dev, "idle_cores", lambda: idle)
    monkeypatch.setattr(dist, "local_world_size", lambda: processes)
    assert dev.choose_threads("auto", CPU, workers) == expected


def test_what_the_user_says_about_threads_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert dev.choose_threads("auto", CPU, 0) == 7
    assert dev.choose_threads(5, CPU, 4) == 5
    with pytest.raises(ConfigError, match="at least 1"):
        dev.choose_threads(0, CPU, 0)


def test_cores_are_measured() -> None:
    assert dev.available_cores() > 0
    assert dev.idle_cores(0.05) >= 0.0

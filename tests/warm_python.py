"""Python processes that begin with the large libraries loaded: forked from one that has imported them.

To import torch, timm and transformers takes seconds, and tests start hundreds of processes. Those started here differ
from new ones in that alone, and in that `atexit` isn't run. What must not have been imported yet, and what runs under
torchrun, is started by subprocess.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

LIBRARIES = [
    *(
        "torch",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "torch._dynamo",
    ),
    *(
        "torchvision.transforms.v2",
        "timm",
        "transformers",
        "transformers.models.auto",
        "transformers.modeling_utils",
    ),
    *("matplotlib.figure", "omegaconf", "pyarrow", "safetensors.torch", "webdataset", "rich.progress"),
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)
# What libraries read when they are imported.
READ_ONCE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class WarmProcess:
    """As subprocess.Popen with captured text; arguments: what would follow `python` (FILE, -m MODULE or -c CODE)."""

    def __init__(self, arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> None:
        with mock.patch.dict(os.environ, READ_ONCE):
            forkserver.ensure_running()
        self.arguments = list(arguments)
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("out", "err")]
        self._process = _context.Process(
            target=_run, args=(self.arguments, dict(env), str(cwd), *map(str, self._outputs))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end: what was written to stdout and stderr. Raises TimeoutExpired, and it runs on."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0.0)
        out, err = (path.read_text() for path in self._outputs)
        return out, err

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end; the exit code."""
        self.communicate(timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, if it hasn't ended."""
        self._process.kill()


def run(
    arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path, timeout: float = 600.0
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with text captured."""
    process = WarmProcess(arguments, env=env, cwd=cwd)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.arguments, process.returncode, out, err)


def _run(arguments: list[str], env: dict[str, str], cwd: str, *outputs: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for descriptor, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    first, *others = arguments
    if first == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")

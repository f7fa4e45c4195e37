"""What a run tells: log messages, a progress display, and log.jsonl, which is always written."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lavis_lite.common.errors import MissingDependencyError
from lavis_lite.common.io import atomic_write

ROOT = "lavis_lite"
# Of a step's time: less than this is no reason to add loader workers.
NOTICEABLE_WAIT = 0.05

_console: Console | None = None


def console() -> Console:
    """The one console on stderr, which messages and the progress bar share so as not to garble each other."""
    global _console
    if _console is None or _console.file is not sys.stderr:
        _console = Console(stderr=True, highlight=False)
    return _console


def say(text: str) -> None:
    """Write a line to stderr in one piece.

    `print` writes a line's end apart where stderr is unbuffered, as torchrun starts its ranks: two ranks' lines would
    run into each other.
    """
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if console().is_terminal:
            console().print(text, markup=False, soft_wrap=True)
        else:
            say(text)


def get_logger(name: str = ROOT) -> logging.Logger:
    """A logger that writes to stderr: from INFO on the main process, from WARNING on others."""
    root = logging.getLogger(ROOT)
    if not root.handlers:
        handler = _ConsoleHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
        root.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    return logging.getLogger(name if name == ROOT or name.startswith(ROOT + ".") else f"{ROOT}.{name}")


@contextlib.contextmanager
def only_warnings(name: str) -> Iterator[None]:
    """Warnings and errors alone of a logger; its level is as before afterwards."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _plain(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as its name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl; a last line cut short by a crash is left out."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class RunLog:
    """Appends rows to log.jsonl, flushed one by one, and on request to TensorBoard; for the main process.

    Opening drops the rows after `last_step`, and evaluations after `last_evaluation` (None: `last_step`): what a
    resumed run does again is logged once.

    Raises MissingDependencyError when TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        last_step: int = 0,
        last_evaluation: int | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.path = Path(run_dir) / "log.jsonl"
        last = {"eval": last_step if last_evaluation is None else last_evaluation}
        kept = [
            row
            for row in read_rows(self.path)
            if row.get("step", 0) <= last.get(str(row.get("kind")), last_step)
        ]
        atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file: TextIO = self.path.open("a")
        self._board = _summary_writer(Path(run_dir) / "tensorboard", last_step) if tensorboard else None

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one row: {"kind": kind, "step": step, **values}."""
        row = {"kind": kind, "step": step, **{key: _plain(value) for key, value in values.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(key if kind == "eval" else f"{kind}/{key}", value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _summary_writer(folder: Path, last_step: int) -> Any:
    try:
        module = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise MissingDependencyError(
            "run.tensorboard=true needs the package tensorboard: pip install 'lavis-lite[log]'"
        ) from error
    return module.SummaryWriter(str(folder), purge_step=last_step + 1)


def duration(seconds: float) -> str:
    """Seconds as people write them: 8 s, 2 min 05 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def progress_text(values: Mapping[str, float]) -> str:
    """The losses and the speed of a step in one line, and how much of it waited for data where that is noticeable."""
    losses = [
        f"{key} {value:.3f}"
        for key, value in values.items()
        if key.startswith("loss") or key.endswith("_acc")
    ]
    speed = [f"{values['images_per_s']:.0f} images/s"] if "images_per_s" in values else []
    share = values.get("data_wait_share", 0.0)
    waits = [f"{share:.0%} waiting for data"] if share >= NOTICEABLE_WAIT else []
    return "  ".join([*losses, *speed, *waits])


class ProgressDisplay:
    """How far the run is: a bar with the remaining time on a terminal, a line now and then elsewhere.

    Lines come with every logged row at first, then at most every `line_seconds`. They also come where another display,
    such as that of the training around an evaluation, already has a bar on the terminal.
    """

    _bar_shown: ClassVar[bool] = False

    def __init__(
        self, total: int, done: int, *, shown: bool = True, line_seconds: float = 10.0, unit: str = "step"
    ) -> None:
        self.total, self.unit = total, unit
        self.first = self.done = done
        self.line_seconds = line_seconds
        self._shown = shown
        self._started = time.monotonic()
        self._last_line = -math.inf
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressDisplay:
        self._started = time.monotonic()
        if self._shown and console().is_terminal and not ProgressDisplay._bar_shown:
            ProgressDisplay._bar_shown = True
            self._bar = Progress(
                BarColumn(20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("left"),
                TextColumn("{task.description}"),
                console=console(),
                transient=True,
                refresh_per_second=4,
            )
            self._bar.start()
            self._bar.add_task("", total=self.total, completed=self.done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            ProgressDisplay._bar_shown = False

    def advance(self, step: int) -> None:
        """Say that so many steps are done."""
        self.done = step
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def show(self, values: Mapping[str, float]) -> None:
        """Show a logged row's losses and speed."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=progress_text(values))
            return
        now = time.monotonic()
        if now - self._last_line < self.line_seconds and self.done < self.total:
            return
        self._last_line = now
        done, left = self.done - self.first, ""
        if done > 1 and self.done < self.total:
            left = f"{duration((now - self._started) / done * (self.total - self.done))} left"
        shown = (f"{self.unit} {self.done}/{self.total}", progress_text(values), left)
        get_logger().info("  ".join(part for part in shown if part))

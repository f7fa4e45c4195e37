"""Two ranks of which one can't write its checkpoint; `python -m tests.narrow_disk_scenario FOLDER`.

The folder's name says what is tried: `parts` of which the second can't write its own, or a `whole` checkpoint, which
the first can't write; `behind`, while training goes on, or `at_once`. Of `large_parts` each has more bytes than the
buffer of a file, so that it is torch's zip writer that the disk refuses, and not the file as it is closed.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

from runner_helpers import config
from strategy_scenario import ranks

from lavis_lite.common import checkpoint
from lavis_lite.common.errors import CheckpointError
from lavis_lite.runners.runner import Runner

REMOVE = shutil.rmtree
SAVE_FILE = checkpoint.save_file


def limit(size: int) -> int:
    """Let this process write no file of more than `size` bytes; what the limit was."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return before


def save_narrowly(tensors: Any, path: str, **options: Any) -> None:
    # What the run keeps beside its checkpoints is written whole.
    before = limit(resource.RLIM_INFINITY if "frozen-" in path else 64)
    try:
        SAVE_FILE(tensors, path, **options)
    finally:
        limit(before)


def fail(rank: int, form: str, *, behind: bool) -> None:
    """Prepare the failure of this rank, if it is the one to fail."""
    if form == "whole" and rank == 0:
        mock.patch.object(checkpoint, "save_file", save_narrowly).start()
    if form.endswith("parts") and rank == 1:
        limit(1024 if form == "parts" else 256 * 1024)
    if form.endswith("parts") and rank == 0 and behind:
        # It learns of the failure many steps after the other has.
        mock.patch.object(shutil, "rmtree", lambda path, **_: (time.sleep(1.0), REMOVE(path, True))).start()


def main(folder: Path) -> None:
    """Leave in each rank's file what its training ended with."""
    behind = folder.name.endswith("_behind")
    form = folder.name.removesuffix("_behind").removesuffix("_at_once")
    width = "model.width=512" if form == "large_parts" else "model.width=8"
    strategy = "ddp" if form == "whole" else "fsdp2"
    cfg = config(
        folder, width, strategy=strategy, save_every=2, save_async=behind, max_steps=3000 if behind else 4
    )
    if behind:
        mock.patch.object(Runner, "_save_is_due", lambda self: self.state.step == 2).start()
    for rank in ranks(2):
        fail(rank, form, behind=behind)
        try:
            Runner(cfg).train()
        except (CheckpointError, SystemExit) as error:
            (folder / f"rank{rank}").write_text(f"{type(error).__name__}: {error}")
            os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

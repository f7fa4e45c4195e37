"""Two ranks whose second can't write its part of a checkpoint; `python -m tests.narrow_disk_scenario FOLDER`."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

from runner_helpers import config
from strategy_scenario import ranks

from lavis_lite.common.errors import CheckpointError
from lavis_lite.runners.runner import Runner

REMOVE = shutil.rmtree


def main(folder: Path) -> None:
    """Leave in each rank's file what its training ended with."""
    behind = folder.name == "behind"
    cfg = config(folder, strategy="fsdp2", save_every=2, save_async=behind, max_steps=3000 if behind else 4)
    if behind:
        mock.patch.object(Runner, "_save_is_due", lambda self: self.state.step == 2).start()
    for rank in ranks(2):
        if rank == 0 and behind:
            # It learns of the failure many steps after the other has.
            mock.patch.object(
                shutil, "rmtree", lambda path, **_: (time.sleep(1.0), REMOVE(path, True))
            ).start()
        if rank == 1:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        try:
            Runner(cfg).train()
        except (CheckpointError, SystemExit) as error:
            (folder / f"rank{rank}").write_text(f"{type(error).__name__}: {error}")
            os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The fake model changes its strategy at a checkpoint; run as `python -m tests.strategy_resume_scenario FOLDER`."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from runner_helpers import config
from strategy_scenario import ranks

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.checkpoint import step_dir
from lavis_lite.runners import saving
from lavis_lite.runners.runner import Runner


@dataclass(frozen=True)
class Way:
    """How a run, or half of one, is trained and saved."""

    strategy: str
    world: int = 2
    save_format: str = "auto"
    save_async: bool = False

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.world}-{self.save_format}-{self.save_async}"


FOUR = Way("fsdp2", 4)
DDP, FSDP2, FAIRSCALE, SINGLE = Way("ddp"), Way("fsdp2"), Way("fairscale"), Way("single", 1)
WHOLE = [replace(way, save_format="whole") for way in (FSDP2, FAIRSCALE)]
PARTS = Way("ddp", save_format="sharded", save_async=True)
BEHIND = [replace(way, save_async=True) for way in (FSDP2, *WHOLE, SINGLE)]
# How a run begins, and how it ends.
CHANGES = [
    (DDP, FSDP2),
    (FSDP2, FSDP2),
    (FAIRSCALE, FAIRSCALE),
    (FSDP2, FAIRSCALE),
    (FAIRSCALE, DDP),
    (FSDP2, SINGLE),
    (SINGLE, FSDP2),
    (PARTS, PARTS),
    (BEHIND[0], BEHIND[0]),
    (WHOLE[0], FSDP2),
    (FOUR, FSDP2),
]
STEPS, HALF = 4, 2


def run(folder: Path, way: Way) -> None:
    """Train to the end, from where the folder's run is."""
    how = {"strategy": way.strategy, "save_format": way.save_format, "save_async": way.save_async}
    rows = {"batch_size_train": 4, "accum_grad_iters": 2, "max_grad_norm": 0.5}
    cfg = config(folder, "model.dropout=0.0", max_steps=STEPS, save_every=HALF, eval_every=1, **how, **rows)
    for _ in ranks(way.world):
        try:
            Runner(cfg).train()
        except BaseException:
            traceback.print_exc()
            os._exit(1)


def _late(write: Callable[..., Any]) -> Callable[..., Any]:
    """The same, some steps later."""

    def wait_and_write(*arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)
        return write(*arguments)

    return wait_and_write


def main(folder: Path) -> None:
    saving.write_parts = _late(saving.write_parts)
    ckpt.save_tensors = _late(ckpt.save_tensors)
    for first in {first: None for first, _ in CHANGES} | dict.fromkeys((*WHOLE, *BEHIND)):
        run(folder / first.name, first)
    for first, second in CHANGES:
        changed = folder / f"{first.name}-{second.name}"
        shutil.copytree(folder / first.name, changed)
        shutil.rmtree(step_dir(changed / "run" / "checkpoints", STEPS))
        run(changed, second)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

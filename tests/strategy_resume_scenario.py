"""The fake model changes its strategy at a checkpoint; run as `python -m tests.strategy_resume_scenario FOLDER`."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from runner_helpers import config
from strategy_scenario import ranks

from lavis_lite.common.checkpoint import step_dir
from lavis_lite.runners.runner import Runner

# Under which strategy a run begins, and under which it ends; the number of processes of both.
CHANGES = [
    (("ddp", 2), ("fsdp2", 2)),
    (("fsdp2", 2), ("fsdp2", 2)),
    (("fairscale", 2), ("fairscale", 2)),
    (("fsdp2", 2), ("fairscale", 2)),
    (("fairscale", 2), ("ddp", 2)),
    (("fsdp2", 2), ("single", 1)),
    (("single", 1), ("fsdp2", 2)),
]
STEPS, HALF = 4, 2


def run(folder: Path, strategy: str, world: int) -> None:
    """Train to the end, from where the folder's run is."""
    rows = {"batch_size_train": 4, "accum_grad_iters": 2, "max_grad_norm": 0.5}
    cfg = config(
        folder, "model.dropout=0.0", strategy=strategy, max_steps=STEPS, save_every=HALF, eval_every=1, **rows
    )
    for _ in ranks(world):
        try:
            Runner(cfg).train()
        except BaseException:
            traceback.print_exc()
            os._exit(1)


def main(folder: Path) -> None:
    for first in sorted({first for first, _ in CHANGES}):
        run(folder / "".join(map(str, first)), *first)
    for first, second in CHANGES:
        whole = folder / "".join(map(str, first))
        changed = folder / f"{whole.name}-{second[0]}{second[1]}"
        shutil.copytree(whole, changed)
        shutil.rmtree(step_dir(changed / "run" / "checkpoints", STEPS))
        run(changed, *second)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

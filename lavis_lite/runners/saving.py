"""When and by whom a checkpoint is written: at once or while training goes on, by the first process or by all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common import dist
from lavis_lite.common.logging import get_logger
from lavis_lite.common.run_config import RunConfig
from lavis_lite.common.tensor_parts import (
    MODEL_PARTS,
    OPTIMIZER_PARTS,
    PartsError,
    parts_writer,
    write_tied,
)
from lavis_lite.parallel.base import Strategy, tied_names

logger = get_logger(__name__)

# Waiting this long (seconds) for the checkpoint before is worth a line: they come faster than the disk takes them.
LONG_WAIT = 1.0


class CheckpointSaver:
    """Writes the checkpoints of one training; all ranks have one and call it at the same steps.

    Args:
        run_dir: the run's folder. run: its `save_*` settings, `keep_last` and `timeout`.
        device: of the model, which decides whether to write in the background by default.
    """

    def __init__(self, run_dir: Path, run: RunConfig, strategy: Strategy, device: torch.device) -> None:
        self.folder = run_dir / ckpt.FOLDER
        self.strategy = strategy
        self.keep_last = run.keep_last
        self.background = device.type == "cuda" if run.save_async == "auto" else run.save_async
        sharded = strategy.keeps_parts if run.save_format == "auto" else run.save_format == "sharded"
        self._group: torch_dist.ProcessGroup | None = None
        if sharded and dist.world_size() > 1:
            group = torch_dist.new_group(backend="gloo", timeout=timedelta(minutes=run.timeout))
            assert isinstance(group, torch_dist.ProcessGroup)
            self._group = group
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        *,
        best_step: int | None,
    ) -> Path:
        """Write a checkpoint, or begin to; its path. The best and the newest `keep_last` stay.

        Raises CheckpointError when this one, or one begun before it, can't be written.
        """
        self._wait_for_the_one_before()
        rest = (self._whole if self._group is None else self._parts)(step, model, optimizer, state)

        def finish() -> None:
            rest()
            if dist.is_main():
                ckpt.prune(self.folder, keep_last=self.keep_last, best_step=best_step)

        if self.background:
            self._pending = self._worker.submit(finish)
        else:
            finish()
        return ckpt.step_dir(self.folder, step)

    def check(self) -> None:
        """Raise what a write in the background that is over has met."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written; raises what the writing met."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Until nothing is being written, whatever came of it: for a run that ends by another error."""
        if self._pending is not None and isinstance(error := self._pending.exception(), Exception):
            logger.warning("%s", error)
        self._worker.shutdown()

    def _wait_for_the_one_before(self) -> None:
        began = time.monotonic()
        self.wait()
        waited = time.monotonic() - began
        if waited > LONG_WAIT:
            logger.info("waited %.0f s until the checkpoint before was written", waited)

    def _whole(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> Callable[[], None]:
        """All of it by the main process; elsewhere nothing is left to do."""
        # Where they are sharded all ranks take part in putting them together.
        weights = self.strategy.model_tensors(model)
        moments = self.strategy.optimizer_tensors(optimizer)
        if not dist.is_main():
            return lambda: None
        if self.background:
            tied = tied_names(model, weights)
            weights = _copied({name: x for name, x in weights.items() if name not in tied})
            weights |= {name: weights[known] for name, known in tied.items()}
            moments = _copied(moments)

        def write() -> None:
            ckpt.save_checkpoint(self.folder, step, model=weights, optimizer=moments, state=state)

        return write

    def _parts(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> Callable[[], None]:
        """What this rank has; the main process adds the state and gives the checkpoint its name."""
        weights = self.strategy.model_parts(model)
        tied = tied_names(model, weights)
        tensors = {MODEL_PARTS + name: x for name, x in weights.items() if name not in tied}
        moments = self.strategy.optimizer_parts(optimizer)
        tensors |= {OPTIMIZER_PARTS + name: x for name, x in moments.items()}
        assert self._group is not None
        with ExitStack() as stack:
            stack.enter_context(_told_by_main())
            folder = None
            if dist.is_main():
                folder = stack.enter_context(ckpt.writing(self.folder, step, state))
                write_tied(folder, tied)
            folder = dist.broadcast_object(folder)
            assert folder is not None
            write = parts_writer(folder, tensors, self._group, background=self.background)
            until_named = stack.pop_all()

        def finish() -> None:
            with until_named:
                write()

        return finish


@contextmanager
def _told_by_main() -> Iterator[None]:
    """All ranks meet the error of one that can't write its part, and the main process says it."""
    try:
        yield
    except PartsError:
        raise SystemExit(1) from None


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the machine's memory, which training doesn't change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

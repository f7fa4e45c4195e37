"""When and by whom a checkpoint is written: at once or while training goes on, by the first process or by all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common import dist
from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.logging import get_logger
from lavis_lite.common.run_config import RunConfig
from lavis_lite.common.tensor_parts import (
    MODEL_PARTS,
    OPTIMIZER_PARTS,
    PartsError,
    check_parts,
    write_parts,
    write_tied,
)
from lavis_lite.parallel.base import Strategy, tied_names
from lavis_lite.runners.faults import is_lost_peer

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
        # The current device is each thread's own; torch.distributed.checkpoint waits for it.
        set_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._worker = ThreadPoolExecutor(1, "checkpoint", *set_device)
        # Asked here: the worker could ask amid an evaluation's `dist.local`.
        self._is_main = dist.is_main()
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
        """Write a checkpoint, or begin to; the path that it has once it is complete. The best and the newest
        `keep_last` stay.

        Raises CheckpointError when this one, or one begun before it, can't be written; SystemExit on ranks other than
        the main one, which says why.
        """
        self._wait_for_the_one_before()
        write = (self._whole if self._group is None else self._parts)(step, model, optimizer, state)

        def finish() -> None:
            write()
            if self._is_main:
                ckpt.prune(self.folder, keep_last=self.keep_last, best_step=best_step)

        if self.background:
            self._pending = self._worker.submit(finish)
        else:
            self._together(finish, alone=self._group is None)
        return ckpt.step_dir(self.folder, step)

    def amend(self, step: int, values: Mapping[str, Any], *, best_step: int | None) -> None:
        """Lay values over the state of a checkpoint that was saved before, without writing its tensors again.

        Keeps and raises what `save` does. All ranks call it.
        """
        self.wait()

        def write() -> None:
            if self._is_main:
                ckpt.amend_state(ckpt.step_dir(self.folder, step), values)
                ckpt.prune(self.folder, keep_last=self.keep_last, best_step=best_step)

        self._together(write, alone=True)

    @property
    def failed(self) -> bool:
        """Whether a write in the background is over and has met an error, which `wait` raises."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until nothing is being written; raises what the writing met, as `save` does. All ranks call it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._together(pending.result, alone=self._group is None)

    def end(self) -> NoReturn:
        """For a run that can't go on because a write has failed on some rank: raise why, or SystemExit on others."""
        self.wait()
        raise SystemExit(1)

    def close(self) -> None:
        """Until nothing is being written, whatever came of it: for a run that ends by another error."""
        try:
            error = self._pending.exception() if self._pending is not None else None
            if isinstance(error, CheckpointError):
                logger.warning("%s", error)
            elif isinstance(error, Exception) and not (
                isinstance(error, RuntimeError) and is_lost_peer(error)
            ):
                logger.warning("a checkpoint could not be written", exc_info=error)
        finally:
            self._worker.shutdown()

    def _together(self, write: Callable[[], None], *, alone: bool) -> None:
        """Run what writes. Where the main process does so `alone`, the others end with it if it can't."""
        error = None
        try:
            write()
        except CheckpointError as raised:
            error = raised
        failed = error is not None
        if alone:
            failed = dist.broadcast_object(failed)
        if error is not None:
            raise error
        if failed:
            raise SystemExit(1)

    def _wait_for_the_one_before(self) -> None:
        began = time.monotonic()
        self.wait()
        waited = time.monotonic() - began
        if waited > LONG_WAIT:
            logger.info("waited %.0f s until the checkpoint before was written", waited)

    def _whole(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> Callable[[], None]:
        """What writes all of it on the main process, and nothing elsewhere."""
        # Where they are sharded all ranks take part in putting them together.
        weights = self.strategy.model_tensors(model)
        moments = self.strategy.optimizer_tensors(optimizer)
        if not self._is_main:
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
        """What writes this rank's part; the main process adds the state and gives the checkpoint its name."""
        weights = self.strategy.model_parts(model)
        tied = tied_names(model, weights)
        tensors = {MODEL_PARTS + name: x for name, x in weights.items() if name not in tied}
        moments = self.strategy.optimizer_parts(optimizer)
        tensors = _shared_out(tensors | {OPTIMIZER_PARTS + name: x for name, x in moments.items()})
        if self.background:
            tensors = _copied(tensors)
        assert self._group is not None
        group = self._group
        until_named = ExitStack()
        folder = until_named.enter_context(self._common_folder(step, state))

        def write() -> None:
            with until_named:
                files = write_parts(folder, tensors, group)
                if self._is_main:
                    check_parts(folder, files)
                    write_tied(folder, tied)

        return write

    @contextmanager
    def _common_folder(self, step: int, state: Mapping[str, Any]) -> Iterator[Path]:
        """The temporary folder that the main process has made, and gives its name afterwards."""
        with ExitStack() as stack:
            made: Path | CheckpointError | None = None
            if self._is_main:
                try:
                    made = stack.enter_context(ckpt.writing(self.folder, step, state))
                except CheckpointError as error:
                    made = error
            folder = dist.broadcast_object(made)
            if self._is_main and isinstance(made, CheckpointError):
                raise made
            if not isinstance(folder, Path):
                raise SystemExit(1)
            try:
                yield folder
            except PartsError:
                if self._is_main:
                    raise  # `writing` says what is left
                raise SystemExit(1) from None


def _shared_out(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this rank is to write: its parts of DTensors, and of whole tensors those that no other rank writes.

    A whole tensor goes to the one of its holders that has the fewest bytes so far, the largest first.
    """
    from torch.distributed.tensor import DTensor  # most of a second, which only those who share pay

    whole = {name: x.nbytes for name, x in tensors.items() if not isinstance(x, DTensor)}
    held = dist.gather_objects(whole)
    sizes = {name: size for own in held for name, size in own.items()}
    loads = [0] * len(held)
    others = set()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        writer = min((rank for rank, own in enumerate(held) if name in own), key=loads.__getitem__)
        loads[writer] += sizes[name]
        if writer != dist.rank():
            others.add(name)
    return {name: x for name, x in tensors.items() if name not in others}


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the machine's memory, which training doesn't change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

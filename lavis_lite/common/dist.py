"""Processes: one by default, several under torchrun; every function also works, and costs nothing, with one.

Gradient convention. Each of W ranks computes its own loss L_r on its B rows; the loss of the joined batch
is the mean of the L_r, and DDP averages gradients over ranks. `all_gather_with_grad` sums in its backward
what every rank's loss sends to a rank's rows, so that after DDP's averaging each parameter holds exactly
the gradient of the joined-batch loss. No factor W is needed anywhere.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from lavis_lite.common.meeting import Meeting
from lavis_lite.common.starts import TORCHRUN, name_start

TIMEOUT_MINUTES = 30.0
# How often ranks that wait for long meet: so many seconds, or that part of the timeout where it is less.
MEET_SECONDS = 5.0
MEET_SHARE = 0.25

T = TypeVar("T")

_alone = False
_meeting: Meeting | None = None
_timeout_seconds = 60 * TIMEOUT_MINUTES


def init(timeout_minutes: float = TIMEOUT_MINUTES) -> None:
    """Join the process group that torchrun describes in the environment; without torchrun do nothing.

    One process alone under torchrun has no group, but a `meeting`: it would be started again after any error.
    Tensors on a GPU travel by NCCL, tensors on the CPU by gloo. A rank that waits longer than
    timeout_minutes for another fails, and torchrun then ends the others.

    Raises TrainingError where the others don't come (`name_start`), and SystemExit in a process that torchrun has
    started again though the run can't go on (`Meeting.end`).
    """
    global _meeting, _timeout_seconds
    if torch_dist.is_initialized() or _meeting is not None:
        return
    if not _is_one_of_several() and TORCHRUN not in os.environ:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(minutes=timeout_minutes)
    _timeout_seconds = timeout.total_seconds()
    store, own_rank, ranks = next(torch_dist.rendezvous("env://", timeout=timeout))
    # The store outlives ranks that torchrun starts again: without names of their own they would look for the
    # addresses, and the marks, of those before them.
    launch = store
    store = torch_dist.PrefixStore(f"start_{name_start(launch, own_rank, ranks, timeout)}", launch)
    _meeting = Meeting(store, own_rank, ranks, launch=launch)
    if (code := _meeting.ended) is not None:
        sys.exit(code)
    if ranks == 1:
        return
    group = torch_dist.PrefixStore("group", store)
    torch_dist.init_process_group(backend, timeout=timeout, store=group, rank=own_rank, world_size=ranks)


def meeting() -> Meeting | None:
    """Where ranks say what their exchanges can't; None without torchrun, or before `init`."""
    return _meeting


def shutdown() -> None:
    """Leave the process group, if there is one."""
    global _meeting
    if _meeting is not None:
        _meeting.leave()
        _meeting = None
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


@contextlib.contextmanager
def ending_process() -> Iterator[None]:
    """Around all that a program does: one of several processes then ends without taking its interpreter down.

    Gloo's threads outlive the process group when DDP's reducer was on it. One that frees a tensor while the
    interpreter goes down asks for a lock it will never get, and the process aborts with "terminate called without
    an active exception", exit code -6, though its work is done: nearly always when gloo's threads run at idle
    priority, now and then on a busy machine. Exit codes stay, output is flushed, exceptions but SystemExit pass.
    """
    status = 0
    try:
        yield
    except SystemExit as ending:
        if not _is_one_of_several() or not (ending.code is None or isinstance(ending.code, int)):
            raise
        status = ending.code or 0
    if _is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """This process's number among all, 0 when alone."""
    return torch_dist.get_rank() if torch_dist.is_initialized() and not _alone else 0


def world_size() -> int:
    """The number of processes, 1 when alone."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() and not _alone else 1


@contextlib.contextmanager
def local() -> Iterator[None]:
    """Within the block this process counts as the only one: nothing in it waits for or hears of another.

    For evaluation, where ranks hold different numbers of batches and a loss must not depend on their number.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the one process that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        torch_dist.barrier()


@contextlib.contextmanager
def waiting_for_all() -> Iterator[None]:
    """Run the block on every process, and leave it when all have run theirs.

    It may take for longer than a rank waits in an exchange: there is one every few seconds meanwhile. The block itself
    exchanges nothing.
    """
    if world_size() == 1:
        yield
        return
    exchanges = _Exchanges()
    # While the block runs this process too has to take part. A thread that is stuck ends with the process.
    thread = threading.Thread(target=exchanges.until_all_are_done, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        exchanges.given_up = True
        raise
    finally:
        exchanges.done.set()
    thread.join()
    if exchanges.error is not None:
        raise exchanges.error


@contextlib.contextmanager
def local_main_first() -> Iterator[None]:
    """Run the block on each machine's first process, then on its others: they find what the first cached.

    How long it takes, and what it must not do, is as of `waiting_for_all`.
    """
    if world_size() == 1:
        yield
        return
    with _meeting.patient() if _meeting is not None else contextlib.nullcontext():
        if local_rank() == 0:
            with waiting_for_all():
                yield
            return
        with waiting_for_all():
            pass
        yield


class _Exchanges:
    """Exchanges every few seconds, until no rank has anything left to do that others wait for."""

    def __init__(self) -> None:
        self.done, self.given_up = threading.Event(), False
        self.error: Exception | None = None

    def until_all_are_done(self) -> None:
        """Returns without an exchange once given up, and on an error, which is left in `error`."""
        all_done = False
        while not all_done:
            done = self.done.wait(min(MEET_SECONDS, MEET_SHARE * _timeout_seconds))
            if self.given_up:
                return
            try:
                all_done = _least(int(done)) == 1
            except RuntimeError as error:
                self.error = error
                return


def _least(value: int) -> int:
    flag = torch.tensor([value])
    torch_dist.all_reduce(flag, op=torch_dist.ReduceOp.MIN)
    return int(flag.item())


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int]) -> Tensor:
        ctx.rows = rows
        return all_gather(x, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        most = max(ctx.rows)
        pieces = [_filled(piece.contiguous(), most) for piece in grads[0].split(ctx.rows)]
        own = torch.empty_like(pieces[0])
        torch_dist.reduce_scatter(own, pieces)
        return own[: ctx.rows[rank()]], None


def rows_of_ranks(x: Tensor) -> list[int]:
    """How many rows each rank has in a tensor [B, ...], in rank order."""
    if world_size() == 1:
        return [len(x)]
    if torch_dist.get_backend() == "fake":  # a plan's, whose other ranks are pretended
        return [len(x)] * world_size()
    counts: list[int] = all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    return counts


def all_gather_with_grad(x: Tensor, rows: list[int] | None = None) -> Tensor:
    """Every rank's rows, in rank order: [B, ...] -> [sum of B, ...], with gradient back to the rows' own ranks.

    The backward sums over ranks (see the module's convention).

    Args:
        rows: as of `rows_of_ranks`; None where all ranks have as many, which nothing checks.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _AllGather.apply(x, rows or [len(x)] * world_size())
    return gathered


def all_gather(x: Tensor, rows: list[int] | None = None) -> Tensor:
    """Every rank's rows, in rank order, without gradient: [B, ...] -> [sum of B, ...]; `rows` as above."""
    if world_size() == 1:
        return x.detach()
    counts = rows or [len(x)] * world_size()
    source = _filled(x.detach().contiguous(), max(counts))
    sent = source.to(torch.uint8) if source.dtype == torch.bool else source
    pieces = [torch.empty_like(sent) for _ in range(world_size())]
    torch_dist.all_gather(pieces, sent)
    kept = [piece[:count] for piece, count in zip(pieces, counts, strict=True)]
    return torch.cat(kept).to(source.dtype)


def _filled(x: Tensor, rows: int) -> Tensor:
    """With rows of zeros behind it: collectives want the same shape of all ranks."""
    return x if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def gather_objects(obj: T) -> list[T]:
    """Every rank's object, in rank order, on every rank; sizes may differ (uneven evaluation shards)."""
    if world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: T) -> T:
    """The main process's object, on every rank."""
    if world_size() == 1:
        return obj
    box = [obj]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def reduce_mean(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Named scalars averaged over ranks, in one collective and one wait for the device.

    All ranks give the same names. A value that is not finite on any rank is not finite in the result.
    """
    names = sorted(values)
    if not names:
        return {}
    tensors = [value.detach() for value in values.values() if isinstance(value, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    packed = torch.stack(
        [
            torch.as_tensor(values[name], device=device).detach().to(torch.float32).reshape(())
            for name in names
        ]
    )
    if world_size() > 1:
        torch_dist.all_reduce(packed)
        packed /= world_size()
    return dict(zip(names, packed.tolist(), strict=True))

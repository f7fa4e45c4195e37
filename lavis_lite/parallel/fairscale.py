"""fairscale's sharding: gradients and moments of the trained part anywhere, frozen blocks too where there is CUDA."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from lavis_lite.common import dist, optim
from lavis_lite.common.errors import ConfigError, MissingDependencyError
from lavis_lite.common.logging import get_logger
from lavis_lite.common.registry import registry
from lavis_lite.models.blocks import transformer_blocks
from lavis_lite.parallel.base import Strategy, clip_shards
from lavis_lite.parallel.blocks import flattenable_blocks, frozen_blocks
from lavis_lite.parallel.scaling import AgreeingScaler

logger = get_logger(__name__)


@registry.register_strategy("fairscale")
class FairscaleStrategy(Strategy):
    """OSS and ShardedDataParallel: each process averages and updates some of the parameters, and hands them out.

    fairscale 0.4.13's FullyShardedDataParallel needs CUDA; there the frozen blocks of encoder and language model in
    fp32 or in fp16 are wrapped in it. Those of an encoder are whole only while they run. A backward pass through those
    of a language model makes them whole again, one by one, and they stay so until their next forward pass: nothing in
    them has a gradient, which is what would have them given back. `fsdp2` cuts both for good. On CPUs, and in bf16,
    frozen blocks are whole in every process.

    Args:
        checkpoint_blocks: recompute the activations of encoder and language model blocks in the backward pass
            (fairscale's `checkpoint_wrapper`).
    """

    keeps_parts: ClassVar[bool] = True

    def __init__(self, *, checkpoint_blocks: bool = False) -> None:
        self.checkpoint_blocks = checkpoint_blocks
        self.sharded_blocks: list[Any] = []

    def prepare(
        self, model: nn.Module, device: torch.device, *, betas: tuple[float, float], **grouping: float
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """As of `Strategy`."""
        try:
            from fairscale.nn.data_parallel import ShardedDataParallel
            from fairscale.optim import OSS
        except ImportError as error:
            raise MissingDependencyError(
                "run.strategy: 'fairscale' needs the package fairscale: pip install 'lavis-lite[sharding]'"
            ) from error
        if self.checkpoint_blocks:
            _recompute(model)
        if device.type == "cuda":
            self.sharded_blocks = _shard_frozen_blocks(model, device)
        model.to(device)
        groups = optim.param_groups(model, **grouping)
        adamw = functools.partial(torch.optim.AdamW, fused=device.type in ("cpu", "cuda"))
        self.oss = OSS(groups, optim=adamw, lr=0.0, betas=betas)
        # Buckets would keep gradients of small parameters whole on every rank, in memory that zero_grad can't free.
        wrapped = ShardedDataParallel(model, self.oss, broadcast_buffers=False, reduce_buffer_size=0)
        return wrapped, self.oss

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """ShardedDataParallel's own `no_sync`."""
        context: AbstractContextManager[None] = wrapped.no_sync()  # type: ignore[operator]
        return context

    @contextlib.contextmanager
    def whole(self, wrapped: nn.Module) -> Iterator[None]:
        """Frozen blocks that are sharded are gathered: ranks evaluate different numbers of batches."""
        with contextlib.ExitStack() as stack:
            for block in self.sharded_blocks:
                stack.enter_context(block.summon_full_params(recurse=False))
            yield

    def scaler(self, device: torch.device, *, enabled: bool) -> torch.amp.GradScaler:
        """A scaler whose ranks agree on overflows, of which each sees its own part."""
        return AgreeingScaler(device, enabled=enabled)

    def clip_gradients(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
        """As of `Strategy`: each rank has the gradients of the parameters that it updates."""
        own = [p for group in self.oss.partition_parameters()[dist.rank()] for p in group["params"]]
        return clip_shards([p.grad for p in own if p.grad is not None], [], max_norm, own[0].device)

    def optimizer_parts(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The state of the parameters that this rank updates."""
        return dict(optim.state_tensors(self._names(), self.oss.optim))

    def optimizer_tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Sent to the main process by those who update the parameters."""
        mine = {name: tensor.cpu() for name, tensor in self.optimizer_parts(optimizer).items()}
        parts: list[Any] | None = [None] * dist.world_size() if dist.is_main() else None
        torch_dist.gather_object(mine, parts)
        return {name: tensor for part in parts or [] for name, tensor in part.items()}

    def load_optimizer_tensors(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """Each rank keeps the state of the parameters that it updates."""
        optim.load_state_tensors(self._names(), self.oss.optim, tensors)

    def _names(self) -> dict[nn.Parameter, str]:
        """Of all parameters: the optimiser of one rank's share has them in other groups."""
        groups = self.oss.param_groups
        return {p: name for group in groups for name, p in zip(group["names"], group["params"], strict=True)}


def _recompute(model: nn.Module) -> None:
    from fairscale.nn.checkpoint import checkpoint_wrapper

    blocks = transformer_blocks(model)
    if not blocks:
        raise ConfigError("run.strategy_options.checkpoint_blocks: this model has no blocks to recompute")
    for block in blocks:
        checkpoint_wrapper(block)  # in place: it replaces the block's forward


def _shard_frozen_blocks(model: nn.Module, device: torch.device) -> list[Any]:
    """Wrap each frozen block that fairscale takes, in place; the wrapped ones. Others are told of in one line."""
    blocks, taken = frozen_blocks(model), flattenable_blocks(model)
    if len(taken) < len(blocks) and dist.is_main():
        logger.warning(
            "run.strategy: fairscale leaves %d of %d frozen blocks whole on every process, since their weights aren't "
            "all in fp32 or all in fp16; fsdp2 cuts them too",
            len(blocks) - len(taken),
            len(blocks),
        )
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    sharded = {}
    for block in taken:
        precise = next(block.parameters()).dtype
        # Each is a root of its own, which by default stays whole after its first forward pass.
        sharded[block] = FullyShardedDataParallel(
            block.to(device),
            reshard_after_forward=True,
            disable_reshard_on_root=False,
            compute_dtype=precise,
            buffer_dtype=precise,
        )
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in sharded and parent is not sharded[child]:
                setattr(parent, name, sharded[child])
    return list(sharded.values())

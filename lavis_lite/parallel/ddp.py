"""Data parallelism: every process holds the model, gradients are averaged as the backward produces them."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lavis_lite.common.registry import registry
from lavis_lite.parallel.base import Strategy


@registry.register_strategy("ddp")
class DDPStrategy(Strategy):
    """torch's DistributedDataParallel: NCCL on GPUs, gloo on CPUs."""

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The wrapped model; weights are taken from the main process."""
        # Buffers (masks, positions) are constants here: broadcasting them at every step would be pure cost.
        # Newer versions of torch call the setting otherwise.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        settings: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            **settings,
        )

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """DDP's own `no_sync`."""
        assert isinstance(wrapped, DistributedDataParallel)
        return wrapped.no_sync()

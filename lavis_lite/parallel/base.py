"""The interface of a strategy, and what `auto` chooses."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from lavis_lite.common import dist
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry


class Strategy(Protocol):
    """What the runner asks of a strategy."""

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The module whose forward and backward train the model, already on its device."""
        ...

    def unwrap(self, wrapped: nn.Module) -> nn.Module:
        """The model inside: for evaluation and checkpoints."""
        ...

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """A context in which gradients accumulate on each rank without being exchanged."""
        ...


def build_strategy(name: str) -> Strategy:
    """The strategy of that name; `auto` is ddp with several processes and single with one.

    Raises ConfigError when the strategy doesn't fit the number of processes.
    """
    if name == "auto":
        name = "ddp" if dist.world_size() > 1 else "single"
    if name == "single" and dist.world_size() > 1:
        raise ConfigError(
            f"run.strategy: 'single' with {dist.world_size()} processes would train as many models that "
            "never meet; use ddp or auto"
        )
    if name == "ddp" and dist.world_size() == 1:
        raise ConfigError(
            "run.strategy: 'ddp' needs several processes: use torchrun --nproc-per-node=<n>, or strategy auto"
        )
    strategy: Strategy = registry.get_strategy_class(name)()
    return strategy

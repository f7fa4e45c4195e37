"""One process: the model as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from lavis_lite.common.registry import registry


@registry.register_strategy("single")
class SingleStrategy:
    """Trains the model itself."""

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model itself."""
        return model

    def unwrap(self, wrapped: nn.Module) -> nn.Module:
        """The model itself."""
        return wrapped

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Does nothing: there is nobody to exchange with."""
        return nullcontext()

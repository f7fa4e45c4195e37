"""Low-rank additions to a frozen language model (Hu et al., 2021), by peft."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lavis_lite.common.errors import MissingDependencyError


@dataclass(frozen=True)
class LoraConfig:
    """rank: of the additions. alpha: their scale is alpha / rank. dropout: of their input.

    targets: names of the linear layers that get one; by default peft's choice for the architecture.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] | None = None


def add_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """The model with trainable low-rank additions; raises MissingDependencyError without peft."""
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "model.language_model.lora needs peft: pip install 'lavis-lite[lora]'"
        ) from error
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets) if config.targets else None,
    )
    wrapped: nn.Module = peft.get_peft_model(model, settings)
    return wrapped


def lora_dropouts(model: Any) -> Iterator[nn.Module]:
    """The dropouts that belong to additions."""
    return (module for name, module in model.named_modules() if "lora_dropout" in name)

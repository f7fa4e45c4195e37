"""What every model is: built at random and offline from a mapping, filled by separate, strict loads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lavis_lite.common.binding import bind
from lavis_lite.common.checkpoint import load_tensors, resolve_checkpoint
from lavis_lite.common.errors import CheckpointError, ConfigError
from lavis_lite.common.registry import registry

# Keys of a model section that choose what to build or load; all others are keywords of the class.
SECTION_KEYS = ("arch", "model_type", "pretrained")
SHOWN_KEYS = 5


class BaseModel(nn.Module):
    """A registered model; its keyword arguments are the schema of the config's `model` section.

    presets: its folder of presets below lavis_lite/configs/models/.
    optional_keys: regular expressions of keys that a checkpoint may lack, such as those of frozen backbones.
    """

    presets: ClassVar[str]
    optional_keys: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def validate_config(cls, cfg: Mapping[str, Any], *, where: str = "model") -> None:
        """Check keys and values of a model section; builds and loads nothing. Raises ConfigError."""
        bind(cls, cfg, where=where, skip=SECTION_KEYS)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> Self:
        """The model with random weights, built offline, on torch's default device (also "meta")."""
        cls.validate_config(cfg)
        return cls(**bind(cls, cfg, where="model", skip=SECTION_KEYS))

    def load_backbones(self) -> None:
        """Load the pretrained parts that the config asked for; strict."""

    def load_checkpoint(self, path: str | Path) -> None:
        """Load weights from a run's folder, a checkpoint's folder, a .safetensors or a .pth file.

        Raises CheckpointError naming keys that are missing (and not optional), unexpected or of another
        shape.
        """
        file = resolve_checkpoint(path)
        load_strictly(self, load_tensors(file), source=f"'{file}'", optional=self.optional_keys)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds: trained parameters and the buffers of the modules that own them."""
        kept = {
            name
            for name, parameter in self.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        }
        for prefix, module in self.named_modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                kept |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)}
        return {name: tensor for name, tensor in self.state_dict().items() if name in kept}

    def lr_scale(self, name: str, decay: float) -> float:
        """The factor on the learning rate of parameter `name` under layer-wise decay `decay`."""
        return 1.0

    def no_weight_decay(self) -> set[str]:
        """Full names of parameters without weight decay, beyond biases and one-dimensional ones."""
        return set()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


def build_model(cfg: Mapping[str, Any]) -> BaseModel:
    """The model of a config's `model` section with its backbones and, when `pretrained` names one, a
    checkpoint.

    Raises UnknownNameError, ConfigError, CheckpointError.
    """
    if "arch" not in cfg:
        raise ConfigError("missing model.arch: one of " + ", ".join(registry.names("model")))
    model: BaseModel = registry.get_model_class(cfg["arch"]).from_config(cfg)
    model.load_backbones()
    if cfg.get("pretrained"):
        model.load_checkpoint(cfg["pretrained"])
    return model


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], *, source: str, optional: Iterable[str] = ()
) -> None:
    """Copy tensors into a module's parameters and buffers; every name and shape must agree.

    Args:
        source: what the tensors come from, for messages.
        optional: regular expressions of names that may be missing.

    Raises CheckpointError listing the first names that don't agree; the module is then unchanged.
    """
    own = module.state_dict()
    allowed = [re.compile(pattern) for pattern in optional]
    missing = [name for name in own if name not in tensors and not any(p.search(name) for p in allowed)]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} here {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    problems = [f"{len(names)} {kind}: {_first(names)}" for kind, names in kinds if names]
    if problems:
        raise CheckpointError(f"{source} does not fit this model: {'; '.join(problems)}")
    module.load_state_dict(dict(tensors), strict=False)


def _first(names: list[str]) -> str:
    more = len(names) - SHOWN_KEYS
    return ", ".join(names[:SHOWN_KEYS]) + (f", and {more} more" if more > 0 else "")

"""Parameter groups, AdamW, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lavis_lite.common.errors import CheckpointError, ConfigError
from lavis_lite.common.registry import registry

Schedule = Callable[[int], float]


@registry.register_lr_scheduler("linear_warmup_cosine_lr")
class LinearWarmupCosineLR:
    """Linear from warmup_lr to init_lr over warmup_steps, then half a cosine down to min_lr at max_steps.

    Calling it with a step (0 for the first) gives that step's rate; it keeps no state, so resuming needs
    none. The warm-up counts optimiser steps and may be longer than an epoch.
    """

    def __init__(
        self,
        *,
        max_steps: int,
        init_lr: float,
        min_lr: float = 0.0,
        warmup_lr: float = 0.0,
        warmup_steps: int = 0,
    ) -> None:
        self.max_steps = max_steps
        self.init_lr = init_lr
        self.min_lr = min_lr
        self.warmup_lr = warmup_lr
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.init_lr - self.warmup_lr) * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        return self.min_lr + (self.init_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def param_groups(model: nn.Module, weight_decay: float, lr_layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Trainable parameters grouped by weight decay and learning-rate factor, each group with its names.

    No decay for biases, one-dimensional parameters (norms) and scalars, and what `model.no_weight_decay()`
    names (the learned temperature, the queries). `lr_scale` of a group is `model.lr_scale(name,
    lr_layer_decay)`, which `set_lr` multiplies into the schedule. Both methods are optional.

    Raises ConfigError when nothing is trainable.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    lr_scale: Callable[[str, float], float] = getattr(model, "lr_scale", lambda name, decay: 1.0)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.dim() < 2 or name.endswith(".bias") or name in exempt
        decay = 0.0 if plain else weight_decay
        scale = lr_scale(name, lr_layer_decay)
        fresh = {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale, "lr": 0.0}
        group = groups.setdefault((decay, scale), fresh)
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ConfigError("model: every parameter is frozen, there is nothing to train")
    return list(groups.values())


def build_optimizer(
    groups: list[dict[str, Any]], betas: tuple[float, float], device: torch.device
) -> torch.optim.AdamW:
    """AdamW over `param_groups`; its fused form where the device has one."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=device.type in ("cpu", "cuda"))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the step's rate times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


Names = Mapping[nn.Parameter, str]


def _names(optimizer: torch.optim.Optimizer) -> Names:
    groups = optimizer.param_groups
    return {p: name for group in groups for name, p in zip(group["names"], group["params"], strict=True)}


def state_tensors(names: Names, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimiser's state as named tensors, `<parameter>|<field>`; names of parameters it doesn't have may be among
    them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{names[parameter]}|{key}", torch.as_tensor(value)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat named tensors, for safetensors."""
    return dict(state_tensors(_names(optimizer), optimizer))


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave, by parameter name.

    Raises CheckpointError when the names or shapes are another model's.
    """
    load_state_tensors(_names(optimizer), optimizer, tensors)


def load_state_tensors(names: Names, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `state_tensors` gave, the parts of parameters that the optimiser has.

    Raises CheckpointError when the names or shapes are another model's.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("|")
        state.setdefault(name, {})[field] = tensor
    parameters = {name: parameter for parameter, name in names.items()}
    unknown = sorted(set(state) - set(parameters))
    # A parameter that never had a gradient has no state: absent is fine, unknown is not.
    if unknown:
        raise CheckpointError(
            f"optimiser state for parameters this model doesn't train: {', '.join(unknown[:5])}"
        )
    for name, fields in state.items():
        moments = [value for value in fields.values() if value.dim() > 0]
        if any(value.shape != parameters[name].shape for value in moments):
            raise CheckpointError(f"optimiser state of '{name}' has another shape than the parameter")
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_index = {i: state[names[p]] for i, p in enumerate(own) if names[p] in state}
    # Through load_state_dict, which knows which fields live on which device.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})

"""The interface of a strategy, with what holds where every process has the whole model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from lavis_lite.common import dist, optim
from lavis_lite.common.binding import bind
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry

AUTO = "auto"
# Their blocks' weights are cut into parts, which those of bitsandbytes' layers can't be.
CUTTING = ("fairscale", "fsdp2")


class Strategy:
    """What the runner asks of a strategy; keywords of a subclass's `__init__` are `run.strategy_options`.

    Every method is called on all ranks at the same time.

    keeps_parts: whether each rank has only a part of what a checkpoint holds.
    """

    keeps_parts: ClassVar[bool] = False

    def prepare(
        self, model: nn.Module, device: torch.device, *, betas: tuple[float, float], **grouping: float
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module whose forward and backward train the model, on the device, and its AdamW.

        grouping: keywords of `optim.param_groups`.
        """
        wrapped = self.wrap(model.to(device), device)
        return wrapped, optim.build_optimizer(optim.param_groups(model, **grouping), betas, device)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The module whose forward and backward train a model that is on the device."""
        return model

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """A context in which gradients accumulate on each rank without being exchanged."""
        return nullcontext()

    def whole(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """A context in which the model can be used on each rank alone, for evaluation."""
        return nullcontext()

    def scaler(self, device: torch.device, *, enabled: bool) -> torch.amp.GradScaler:
        """fp16's loss scaler."""
        return torch.amp.GradScaler(device.type, enabled=enabled)

    def clip_gradients(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
        """The norm of all gradients as one vector, scaled down to max_norm where one is given."""
        parameters = [p for p in trained(optimizer) if p.grad is not None]
        if max_norm is not None:
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def model_parts(self, model: nn.Module) -> dict[str, Tensor]:
        """What this rank has of a checkpoint's model tensors: DTensors where they are sharded, else whole ones."""
        tensors: dict[str, Tensor] = model.trainable_state_dict()  # type: ignore[operator]  # a BaseModel's
        return tensors

    def optimizer_parts(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """What this rank has of the optimiser's state as `optim.optimizer_tensors` names it, as of `model_parts`."""
        return optim.optimizer_tensors(optimizer)

    def model_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint holds of the model, whole, on the main process; elsewhere it may be empty."""
        return self.model_parts(model)

    def optimizer_tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The optimiser's state, whole where `model_tensors` is."""
        return self.optimizer_parts(optimizer)

    def load_optimizer_tensors(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `optimizer_tensors` gave under any strategy, from whole tensors on every rank."""
        optim.load_optimizer_tensors(optimizer, dict(tensors))


def tied_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of a model's tensors by name, those that are parameters named before: {name: the first name}."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    tied = {}
    for name in names:
        if name in parameters and (known := first.setdefault(id(parameters[name]), name)) != name:
            tied[name] = known
    return tied


def trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimiser, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clip_shards(
    mine: Iterable[Tensor], everyones: Iterable[Tensor], max_norm: float | None, device: torch.device
) -> Tensor:
    """The norm over ranks of gradients of which each has a part, scaled down to max_norm where one is given.

    Args:
        mine: parts that only this rank has. everyones: gradients that are the same on all ranks.
    """
    mine, everyones = list(mine), list(everyones)
    square = _sum_of_squares(mine, device)
    torch_dist.all_reduce(square)
    norm = (square + _sum_of_squares(everyones, device)).sqrt()
    if max_norm is not None:
        # As torch.nn.utils.clip_grad_norm_ does it.
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in (*mine, *everyones):
            grad.mul_(factor.to(grad.device))
    return norm


def _sum_of_squares(grads: list[Tensor], device: torch.device) -> Tensor:
    squares = [torch.linalg.vector_norm(g.detach(), dtype=torch.float32).square().to(device) for g in grads]
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device)


def is_quantized(model_cfg: Mapping[str, Any]) -> bool:
    """Whether a model section has a language model in 8 or 4 bits."""
    return (model_cfg.get("language_model") or {}).get("quantize", "none") != "none"


def check_quantized(name: str, *, quantized: bool) -> None:
    """Raise ConfigError for a strategy that cuts a quantized language model into parts."""
    if quantized and name in CUTTING:
        raise ConfigError(
            f"run.strategy: '{name}' can't shard a quantized language model; use ddp, or "
            "model.language_model.quantize=none"
        )


def check_strategy(
    name: str, processes: int | None = None, *, options: Mapping[str, Any] | None = None
) -> None:
    """Raise ConfigError for a strategy that isn't there or doesn't fit so many processes, by default the run's.

    options: `run.strategy_options`, which `auto` can't have: whether the one it chooses knows them would depend on the
    memory that happens to be free. Those of a named strategy are checked when it is built.
    """
    if name == AUTO:
        if options:
            raise ConfigError(
                f"run.strategy_options: {', '.join(options)} with strategy auto, which may choose one without; set "
                f"run.strategy to one that has options: {_with_options()}"
            )
        return
    processes = processes or dist.world_size()
    registry.get_strategy_class(name)
    if name == "single" and processes > 1:
        raise ConfigError(
            f"run.strategy: 'single' with {processes} processes would train as many models that "
            "never meet; use ddp or auto"
        )
    if name != "single" and processes == 1:
        raise ConfigError(
            f"run.strategy: '{name}' needs several processes: use torchrun --nproc-per-node=<n>, or strategy auto"
        )


def _with_options() -> str:
    """The strategies that have options, and which."""
    found = {
        n: inspect.signature(registry.get_strategy_class(n)).parameters for n in registry.names("strategy")
    }
    return ", ".join(f"{name} ({', '.join(known)})" for name, known in found.items() if known)


def build_strategy(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """The strategy of that name, which isn't `auto` any more (`auto.choose_strategy`), with its options.

    Raises ConfigError when the strategy doesn't fit the number of processes, or has no such options.
    """
    check_strategy(name)
    strategy_class = registry.get_strategy_class(name)
    strategy: Strategy = strategy_class(**bind(strategy_class, options, where="run.strategy_options"))
    return strategy

"""Fully sharded data parallelism by torch's `fully_shard`: each process keeps its part of every weight.

What is sharded how. The blocks of encoder and language model, frozen or not, are gathered when they run and given
back after it; they keep the precision of their weights (`vision_encoder.precision`, `language_model.precision`), so a
frozen one travels as bf16. Everything else, the Q-Former above all, is one group that stays gathered from the
beginning of the forward pass to the end of the backward: three losses run through the Q-Former in pieces, and to
gather it for each would be several times the traffic for 750 MB. Its weights are fp32; `run.precision` decides the
arithmetic by autocast, as everywhere, which is why the numbers are those of one process.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lavis_lite.common import dist, optim
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.models.blocks import transformer_blocks
from lavis_lite.parallel.base import Strategy, clip_shards, tied_names, trained
from lavis_lite.parallel.scaling import AgreeingScaler


class _Root(nn.Module):
    """Around the model, whose own calls in evaluation then begin no sharded forward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, samples: Any = None) -> Any:
        return None if samples is None else self.module(samples)


@registry.register_strategy("fsdp2")
class FSDP2Strategy(Strategy):
    """Weights, gradients and moments in as many parts as there are processes.

    Args:
        cpu_offload: parts wait in the machine's own memory, and the optimiser runs there: slow, and the least GPU
            memory there is.
    """

    keeps_parts: ClassVar[bool] = True

    def __init__(self, *, cpu_offload: bool = False) -> None:
        if not hasattr(FSDPModule, "reset_iter_state"):
            raise ConfigError(
                f"run.strategy: fsdp2 needs a torch whose FSDPModule has reset_iter_state, not {torch.__version__}; "
                "upgrade torch, or use ddp"
            )
        self.offload = (
            CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
        )

    def prepare(
        self, model: nn.Module, device: torch.device, *, betas: tuple[float, float], **grouping: float
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """As of `Strategy`; the model comes from the machine's own memory block by block."""
        wrapped = self.wrap(model, device)
        groups = [part for group in optim.param_groups(model, **grouping) for part in _by_kind(group)]
        place = torch.device("cpu") if isinstance(self.offload, CPUOffloadPolicy) else device
        return wrapped, optim.build_optimizer(groups, betas, place)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The sharded model, on the device."""
        # OPT's layers return views, and nothing here or in transformers' models writes into a layer's output.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        root = _Root(model)
        self.device = device
        mesh = init_device_mesh(device.type, (dist.world_size(),))
        # A scalar (the temperature) has no dimension to shard: every rank keeps it.
        whole = {parameter for parameter in model.parameters() if parameter.dim() == 0}
        settings: dict[str, Any] = {"mesh": mesh, "offload_policy": self.offload, "ignored_params": whole}
        self.blocks = cast("list[FSDPModule]", transformer_blocks(model))
        for block in self.blocks:
            fully_shard(cast(nn.Module, block), reshard_after_forward=True, **settings)
        fully_shard(root, **settings)
        for parameter in whole:
            parameter.data = parameter.data.to(device)
        self.root = cast(FSDPModule, root)
        with torch.no_grad():
            root()  # the first forward pass settles which module is the root
        self.root.reshard()
        return root

    @contextlib.contextmanager
    def no_sync(self, wrapped: nn.Module) -> Iterator[None]:
        """Gradients stay whole on each rank."""
        self.root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.root.set_requires_gradient_sync(True)

    @contextlib.contextmanager
    def whole(self, wrapped: nn.Module) -> Iterator[None]:
        """Every rank holds the whole weights: ranks evaluate different numbers of batches, and none may wait."""
        members = [module for module in wrapped.modules() if isinstance(module, FSDPModule)]
        self.root.set_reshard_after_forward(False)
        for module in members:
            module.unshard()
        try:
            yield
        finally:
            # Else the next step would prefetch in the order of an evaluation that was another on each rank.
            self.root.reset_iter_state()
            for module in members:
                module.reshard()
            for block in self.blocks:
                block.set_reshard_after_forward(True)

    def scaler(self, device: torch.device, *, enabled: bool) -> torch.amp.GradScaler:
        """A scaler whose ranks agree on overflows, of which each sees its own part."""
        return AgreeingScaler(device, enabled=enabled)

    def clip_gradients(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
        """As of `Strategy`; gradients of what every rank keeps are averaged here."""
        grads = [p.grad for p in trained(optimizer) if p.grad is not None]
        parts = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
        scalars = [grad for grad in grads if not isinstance(grad, DTensor)]
        for grad in scalars:
            torch_dist.all_reduce(grad)
            grad /= dist.world_size()
        return clip_shards(parts, scalars, max_norm, self.device)

    def model_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Gathered one by one, so that no rank ever holds them all but the main one, on its CPU."""
        parts = self.model_parts(model)
        tied = tied_names(model, parts)
        # Tied weights are gathered once and stay tied.
        whole = {name: _whole_on_main(tensor) for name, tensor in parts.items() if name not in tied}
        return {name: whole[tied.get(name, name)] for name in parts} if dist.is_main() else {}

    def optimizer_tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Gathered one by one."""
        tensors = {name: _whole_on_main(x) for name, x in self.optimizer_parts(optimizer).items()}
        return tensors if dist.is_main() else {}

    def load_optimizer_tensors(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """Each rank keeps its part."""
        parameters = {
            n: p for g in optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True)
        }
        parts = {}
        for key, tensor in tensors.items():
            like = parameters.get(key.rpartition("|")[0])
            parts[key] = _part(tensor, like) if isinstance(like, DTensor) and tensor.dim() > 0 else tensor
        optim.load_optimizer_tensors(optimizer, parts)


def _by_kind(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A parameter group in two where it mixes sharded parameters with whole ones, which one kernel can't update."""
    pairs = list(zip(group["names"], group["params"], strict=True))
    parts = []
    for sharded in (True, False):
        kept = [(name, p) for name, p in pairs if isinstance(p, DTensor) is sharded]
        if kept:
            parts.append({**group, "names": [name for name, _ in kept], "params": [p for _, p in kept]})
    return parts


def _whole_on_main(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu() if dist.is_main() else torch.empty(0)


def _part(tensor: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a tensor that all ranks have read."""
    if tensor.shape != like.shape:
        return tensor  # which loading then reports by its name
    place = like.to_local().device
    return distribute_tensor(tensor.to(place), like.device_mesh, like.placements, src_data_rank=None)

"""fp16's loss scaler where each rank has its own part of the gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lavis_lite.parallel.base import trained


class AgreeingScaler(torch.amp.GradScaler):
    """A GradScaler whose ranks find an overflow together: what one has in its part is the verdict of all.

    GradScaler itself only sees the verdict, as the gradient of an optimiser that never steps. So nothing here depends
    on how a sharded tensor is checked, nor on what a fused optimiser makes of that: torch 2.14's ShardedGradScaler
    gives its verdict in a shape that fused AdamW can't use.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        super().__init__(device.type, enabled=enabled)
        self._verdict = nn.Parameter(torch.zeros((), device=device))
        self._stand_in = torch.optim.SGD([self._verdict], lr=0.0)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide this rank's gradients by the scale, and settle with all ranks whether they are finite; on all ranks.

        Raises RuntimeError when called twice before `update`.
        """
        if not self.is_enabled():
            return
        grads = [_own_part(p.grad) for p in trained(optimizer) if p.grad is not None]
        self._verdict.grad = _zero_or_nan(grads, self._verdict.device)
        torch_dist.all_reduce(self._verdict.grad)
        super().unscale_(self._stand_in)
        factor = 1.0 / self.get_scale()
        for grad in grads:
            grad.mul_(factor)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Let the optimiser step where the gradients of all ranks are finite, `unscale_` having been called or not."""
        if self.is_enabled():
            if self._verdict.grad is None:
                self.unscale_(optimizer)
            if not bool(torch.isfinite(self._verdict.grad)):  # type: ignore[arg-type]  # `unscale_` gave it one
                return None
        return optimizer.step(*args, **kwargs)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """As of GradScaler: lower the scale after an overflow, raise it after many steps without one."""
        super().update(new_scale)
        self._verdict.grad = None


def _own_part(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


@torch.no_grad()
def _zero_or_nan(grads: list[Tensor], device: torch.device) -> Tensor:
    """0 where all numbers are finite, else NaN, which the sum over ranks keeps; nothing waits for a GPU."""
    largest = [torch.linalg.vector_norm(g, float("inf")).float().to(device) for g in grads if g.numel()]
    return torch.stack(largest).mul(0.0).sum() if largest else torch.zeros((), device=device)

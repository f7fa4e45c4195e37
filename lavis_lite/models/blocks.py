"""The blocks of a model's transformers, whoever wrote them, and how to keep less of them for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def transformer_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of every outermost list of at least two modules of one class, in their order.

    Those are the blocks of encoders and language models, whoever wrote them. A class without a `forward` is no block:
    its methods are called one by one (the Q-Former's), so nothing tells when it begins and ends.
    """
    return [block for members in block_lists(module) if is_called(members[0]) for block in members]


def block_lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    """The outermost lists of several modules of one class with weights."""
    for child in module.children():
        members = list(child.children())
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _are_alike(members):
            yield members
        else:
            yield from block_lists(child)


def _are_alike(members: list[nn.Module]) -> bool:
    if len(members) < 2 or len({type(member) for member in members}) > 1:
        return False
    return all(any(True for _ in member.parameters()) for member in members)


def is_called(module: nn.Module) -> bool:
    """Whether a module's class has a `forward`."""
    return type(module).forward is not nn.Module.forward


@dataclass
class Recomputation:
    """Whether blocks recompute: one switch for all blocks of a model, which need not be in training mode for it."""

    on: bool = True


@dataclass(frozen=True)
class RecomputedForward:
    """A block's forward that keeps its inputs alone and runs again in the backward pass.

    An object and not a function made on the spot, so that a block with it can be copied and pickled.
    """

    forward: Callable[..., Any]
    switch: Recomputation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.switch.on and torch.is_grad_enabled():
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        return self.forward(*args, **kwargs)


def recompute_blocks(model: nn.Module, switch: Recomputation | None = None) -> int:
    """Let the transformer blocks of a model recompute while `switch` is on, in place; the number of them.

    Parameters, buffers and state dicts keep their names. A block that recomputes already does so once, as the new
    switch says.
    """
    blocks, switch = transformer_blocks(model), switch or Recomputation()
    for block in blocks:
        plain = block.forward
        if isinstance(plain, RecomputedForward):
            plain = plain.forward
        block.forward = RecomputedForward(plain, switch)
    return len(blocks)

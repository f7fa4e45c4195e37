"""Which parts of a model can be sharded, or recomputed, one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def transformer_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of every outermost list of at least two modules of one class, in their order.

    Those are the blocks of encoders and language models, whoever wrote them. A class without a `forward` is no block:
    its methods are called one by one (the Q-Former's), so nothing tells when it begins and ends.
    """
    return [block for members in _lists(module) if _is_called(members[0]) for block in members]


def compiled_blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks, and of those that are no modules to call (the Q-Former's) the parts that are.

    A single layer is none: it has nothing to be fused with.
    """
    return [part for members in _lists(module) for block in members for part in _called(block)]


def _lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    """The outermost lists of several modules of one class with weights."""
    for child in module.children():
        members = list(child.children())
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _are_alike(members):
            yield members
        else:
            yield from _lists(child)


def _are_alike(members: list[nn.Module]) -> bool:
    if len(members) < 2 or len({type(member) for member in members}) > 1:
        return False
    return all(any(True for _ in member.parameters()) for member in members)


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _called(block: nn.Module) -> list[nn.Module]:
    if _is_called(block):
        return [block] if any(True for _ in block.children()) else []
    return [part for child in block.children() for part in _called(child)]


def frozen_blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of which nothing is trained."""
    return [b for b in transformer_blocks(module) if not any(p.requires_grad for p in b.parameters())]


def flattenable_blocks(module: nn.Module) -> list[nn.Module]:
    """The frozen blocks that fairscale's FullyShardedDataParallel takes: all weights in fp32, or all in fp16.

    It flattens them into one, and refuses bf16 (0.4.13).
    """
    kinds = ({torch.float32}, {torch.float16})
    return [block for block in frozen_blocks(module) if {p.dtype for p in block.parameters()} in kinds]

"""Which parts of a model can be sharded, or compiled, one by one."""

from __future__ import annotations

import torch
from torch import nn

from lavis_lite.models.blocks import block_lists, is_called, transformer_blocks


def compiled_blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks, and of those that are no modules to call (the Q-Former's) the parts that are.

    A single layer is none: it has nothing to be fused with.
    """
    return [part for members in block_lists(module) for block in members for part in _called(block)]


def _called(block: nn.Module) -> list[nn.Module]:
    if is_called(block):
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

"""Which parts of a model can be sharded, or recomputed, one by one."""

from __future__ import annotations

from torch import nn


def transformer_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of every outermost list of at least two modules of one class, in their order.

    Those are the blocks of encoders and language models, whoever wrote them. A class without a `forward` is no block:
    its methods are called one by one (the Q-Former's), so nothing tells when it begins and ends.
    """
    found: list[nn.Module] = []
    for child in module.children():
        members = list(child.children())
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _are_blocks(members):
            found += members
        else:
            found += transformer_blocks(child)
    return found


def _are_blocks(members: list[nn.Module]) -> bool:
    if len(members) < 2 or len({type(member) for member in members}) > 1:
        return False
    has_forward = type(members[0]).forward is not nn.Module.forward
    return has_forward and all(any(True for _ in member.parameters()) for member in members)


def frozen_blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks whose frozen weights can be flattened into one: nothing trained, and one dtype."""
    return [block for block in transformer_blocks(module) if _is_frozen_of_one_type(block)]


def _is_frozen_of_one_type(block: nn.Module) -> bool:
    parameters = list(block.parameters())
    return len({p.dtype for p in parameters}) == 1 and not any(p.requires_grad for p in parameters)

"""torch.compile for a run: the blocks of the transformers, in place, so that every name stays what it was.

Blocks and not the whole model: all blocks of a tower are compiled as one, so that 39 cost hardly more than one, and
what depends on a batch's values (packing texts, drawing negatives, generation) stays in Python between them.
"""

from __future__ import annotations

import torch
from torch import nn

from lavis_lite.common.logging import get_logger
from lavis_lite.parallel.blocks import compiled_blocks

logger = get_logger(__name__)


def compile_blocks(model: nn.Module, device: torch.device) -> int:
    """Compile every transformer block of a model in place; the number of them, 0 where the compiler doesn't work.

    Parameters, buffers and state dicts keep their names. A compiler that doesn't work here (no C++ compiler, no
    Triton) is found out by compiling something small, and told in one line.
    """
    reason = compiler_failure(device)
    if reason is not None:
        logger.warning("run.compile: going on without, since torch.compile does not work here: %s", reason)
        return 0
    compiled = 0
    for block in compiled_blocks(model):
        # Texts differ in length from batch to batch: sizes become variables at the first change.
        block.compile()
        compiled += 1
    if not compiled:
        logger.warning(
            "run.compile: this model has no blocks that are called as modules; nothing is compiled"
        )
    return compiled


def compiler_failure(device: torch.device) -> str | None:
    """Why torch.compile doesn't work on this device, in one line; None where it does."""
    try:
        _try_out(device)
    except Exception as error:  # compilers fail in as many ways as there are compilers
        return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return None


def _try_out(device: torch.device) -> None:
    compiled = torch.compile(lambda x: torch.tanh(x * 2.0 + 1.0))
    compiled(torch.ones(8, device=device, requires_grad=True)).sum().backward()

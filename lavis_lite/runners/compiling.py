"""torch.compile for a run: the blocks of the transformers, in place, so that every name stays what it was.

Blocks and not the whole model: all blocks of a tower are compiled as one, so that 39 cost hardly more than one, and
what depends on a batch's values (packing texts, drawing negatives) stays in Python between them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lavis_lite.common.errors import TrainingError
from lavis_lite.common.logging import get_logger
from lavis_lite.parallel.blocks import compiled_blocks

logger = get_logger(__name__)

# Variants of one piece of code: the Q-Former's come with packed texts and with queries, with one row for all images and
# with one for each, from attention and from the wide layer, and each once more when its sizes become variables. About
# twelve; torch gives up at 8 by itself.
VARIANTS = 32


class BlockCompiler:
    """Runs blocks compiled while their model is in training mode, until the compiler fails for the first time.

    Evaluation and generation run them as they are: with a cache that grows by a token at a time, every layer and length
    would be a variant of its own, and torch 2.14 fails to compile some of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.failed = False

    def compile(self, block: nn.Module) -> None:
        """Put a forward before the block's own that chooses between it and what it is compiled to."""
        plain = block.forward
        # Texts differ in length from batch to batch: sizes become variables at the first change.
        compiled = torch.compile(plain)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.failed or not self.model.training:
                return plain(*args, **kwargs)
            return self._try(compiled, plain, args, kwargs)

        block.forward = forward

    def _try(
        self, compiled: Callable[..., Any], plain: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        from torch._dynamo.exc import TorchDynamoException  # loaded by torch.compile, and slow to load

        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            self.failed = True
            logger.warning("run.compile: going on without, since a block can't be compiled: %s", _line(error))
        return plain(*args, **kwargs)


def compile_blocks(model: nn.Module, device: torch.device) -> int:
    """Compile every transformer block of a model in place; the number of them, 0 where the compiler doesn't work.

    Parameters, buffers and state dicts keep their names. A compiler that doesn't work here (no C++ compiler, no
    Triton) is found out by compiling something small, and one that fails at a block, or at its backward pass, when that
    first runs; either is told in one line.
    """
    reason = compiler_failure(device)
    if reason is not None:
        logger.warning("run.compile: going on without, since torch.compile does not work here: %s", reason)
        return 0
    _compile_backward_early()
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    compiler, blocks = BlockCompiler(model), compiled_blocks(model)
    for block in blocks:
        compiler.compile(block)
    if not blocks:
        logger.warning(
            "run.compile: this model has no blocks that are called as modules; nothing is compiled"
        )
    return len(blocks)


def _compile_backward_early() -> None:
    """Compile a block's backward pass when its forward is, and not when it first runs: too late to do without."""
    import torch._functorch.config as settings

    if hasattr(settings, "force_non_lazy_backward_lowering"):  # not in the oldest torch that is supported
        settings.force_non_lazy_backward_lowering = True


@contextlib.contextmanager
def backward_errors() -> Iterator[None]:
    """Around a backward pass, where one that wasn't compiled with its forward is, too late to run the block as it is.

    Raises TrainingError, one line, for a compiler's error.
    """
    try:
        yield
    except Exception as error:
        compiler = sys.modules.get("torch._dynamo.exc")  # slow to load, and there where anything was compiled
        if compiler is None or not isinstance(error, compiler.TorchDynamoException):
            raise
        raise TrainingError(
            f"run.compile: a block's backward pass can't be compiled: {_line(error)}; set run.compile=false, and the "
            "same command continues the run"
        ) from error


def compiler_failure(device: torch.device) -> str | None:
    """Why torch.compile doesn't work on this device, in one line; None where it does."""
    try:
        _try_out(device)
    except Exception as error:  # compilers fail in as many ways as there are compilers
        return _line(error)
    return None


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    # torch's own begin with who raised them: "backend='inductor' raised:".
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]


def _try_out(device: torch.device) -> None:
    compiled = torch.compile(lambda x: torch.tanh(x * 2.0 + 1.0))
    compiled(torch.ones(8, device=device, requires_grad=True)).sum().backward()

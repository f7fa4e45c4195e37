"""Turns a pre-training run into the weights that ship with the package, whichever of the world's models it made:

`python -m lavis_lite.worlds.shapes.export output/pretrain_vit` (or `pretrain_opt`, `pretrain_t5`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save

from lavis_lite.common.checkpoint import load_tensors, resolve_checkpoint
from lavis_lite.common.errors import CheckpointError, LavisLiteError
from lavis_lite.common.io import atomic_write
from lavis_lite.worlds.shapes.encoder import WEIGHTS
from lavis_lite.worlds.shapes.lm_export import export_language_model, is_language_run

PREFIX = "encoder."


def export_vit(run: str | Path, *, target: str | Path = WEIGHTS) -> Path:
    """Write the encoder of a `shapes_vit_pretrain` run in fp16 safetensors; returns the file.

    Args:
        run: a run's folder, a checkpoint's folder or a model file. target: what to write.

    Raises CheckpointError when there is no checkpoint or no encoder in it.
    """
    source = resolve_checkpoint(run)
    tensors = load_tensors(source)
    encoder = {
        name.removeprefix(PREFIX): tensor.to(torch.float16).contiguous()
        for name, tensor in sorted(tensors.items())
        if name.startswith(PREFIX)
    }
    if not encoder:
        raise CheckpointError(f"'{source}' has no weights named {PREFIX}*: not a run of shapes_vit_pretrain")
    atomic_write(target, save(encoder))
    return Path(target)


def main(arguments: list[str]) -> str:
    """The command: RUN and, if not the package's own, where to write; returns what it prints, or exits."""
    if len(arguments) not in (1, 2):
        sys.exit("usage: python -m lavis_lite.worlds.shapes.export RUN [TARGET]")
    run, target = arguments[0], arguments[1] if len(arguments) == 2 else None
    try:
        if is_language_run(run):
            return str(export_language_model(run, target=target))
        return str(export_vit(run, target=target or WEIGHTS))
    except LavisLiteError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    print(main(sys.argv[1:]))

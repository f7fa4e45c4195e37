"""Turns a pre-training run into the weights file that ships with the package:

`python -m lavis_lite.worlds.shapes.export output/pretrain_vit`.
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


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m lavis_lite.worlds.shapes.export RUN [FILE]")
    try:
        print(export_vit(sys.argv[1], target=sys.argv[2] if len(sys.argv) == 3 else WEIGHTS))
    except LavisLiteError as error:
        sys.exit(f"error: {error}")

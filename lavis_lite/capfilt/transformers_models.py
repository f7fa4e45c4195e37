"""Models of transformers from the hub or a folder, with what prepares their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lavis_lite.common.device import PRECISIONS
from lavis_lite.common.errors import CheckpointError
from lavis_lite.models.language.loading import quiet


def load_pretrained(
    name: str, auto_class: str, device: torch.device, precision: str, *, role: str
) -> tuple[Any, Any]:
    """(model in eval mode, its processor). On a GPU the weights are in `precision`, on a CPU in float32.

    Raises CheckpointError when files are missing or don't fit; role: the option that named the model.
    """
    import transformers

    folder = Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    dtype = PRECISIONS.get(precision, torch.float32) if device.type == "cuda" else torch.float32
    try:
        processor = transformers.AutoProcessor.from_pretrained(source)
        with quiet():
            model, report = getattr(transformers, auto_class).from_pretrained(
                source, dtype=dtype, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"--{role} hf:{name}: no such model here ({reason}); give a local folder, or let the machine reach the hub "
            "once"
        ) from error
    if report["missing_keys"]:
        raise CheckpointError(
            f"--{role} hf:{name}: its files lack {', '.join(sorted(report['missing_keys'])[:5])}"
        )
    return model.to(device).eval(), processor

"""Turns a pre-training run of a language model into the folder that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from lavis_lite.common.checkpoint import resolve_checkpoint
from lavis_lite.common.errors import CheckpointError
from lavis_lite.worlds.shapes.lm_pretrain import ShapesLMPretrain
from lavis_lite.worlds.shapes.lm_tokenizers import LANGUAGE, build_tokenizer

ARCH, CONFIG = "shapes_lm_pretrain", "config.yaml"


def export_language_model(run: str | Path, *, target: str | Path | None = None) -> Path:
    """Write a `shapes_lm_pretrain` run's model and tokenizer as a Hugging Face folder; returns the folder.

    Weights are stored in fp16; the configuration says float32, which is what they are loaded in.

    Args:
        run: the run's folder. target: by default language/<family> beside this file.

    Raises CheckpointError when the folder is no such run, or has no checkpoint.
    """
    if not is_language_run(run):
        raise CheckpointError(f"'{run}' is no run of {ARCH}: it has no {CONFIG} that says so")
    model = ShapesLMPretrain.from_config(_model_section(run))
    model.load_checkpoint(resolve_checkpoint(run))
    folder = Path(target) if target else LANGUAGE / model.family
    write_language_model(model.lm, model.family, folder)
    return folder


def is_language_run(run: str | Path) -> bool:
    """Whether a folder is a run that pre-trains a language model."""
    return _model_section(run).get("arch") == ARCH


def _model_section(run: str | Path) -> dict[str, Any]:
    path = Path(run) / CONFIG
    return dict(OmegaConf.load(path)["model"]) if path.is_file() else {}


def write_language_model(lm: Any, family: str, folder: Path) -> None:
    """Write a model in fp16, and its tokenizer."""
    halves: dict[int, Tensor] = {}
    # Tied weights stay one tensor, which is written once.
    state = {
        name: halves.setdefault(tensor.data_ptr(), tensor.to(torch.float16))
        for name, tensor in lm.state_dict().items()
    }
    lm.save_pretrained(folder, state_dict=state)
    build_tokenizer(family).save_pretrained(folder)

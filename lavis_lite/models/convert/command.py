"""`lavis-lite convert`: a checkpoint of one project as another's, tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lavis_lite.common.checkpoint import MODEL, resolve_checkpoint
from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.io import atomic_dir, atomic_file
from lavis_lite.common.tensor_reader import TensorStore
from lavis_lite.common.tensor_writer import write_tensors
from lavis_lite.models.convert.formats import (
    CONFIG,
    OURS,
    Checkpoint,
    InMemory,
    open_checkpoint,
    target_layout,
)
from lavis_lite.models.convert.hf_config import config_for
from lavis_lite.models.convert.rules import Renamed
from lavis_lite.models.frozen import frozen_source, is_kept

# A Hugging Face config.json that travels with a checkpoint of ours, so that the way back has it.
CARRIED_CONFIG = "hf_config.json"


@dataclass(frozen=True)
class Converted:
    """What was done.

    source, target: the names of the two layouts. tensors: how many were written.
    left_out: names of the source that the target has no place for, or holds under another name already.
    notes: what a user should know, a line each.
    """

    source: str
    target: str
    tensors: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    llm: str | None = None,
    config: str | Path | None = None,
) -> Converted:
    """Write a checkpoint in another project's names.

    Needs about the memory of the largest tensor, however large the file; `to="lavis"` is torch.save, which takes its
    pages from the mapped source and may keep as many of them in memory as there is room for.

    Args:
        source: whatever `BaseModel.load_checkpoint` understands.
        target: a new folder; a .safetensors file for ours, a .pth file for LAVIS's.
        to: lavis_lite, hf or lavis.
        llm: opt or t5, for a stage-2 checkpoint that doesn't tell.
        config: for hf, the config.json to go with the weights; by default the one beside the source, or what the
            weights' shapes tell of a published model.

    Raises CheckpointError for a source that can't be read, has keys that nothing knows or lacks some, and for a
    target that exists or can't hold it.
    """
    file, target = resolve_checkpoint(source), Path(target).expanduser()
    if target.exists():
        raise CheckpointError(f"'{target}' exists; name a new one, or remove it")
    where = f"'{file}'"
    checkpoint = _with_kept(open_checkpoint(file), file) if to == OURS else open_checkpoint(file)
    if llm is not None and "llm_proj.weight" in checkpoint.tensors:
        if checkpoint.llm not in (None, llm):
            raise CheckpointError(
                f"{where} is for a language model of the family {checkpoint.llm}, not {llm}"
            )
        checkpoint = replace(checkpoint, llm=llm)
    name = checkpoint.layout.name if checkpoint.layout else OURS
    dropped = checkpoint.tensors.left_out if isinstance(checkpoint.tensors, Renamed) else ()
    if to == OURS:
        _write_ours(checkpoint, file, target)
        return Converted(name, OURS, len(checkpoint.tensors), dropped)
    layout = target_layout(checkpoint, to, where=where)
    tensors = Renamed(checkpoint.tensors, layout, "write", where=where)
    notes = (
        _write_hf(tensors, checkpoint, file, target, config) if to == "hf" else _write_lavis(tensors, target)
    )
    return Converted(name, layout.name, len(tensors), (*dropped, *tensors.left_out), notes)


def _with_kept(checkpoint: Checkpoint, file: Path) -> Checkpoint:
    """A run's checkpoint with the frozen weights that the run keeps beside it, since nothing else has them."""
    source = frozen_source(file)
    if source is None or not is_kept(source):
        return checkpoint
    return replace(checkpoint, tensors=InMemory({**open_checkpoint(source).tensors, **checkpoint.tensors}))


def _write_ours(checkpoint: Checkpoint, file: Path, target: Path) -> None:
    if target.suffix == ".safetensors":
        write_tensors(target, checkpoint.tensors, metadata=checkpoint.metadata)
        return
    _check_folder(target, "a .safetensors file or a folder")
    with atomic_dir(target) as folder:
        write_tensors(folder / MODEL, checkpoint.tensors, metadata=checkpoint.metadata)
        theirs = file.with_name(CONFIG)
        if checkpoint.layout and checkpoint.layout.family == "hf" and theirs.is_file():
            shutil.copyfile(theirs, folder / CARRIED_CONFIG)


def _write_hf(
    tensors: Renamed, checkpoint: Checkpoint, file: Path, target: Path, config: str | Path | None
) -> tuple[str, ...]:
    _check_folder(target, "a folder")
    text, notes = config_for(tensors, checkpoint.llm, given=_config_file(file, config))
    with atomic_dir(target) as folder:
        write_tensors(folder / MODEL, tensors, metadata={}, tie=False)
        if text is not None:
            (folder / CONFIG).write_text(text)
    return notes


def _config_file(file: Path, config: str | Path | None) -> Path | None:
    if config is not None:
        path = Path(config).expanduser()
        path = path / CONFIG if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError(f"no config.json at '{path}'")
        return path
    beside = (file.with_name(name) for name in (CARRIED_CONFIG, CONFIG))
    return next((path for path in beside if path.is_file()), None)


def _write_lavis(tensors: TensorStore, target: Path) -> tuple[str, ...]:
    if target.suffix not in (".pth", ".pt"):
        raise CheckpointError(f"'{target}': LAVIS's checkpoints are .pth files")
    kept: dict[Hashable, Tensor] = {}
    for name in tensors:
        owner = tensors.owner(name)
        if owner not in kept:
            kept[owner] = tensors[name]
    # Names of one tensor share it, so that torch.save writes it once.
    state = {name: kept[tensors.owner(name)] for name in tensors}
    with atomic_file(target) as temporary:
        torch.save({"model": state}, temporary)
    return ()


def _check_folder(target: Path, expected: str) -> None:
    if target.suffix in (".pth", ".pt", ".bin", ".safetensors", ".json"):
        raise CheckpointError(f"'{target}' looks like a file; give {expected}")

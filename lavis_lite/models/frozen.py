"""Where the frozen weights of a run's checkpoint are: it holds what is trained, and names the file of the rest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lavis_lite.common.checkpoint import STATE, load_state, save_tensors
from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.fingerprint import tensors_digest
from lavis_lite.common.io import atomic_file

# A run's own file of what no other file gave; named by its content, so that it is never another one's.
KEPT = "frozen-{digest}.safetensors"


def keep(run_dir: Path, tensors: Mapping[str, Tensor], *, write: bool) -> Path:
    """The file of a run's frozen weights, written where it isn't there yet. write: false where another process does."""
    file = run_dir.resolve() / KEPT.format(digest=tensors_digest(tensors, 12))
    if write and not file.is_file():
        with atomic_file(file) as temporary:
            save_tensors(temporary, tensors)
    return file


def is_kept(file: Path) -> bool:
    """Whether a file is such a one, and not the checkpoint of another run or project."""
    return file.match(KEPT.format(digest="*"))


def name_from_checkpoint(run_dir: Path, file: Path | None) -> str | None:
    """The file with a model's frozen weights as a checkpoint names it: one of the run's own moves with its folder."""
    if file is None:
        return None
    return f"../../{file.name}" if file.parent == run_dir.resolve() and is_kept(file) else str(file)


def frozen_source(file: Path) -> Path | None:
    """Where a run's checkpoint says that its frozen parts came from; None where they are the backbones' own.

    Raises CheckpointError when that is no longer there: the model would be another one without a word.
    """
    if not (file.parent / STATE).is_file():
        return None
    named = load_state(file.parent).get("frozen_from")
    if named is None:
        return None
    folder = Path(os.path.abspath(file.parent))
    # From RUN/checkpoints/STEP, whatever links lead there, or from RUN/previous_1/checkpoints/STEP.
    places = (
        Path(os.path.normpath(folder / named)),
        (folder / named).resolve(),
        Path(os.path.normpath(folder / ".." / named)),
    )
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise CheckpointError(
            f"'{file}' has the frozen parts of '{places[0]}', which isn't there any more: put it back (the path is "
            f"frozen_from in {file.parent / STATE})"
        )
    return found

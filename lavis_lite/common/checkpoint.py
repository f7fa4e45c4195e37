"""Checkpoints: a folder per step, complete or absent.

<run>/checkpoints/step_000800/model.safetensors      trained parameters and buffers, nothing frozen
                              optimizer.safetensors  AdamW's moments by parameter name
                              state.json             step, best, versions: what else a run continues from

Under strategies that cut weights or moments into parts, each process may write its own: in place of the two files of
tensors there are then torch.distributed.checkpoint's (.metadata and *.distcp), see `tensor_parts`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.hub import PREFIX, local_folder
from lavis_lite.common.io import atomic_dir, atomic_write, remove_leftovers
from lavis_lite.common.tensor_parts import OPTIMIZER_PARTS, PARTS, PartsError, StoredParts
from lavis_lite.common.tensor_reader import ALIAS, TensorStore, open_tensors

FOLDER = "checkpoints"
# What other projects call the weights of a folder, beside our own name for them.
FOREIGN = ("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_STEP = re.compile(r"step_(\d+)")


def step_dir(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a checkpoints folder."""
    return folder / f"step_{step:06d}"


def list_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in a checkpoints folder as (step, path), oldest first."""
    found = []
    for path in Path(folder).glob("step_*"):
        match = _STEP.fullmatch(path.name)
        if match and (path / STATE).is_file() and weights_file(path).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def weights_file(checkpoint: Path) -> Path:
    """What `open_tensors` reads of a checkpoint's folder: its model file, or the index of its parts."""
    return checkpoint / PARTS if (checkpoint / PARTS).is_file() else checkpoint / MODEL


def open_optimizer(checkpoint: Path) -> TensorStore:
    """The optimiser's tensors in a checkpoint's folder; CheckpointError when they can't be read."""
    if (checkpoint / PARTS).is_file():
        return StoredParts(checkpoint, OPTIMIZER_PARTS)
    return open_tensors(checkpoint / OPTIMIZER)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; tied tensors are stored once and named again when read by `load_tensors`."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in owners:
            aliases[ALIAS + name] = owners[place]
            continue
        owners[place] = name
        stored[name] = tensor
    # Views of one storage that differ in place or shape can't be written as they are.
    storages = Counter(tensor.untyped_storage().data_ptr() for tensor in stored.values())
    for name, tensor in stored.items():
        shared = storages[tensor.untyped_storage().data_ptr()] > 1
        stored[name] = tensor.clone().contiguous() if shared else tensor.contiguous()
    save_file(stored, str(path), metadata={"format": "pt", **aliases})


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """All named tensors, on the CPU, of a file that `tensor_reader.open_tensors` understands.

    Raises CheckpointError when the file is absent, not readable, or holds something other than tensors.
    """
    return dict(open_tensors(path))


@contextlib.contextmanager
def writing(folder: str | Path, step: int, state: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder for the tensors of a step's checkpoint, to which the state is added.

    It has its name, `step_dir(folder, step)`, only once the block has ended and all of it is on the disk.

    Raises CheckpointError when the disk refuses; the checkpoints before it are untouched.
    """
    folder = Path(folder)
    path = step_dir(folder, step)
    try:
        with atomic_dir(path, replace=True) as temporary:
            yield temporary
            (temporary / STATE).write_text(json.dumps({**state, "step": step}, indent=1) + "\n")
    except (OSError, SafetensorError, PartsError) as error:
        kept = [other for _, other in list_checkpoints(folder) if other != path]
        still = f"'{kept[-1]}' is intact" if kept else "there was none before it"
        raise CheckpointError(
            f"could not write checkpoint '{path}': {error}; {still}; make room, or set another run.output_dir"
        ) from error


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of a step from whole tensors; errors and guarantees as of `writing`."""
    with writing(folder, step, state) as temporary:
        save_tensors(temporary / MODEL, model)
        save_tensors(temporary / OPTIMIZER, optimizer)
    return step_dir(Path(folder), step)


def amend_state(checkpoint: str | Path, values: Mapping[str, Any]) -> None:
    """Lay values over the state of a complete checkpoint, whose tensors stay as they are.

    Raises CheckpointError when the disk refuses; the checkpoint is then as it was.
    """
    state = load_state(checkpoint)
    try:
        atomic_write(Path(checkpoint) / STATE, json.dumps({**state, **values}, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"could not add an evaluation to checkpoint '{checkpoint}', which is intact: {error}; make room"
        ) from error


def load_state(checkpoint: str | Path) -> dict[str, Any]:
    """The state.json of a checkpoint folder; CheckpointError when it isn't one."""
    path = Path(checkpoint) / STATE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{checkpoint}' is not a checkpoint folder: {path.name}: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"'{path}' names no step")
    return state


def prune(folder: str | Path, *, keep_last: int, best_step: int | None) -> list[Path]:
    """Remove all checkpoints but the newest `keep_last` and the best; the removed paths.

    A folder loses its name before its contents, so that an interruption leaves no half checkpoint.
    """
    checkpoints = list_checkpoints(folder)
    removed = [path for step, path in checkpoints[:-keep_last] if step != best_step]
    for path in removed:
        doomed = path.with_name(f".tmp-removed-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return removed


def newest(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, None without any."""
    checkpoints = list_checkpoints(Path(run_dir) / FOLDER)
    return checkpoints[-1][1] if checkpoints else None


def clean(run_dir: str | Path) -> list[Path]:
    """Remove what interrupted writes left among a run's checkpoints, and in each of them (`amend_state`)."""
    folder = Path(run_dir) / FOLDER
    removed = remove_leftovers(folder)
    return removed + [path for step in sorted(folder.glob("step_*")) for path in remove_leftovers(step)]


def best_or_newest(run_dir: str | Path) -> Path | None:
    """A run's best checkpoint by its declared metric, else its newest, None without any."""
    last = newest(run_dir)
    best = load_state(last).get("best") if last is not None else None
    if best:
        path = step_dir(Path(run_dir) / FOLDER, int(best["step"]))
        if (path / STATE).is_file():
            return path
    return last


def resolve_checkpoint(path: str | Path) -> Path:
    """The weights file meant by a run's folder (its best, else its newest), a checkpoint's folder, a file, or hub:NAME.

    Of a model in several files it is their index.json.

    Raises CheckpointError naming what was looked for.
    """
    path = local_folder(str(path)) if str(path).startswith(PREFIX) else Path(path).expanduser()
    if path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(
            f"no checkpoint at '{path}': give a run's folder, a checkpoint's, or a weights file (a run that builds on "
            "another one's needs that one first)"
        )
    for name in (MODEL, PARTS, *FOREIGN):
        if (path / name).is_file():
            return path / name
    found = best_or_newest(path)
    if found is None:
        raise CheckpointError(f"'{path}' holds neither {MODEL} nor a complete checkpoint in {FOLDER}/")
    return weights_file(found)


def is_better(value: float, best: float | None, mode: str) -> bool:
    """Whether a metric improves on the best so far; a value that is not finite never does."""
    if not math.isfinite(value):
        return False
    return best is None or (value > best if mode == "max" else value < best)

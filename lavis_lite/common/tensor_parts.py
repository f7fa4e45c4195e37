"""Tensors of which each process writes and keeps its own part, by torch.distributed.checkpoint.

A folder holds .metadata, the index of all parts, and a file or more of each process. It may be read by any number of
processes, one too, tensor by tensor. torch.distributed.checkpoint takes most of a second to import: only where used.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor

from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.tensor_reader import TensorStore

PARTS = ".metadata"
SUFFIX = ".distcp"
TIED = "tied.json"
# So much is read at once.
READ_BYTES = 256 * 2**20
# What the names of a checkpoint's tensors begin with.
MODEL_PARTS, OPTIMIZER_PARTS = "model/", "optimizer/"


class PartsError(Exception):
    """A process couldn't write or read its part; which, and why, in one line."""


def parts_writer(
    folder: Path, tensors: Mapping[str, Tensor], group: torch_dist.ProcessGroup, *, background: bool
) -> Callable[[], object]:
    """What writes a folder of parts and returns once all processes have written theirs.

    Every process of the group calls this and the result. What several hold whole is written by one of them.

    Args:
        tensors: by full name; DTensors, of which this process has a part, or whole ones.
        group: of gloo, and used for nothing else: a write in the background has exchanges of its own.
        background: copy the tensors and begin now, so that they may change before the result is called.

    The result raises PartsError, on every process, when one couldn't write.
    """
    import torch.distributed.checkpoint as dcp

    write: Callable[[], object]
    if background:
        with _in_one_line():
            write = cast(
                "Any", dcp.async_save(dict(tensors), checkpoint_id=folder, process_group=group)
            ).result
    else:
        write = partial(dcp.save, dict(tensors), checkpoint_id=folder, process_group=group)
    return _in_one_line()(write)


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """torch's error is no Exception, and tells of all processes with their tracebacks."""
    import torch.distributed.checkpoint as dcp

    try:
        yield
    except dcp.CheckpointException as error:
        told = (f"process {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        raise PartsError("; ".join(told)) from error


def write_tied(folder: Path, tied: Mapping[str, str]) -> None:
    """Note in a folder of parts which names, besides those stored, share the tensor of which stored name."""
    if tied:
        (folder / TIED).write_text(json.dumps(tied, indent=1) + "\n")


class StoredParts(TensorStore):
    """The tensors of a folder of parts whose names begin in one way, put together when they are asked for.

    Args:
        folder: of `parts_writer`; the index in it is a pickle: as with any program, run only what you trust.
        kind: `MODEL_PARTS` or `OPTIMIZER_PARTS`.

    Raises CheckpointError when the index or a part can't be read.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, folder: Path, kind: str) -> None:
        import torch.distributed.checkpoint as dcp

        self.folder, self.kind = folder, kind
        self._reader = dcp.FileSystemReader(folder)
        try:
            self._kept = self._reader.read_metadata().state_dict_metadata
        except Exception as error:  # the index is a pickle, whose faults are of any kind
            raise CheckpointError(
                f"'{folder / PARTS}' is no index of a checkpoint's parts: {error}"
            ) from error
        self._names = [key.removeprefix(kind) for key in self._kept if key.startswith(kind)]
        self._stored = {name: name for name in self._names} | self._tied()
        self._at_hand: dict[str, Tensor] = {}

    def _tied(self) -> dict[str, str]:
        path = self.folder / TIED
        try:
            tied = dict(json.loads(path.read_text())) if path.is_file() else {}
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"'{path}' can't be read: {error}") from error
        return {name: stored for name, stored in tied.items() if stored in self._names}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        if stored not in self._at_hand:
            self._at_hand = self._read_from(stored)
        return self._at_hand[stored]

    def _read_from(self, first: str) -> dict[str, Tensor]:
        """A tensor and those after it, to READ_BYTES: torch plans a read anew for all names, however few it is for."""
        import torch.distributed.checkpoint as dcp

        tensors: dict[str, Tensor] = {}
        room = READ_BYTES
        for name in self._names[self._names.index(first) :]:
            room -= self.spec(name).nbytes
            if room < 0 and tensors:
                break
            tensors[name] = torch.empty_like(self.spec(name), device="cpu")
        try:
            with _in_one_line(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                wanted: dict[str, Any] = {self.kind + name: tensor for name, tensor in tensors.items()}
                dcp.load(wanted, storage_reader=self._reader, no_dist=True)
        except (PartsError, OSError) as error:
            raise CheckpointError(f"'{self.folder}': the parts of {first} can't be read: {error}") from error
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def spec(self, name: str) -> Tensor:
        """Shape and element type, from the index alone."""
        kept: Any = self._kept[self.kind + self._stored[name]]
        return torch.empty(kept.size, dtype=kept.properties.dtype, device="meta")

    def owner(self, name: str) -> Hashable:
        """The name under which the tensor is stored."""
        return self.folder, self._stored[name]

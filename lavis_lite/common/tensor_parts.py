"""Tensors of which each process writes and keeps its own part, by torch.distributed.checkpoint.

A folder holds .metadata, the index of all parts, and a file or more of each process. It may be read by any number of
processes, one too, tensor by tensor. torch.distributed.checkpoint takes most of a second to import: only where used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickle
import warnings
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.tensor_reader import TensorStore

PARTS = ".metadata"
SUFFIX = ".distcp"
TIED = "tied.json"
# What the names of a checkpoint's tensors begin with.
MODEL_PARTS, OPTIMIZER_PARTS = "model/", "optimizer/"
# How torch's zip writer and reader say that a file isn't as long, or not what, it should be.
ZIP_ERRORS = ("PytorchStream", "inline_container")
# All that an index is made of, beside the names of element types. It is a pickle, which could else run anything.
INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
}


class PartsError(Exception):
    """A process couldn't write or read its part; which, and why, in one line."""


def write_parts(
    folder: Path, tensors: Mapping[str, Tensor], group: torch_dist.ProcessGroup
) -> Mapping[str, int]:
    """Write this process's part into a folder, and wait until all processes of a group have written theirs.

    Args:
        tensors: by full name; DTensors, of which this process has a part, or whole ones that it is to write.
        group: of gloo, and used for nothing else while this goes on.

    Returns: the files of all processes, and how many bytes each has at least.
    Raises PartsError, on every process, when the disk of one refuses.
    """
    import torch.distributed.checkpoint as dcp

    class Writer(dcp.FileSystemWriter):
        def write_data(self, *args: Any, **kwargs: Any) -> Any:
            # Here: what an error came of doesn't travel to the other processes.
            with _disk_errors_as_such():
                return super().write_data(*args, **kwargs)

    with _in_one_line():
        index = dcp.save(dict(tensors), storage_writer=Writer(folder), process_group=group)
    files: dict[str, int] = {}
    places: Mapping[Any, Any] = index.storage_data or {}
    for place in places.values():
        end = place.offset + place.length
        files[place.relative_path] = max(files.get(place.relative_path, 0), end)
    return files


def check_parts(folder: Path, files: Mapping[str, int]) -> None:
    """Raise PartsError where a file that `write_parts` named isn't here, or is shorter."""
    for name, size in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size < size:
            raise PartsError(
                f"{name} isn't here as written: all machines must see run.output_dir as one folder"
            )


@contextlib.contextmanager
def _disk_errors_as_such() -> Iterator[None]:
    """torch's zip writer closes its file after one, finds it shorter than it should be, and raises only that."""
    try:
        yield
    except RuntimeError as error:
        behind = error.__cause__ or error.__context__
        while behind is not None and not isinstance(behind, OSError):
            behind = behind.__cause__ or behind.__context__
        if behind is None:
            raise
        raise OSError(behind.errno, behind.strerror) from error


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """torch's error is no Exception, tells of all processes with their tracebacks, and hides other kinds of error."""
    import torch.distributed.checkpoint as dcp

    try:
        yield
    except dcp.CheckpointException as error:
        failures = {rank: failure[0] for rank, failure in sorted(error.failures.items())}
        for kind in (KeyboardInterrupt, SystemExit):
            if any(isinstance(failure, kind) for failure in failures.values()):
                raise kind from error
        if not all(_is_of_disk(failure) for failure in failures.values()):
            raise RuntimeError(f"torch.distributed.checkpoint failed: {failures}") from error
        told = (f"process {rank}: {_first_line(failure)}" for rank, failure in failures.items())
        raise PartsError("; ".join(told)) from error


def _is_of_disk(failure: BaseException) -> bool:
    return isinstance(failure, OSError) or (
        isinstance(failure, RuntimeError) and any(words in str(failure) for words in ZIP_ERRORS)
    )


def _first_line(failure: BaseException) -> str:
    return str(failure).strip().split("\n")[0] or type(failure).__name__


def write_tied(folder: Path, tied: Mapping[str, str]) -> None:
    """Note in a folder of parts which names, besides those stored, share the tensor of which stored name."""
    if tied:
        (folder / TIED).write_text(json.dumps(tied, indent=1) + "\n")


class StoredParts(TensorStore):
    """The tensors of a folder of parts whose names begin in one way, each put together when it is asked for.

    Args:
        folder: of `write_parts`.
        kind: `MODEL_PARTS` or `OPTIMIZER_PARTS`.

    Raises CheckpointError when the index or a part can't be read.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        try:
            self._index = _IndexUnpickler(io.BytesIO((folder / PARTS).read_bytes())).load()
            places = self._index.storage_data.items()
            self._kept: Mapping[str, Any] = self._index.state_dict_metadata
        except Exception as error:  # a pickle's faults are of any kind
            raise CheckpointError(
                f"'{folder / PARTS}' is no index of a checkpoint's parts: {error}"
            ) from error
        self._places: dict[str, dict[Any, Any]] = {}
        for part, place in places:
            self._places.setdefault(part.fqn, {})[part] = place
        names = [key.removeprefix(kind) for key in self._kept if key.startswith(kind)]
        self._stored = {name: name for name in names} | self._tied(names)

    def _tied(self, names: list[str]) -> dict[str, str]:
        path = self.folder / TIED
        try:
            tied = dict(json.loads(path.read_text())) if path.is_file() else {}
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"'{path}' can't be read: {error}") from error
        return {name: stored for name, stored in tied.items() if stored in names}

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty_like(self.spec(name), device="cpu")
        key = self.kind + self._stored[name]
        try:
            with _in_one_line(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                self._read(key, tensor)
        except (PartsError, OSError) as error:
            raise CheckpointError(f"'{self.folder}': the parts of {name} can't be read: {error}") from error
        return tensor

    def _read(self, key: str, into: Tensor) -> None:
        import torch.distributed.checkpoint as dcp

        # Of the whole index torch makes a plan at every call, which takes longer than to read a tensor.
        own = dataclasses.replace(
            self._index,
            state_dict_metadata={key: self._kept[key]},
            storage_data=self._places[key],
            planner_data={key: (key,)},
        )

        class Reader(dcp.FileSystemReader):
            def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
                return own

        dcp.load({key: into}, storage_reader=Reader(self.folder), no_dist=True)

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


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"an index has no use for {module}.{name}")
        return super().find_class(module, name)

"""Weight files of any size read tensor by tensor: their shapes are known before a byte of them is read.

Understood: .safetensors, torch's .pth/.pt/.bin (`weights_only`, so that nothing in them is run), the index.json of a
model in several such files, and the .metadata of a checkpoint that several processes wrote (`tensor_parts`).
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lavis_lite.common.errors import CheckpointError

# Names of the element types in a safetensors header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ALIAS = "alias:"  # in a file's metadata: a name that shares the tensor of another
# Pages of a mapped file count as this process's memory until they are unmapped: start anew after so many bytes.
REMAP_BYTES = 64 * 2**20


class TensorStore(Mapping[str, Tensor]):
    """Named tensors, each read on the CPU when it is asked for.

    metadata: texts by name that came with the tensors.
    """

    metadata: Mapping[str, str]

    def spec(self, name: str) -> Tensor:
        """A tensor without values, on the meta device, of the shape and element type of `name`."""
        raise NotImplementedError

    def owner(self, name: str) -> Hashable:
        """Equal for names that share one tensor, such as tied weights."""
        return name


class SafetensorsFile(TensorStore):
    """One .safetensors file; CheckpointError when it isn't a complete one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handed_out = 0
        self._file = self._open()
        metadata = self._file.metadata() or {}
        self._stored = {name: name for name in self._file.keys()}  # noqa: SIM118  # not a dict
        self._stored |= {k.removeprefix(ALIAS): v for k, v in metadata.items() if k.startswith(ALIAS)}
        self.metadata = {key: value for key, value in metadata.items() if not key.startswith(ALIAS)}

    def __getitem__(self, name: str) -> Tensor:
        if self._handed_out > REMAP_BYTES:
            self._file, self._handed_out = self._open(), 0
        tensor: Tensor = self._file.get_tensor(self._stored[name])
        self._handed_out += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def spec(self, name: str) -> Tensor:
        """Shape and element type, from the header alone."""
        part = self._file.get_slice(self._stored[name])
        kind = part.get_dtype()
        if kind not in DTYPES:
            raise CheckpointError(f"'{self.path}': {name} has elements of unknown type {kind}")
        return torch.empty(part.get_shape(), dtype=DTYPES[kind], device="meta")

    def owner(self, name: str) -> Hashable:
        """The name under which the tensor is stored in this file."""
        return self.path, self._stored[name]

    def _open(self) -> Any:
        try:
            return safe_open(str(self.path), framework="pt").__enter__()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"'{self.path}' is not a complete safetensors file: {error}") from error


class TorchFile(TensorStore):
    """One file of torch.save, mapped and not read; its tensors may lie below "model" or "state_dict".

    A file older than torch 1.6 can't be mapped and is read whole.

    Raises CheckpointError when it can't be read as weights only, or holds something other than tensors.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = True
        self._handed_out = 0
        self._tensors = self._load()
        self._owners = {name: _place(name, tensor) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        if self._mapped and self._handed_out > REMAP_BYTES:
            self._tensors, self._handed_out = self._load(), 0
        self._handed_out += self._tensors[name].nbytes
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def spec(self, name: str) -> Tensor:
        """Shape and element type; reads nothing."""
        return torch.empty_like(self._tensors[name], device="meta")

    def owner(self, name: str) -> Hashable:
        """The place in the file, which tied weights share."""
        return self.path, self._owners[name]

    def _load(self) -> dict[str, Tensor]:
        try:
            content = self._read()
        except Exception as error:  # torch raises errors of many kinds for files that are none of its own
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"'{self.path}' can't be read as weights only: {first}") from error
        for key in ("model", "state_dict"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(f"'{self.path}' holds no mapping of names to tensors")
        return dict(content)

    def _read(self) -> Any:
        if self._mapped:
            try:
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                self._mapped = False
        return torch.load(self.path, map_location="cpu", weights_only=True)


def _place(name: str, tensor: Tensor) -> Hashable:
    if not tensor.numel():  # has no place of its own
        return name
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


class ShardedFiles(TensorStore):
    """A model in several files, by its index.json: {"weight_map": {name: file}}.

    Raises CheckpointError for an index that can't be read, names no files, or disagrees with them.
    """

    def __init__(self, index: Path) -> None:
        try:
            self._file_of = dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"'{index}' is not the index of a model in several files: {error}"
            ) from error
        names = sorted(set(self._file_of.values()))
        # An index may only name its neighbours.
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise CheckpointError(f"'{index}' names no files, or files in other folders")
        self._files = {name: open_tensors(index.with_name(name)) for name in names}
        for name, file in self._file_of.items():
            if name not in self._files[file]:
                raise CheckpointError(f"'{index}' says that '{file}' holds {name}, which it doesn't")
        self.metadata = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._file_of[name]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def spec(self, name: str) -> Tensor:
        """Shape and element type in the file that holds it."""
        return self._files[self._file_of[name]].spec(name)

    def owner(self, name: str) -> Hashable:
        """The owner in the file that holds it."""
        return self._files[self._file_of[name]].owner(name)


def open_tensors(path: str | Path) -> TensorStore:
    """The named tensors of a weights file or of an index; CheckpointError when it can't be read."""
    from lavis_lite.common.tensor_parts import MODEL_PARTS, PARTS, StoredParts

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no weights file at '{path}'")
    if path.name == PARTS:
        return StoredParts(path.parent, MODEL_PARTS)
    if path.suffix == ".json":
        return ShardedFiles(path)
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def first_of(names: Sequence[str], count: int = 5) -> str:
    """The first names of a list for a message, and how many more there are."""
    more = len(names) - count
    return ", ".join(names[:count]) + (f", and {more} more" if more > 0 else "")

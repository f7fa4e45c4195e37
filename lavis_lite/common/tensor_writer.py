"""A safetensors file written tensor by tensor; the library's own writer wants all of them in memory at once.

The container, after https://github.com/huggingface/safetensors#format:

    8 bytes    length N of the header, little endian
    N bytes    JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}},
               filled up with blanks to a multiple of 8
    the rest   the tensors' bytes, one after the other, row-major, little endian, without holes
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.io import atomic_file
from lavis_lite.common.tensor_reader import ALIAS, DTYPES, TensorStore

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(
    path: str | Path, tensors: TensorStore, *, metadata: Mapping[str, str], tie: bool = True
) -> int:
    """Write all tensors of a store, holding one at a time; the file has its name only once it is complete.

    Args:
        tie: store tied tensors once and name them again in the metadata, as `checkpoint.save_tensors` does;
            otherwise they are written as often as they are named, which any reader understands.

    Returns: bytes written. Raises CheckpointError for an element type the format has no name for, OSError when
    the disk refuses.
    """
    aliases = _aliases(tensors) if tie else {}
    specs = {name: tensors.spec(name) for name in tensors if name not in aliases}
    # Wide elements first, so that every tensor begins at a multiple of its element's size.
    order = sorted(specs, key=lambda name: (-specs[name].element_size(), name))
    notes = {"format": "pt", **metadata, **{ALIAS + name: owner for name, owner in aliases.items()}}
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(_header({name: specs[name] for name in order}, notes))
        for name in order:
            file.write(_bytes(tensors[name], specs[name], name))
        return file.tell()


def _aliases(tensors: TensorStore) -> dict[str, str]:
    first: dict[object, str] = {}
    return {name: other for name in tensors if (other := first.setdefault(tensors.owner(name), name)) != name}


def _header(specs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, spec in specs.items():
        if spec.dtype not in _NAMES:
            raise CheckpointError(f"{name}: safetensors has no name for elements of type {spec.dtype}")
        begin, end = end, end + spec.nbytes
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor, spec: Tensor, name: str) -> Any:
    """What a file's `write` takes, without a copy of a contiguous tensor."""
    assert (tensor.shape, tensor.dtype) == (spec.shape, spec.dtype), f"{name} is not as announced"
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()

"""One text for equal things: what a cache's key is made of."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What every module has, whatever it computes.
MODULE_STATE = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}


def describe(thing: Any) -> str:
    """A canonical text of an object's class and whole state, equal for objects that were made alike.

    Numbers, texts, containers, arrays and tensors by their content; functions and classes by their name; any other
    object by its class and its attributes. An object within itself is named by its class alone.
    """
    return _describe(thing, ())


def digest(text: str, length: int = 16) -> str:
    """So many hexadecimal digits that stand for a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def tensors_digest(tensors: Mapping[str, Tensor], length: int = 16) -> str:
    """So many hexadecimal digits that stand for named tensors: names, types, shapes and every bit."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        # A copy: memory that numpy has looked at can't be given back any more, as sharding does with gathered weights.
        tensor = tensors[name].detach().to("cpu", copy=True).contiguous()
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()[:length]


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """The checksum of a file's content, which is never in memory as a whole."""
    state = hashlib.new(algorithm)
    with path.open("rb") as file:
        # hashlib.file_digest is there from Python 3.11 on.
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def _describe(thing: Any, outside: tuple[int, ...]) -> str:
    name = _name(type(thing))
    if id(thing) in outside:
        return f"<{name}>"
    inside = (*outside, id(thing))
    if isinstance(thing, enum.Enum) or thing is None or isinstance(thing, (bool, int, float, str, bytes)):
        return str(thing) if isinstance(thing, enum.Enum) else repr(thing)
    if isinstance(thing, Tensor):
        return f"tensor({tensors_digest({'': thing}, 64)})"
    if isinstance(thing, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(thing).tobytes()).hexdigest()
        return f"array({thing.dtype}, {thing.shape}, {content})"
    if isinstance(thing, Mapping):
        return "{" + _pairs(thing, inside) + "}"
    if isinstance(thing, (list, tuple)):
        return "[" + ", ".join(_describe(item, inside) for item in thing) + "]"
    if isinstance(thing, (set, frozenset)):
        return "{" + ", ".join(sorted(_describe(item, inside) for item in thing)) + "}"
    if hasattr(thing, "__qualname__"):
        return _name(thing)
    if not hasattr(thing, "__dict__"):
        # Such as a dtype, whose text says it all; an address would differ from process to process.
        return name if type(thing).__repr__ is object.__repr__ else repr(thing)
    hidden = MODULE_STATE if isinstance(thing, nn.Module) else frozenset()
    state = {key: value for key, value in vars(thing).items() if key not in hidden}
    return f"{name}({_pairs(state, inside)})"


def _pairs(mapping: Mapping[Any, Any], outside: tuple[int, ...]) -> str:
    pairs = {_describe(key, outside): _describe(value, outside) for key, value in mapping.items()}
    return ", ".join(f"{key}: {pairs[key]}" for key in sorted(pairs))


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"

"""Tensors into a module by name, where whatever doesn't agree is an error that names it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.tensor_reader import first_of


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], *, source: str, optional: Iterable[str] = ()
) -> None:
    """Copy tensors into a module's parameters and buffers; every name and shape must agree.

    Weights that are tied here and differ in `tensors` are untied (FlanT5's output layer: transformers 5 builds every
    T5 tied). A name may be missing when the one it is tied to is there.

    Args:
        source: what the tensors come from, for messages.
        optional: regular expressions of names that may be missing: all that one matches, or none. What is trained
            and what is frozen count apart, so that a frozen model's few trained weights may come alone.

    Raises CheckpointError listing the first names that don't agree; the module is then unchanged.
    """
    own = module.state_dict()
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} here {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    missing = _missing(module, own, tensors, optional)
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    problems = [f"{len(names)} {kind}: {first_of(names)}" for kind, names in kinds if names]
    if problems:
        raise CheckpointError(f"{source} does not fit this model: {'; '.join(problems)}")
    _untie(module, tensors)
    module.load_state_dict(dict(tensors), strict=False)


def _missing(
    module: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], optional: Iterable[str]
) -> list[str]:
    patterns = [re.compile(pattern) for pattern in optional]
    tied = _tied(module)
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    groups = {name: _group(name, patterns, name in trained) for name in own}
    begun = {groups[name] for name in own if name in tensors}
    return [
        name
        for name in own
        if name not in tensors
        and (groups[name] is None or groups[name] in begun)
        and not any(other in tensors for other in tied.get(name, ()))
    ]


def _group(name: str, patterns: list[re.Pattern[str]], trained: bool) -> tuple[str, bool] | None:
    found = next((p.pattern for p in patterns if p.search(name)), None)
    return None if found is None else (found, trained)


def _tied(module: nn.Module) -> dict[str, list[str]]:
    """Names of one parameter, under each of them; only where there are several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: several for several in names.values() if len(several) > 1 for name in several}


def _untie(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, (first, *_) in _tied(module).items():
        if name == first or name not in tensors or first not in tensors:
            continue
        if not torch.equal(tensors[name], tensors[first]):
            parent, _, leaf = name.rpartition(".")
            parameter = module.get_parameter(name)
            apart = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(module.get_submodule(parent), leaf, apart)

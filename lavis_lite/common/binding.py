"""Checks a mapping against the signature it is meant for: signature = schema = documentation."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Union

from lavis_lite.common.errors import ConfigError, closest


def bind(
    target: Callable[..., Any],
    mapping: Mapping[str, Any] | None,
    *,
    where: str,
    skip: Collection[str] = (),
) -> dict[str, Any]:
    """Keyword arguments for `target` made from `mapping`, checked by name and by annotated type.

    Args:
        target: a function, class or dataclass.
        mapping: the configured keywords; None counts as empty.
        where: the YAML path of the mapping, for messages.
        skip: keys of the mapping that belong to somebody else.

    Returns: the checked keywords; ints where floats are declared become floats, lists become declared tuples,
    mappings become declared dataclasses.

    Raises ConfigError: an unknown key (with the nearest valid one), a missing one, a value of the wrong type.
    """
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected keys and values, got {_show(mapping)}")
    parameters = _keywords(target)
    hints = _hints(target)
    keywords: dict[str, Any] = {}
    for key, value in mapping.items():
        if key in skip:
            continue
        if key not in parameters:
            valid = [*parameters, *skip]
            hint = closest(str(key), valid) or f"valid keys: {', '.join(sorted(valid)) or 'none'}"
            raise ConfigError(f"unknown key '{where}.{key}'; {hint}")
        keywords[key] = _convert(value, hints.get(key, Any), f"{where}.{key}")
    missing = [
        name
        for name, p in parameters.items()
        if p.default is inspect.Parameter.empty and name not in keywords
    ]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(f'{where}.{name}' for name in missing)}")
    return keywords


def _keywords(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in inspect.signature(target).parameters.items() if p.kind in kinds}


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    owner = target.__init__ if inspect.isclass(target) and not dataclasses.is_dataclass(target) else target
    try:
        return typing.get_type_hints(owner)
    except (NameError, TypeError):
        # A name imported for type checking only: such a signature is checked by key alone.
        return {}


def _convert(value: Any, annotation: Any, where: str) -> Any:
    """`value` as `annotation` declares it, or ConfigError."""
    if annotation in (Any, inspect.Parameter.empty):
        return value
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(value, typing.get_args(annotation), where)
    if origin is Literal:
        return _convert_literal(value, typing.get_args(annotation), where)
    if annotation is None or annotation is type(None):
        if value is None:
            return None
        raise ConfigError(f"{where}: expected nothing (null), got {_show(value)}")
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return value if isinstance(value, annotation) else annotation(**bind(annotation, value, where=where))
    if origin in (list, tuple, collections.abc.Sequence, collections.abc.Collection) or annotation in (
        list,
        tuple,
    ):
        return _convert_sequence(value, origin or annotation, typing.get_args(annotation), where)
    if origin in (dict, collections.abc.Mapping) or annotation in (dict, Mapping):
        return _convert_mapping(value, typing.get_args(annotation), where)
    return _convert_scalar(value, annotation, where)


def _convert_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    messages = []
    for option in options:
        try:
            return _convert(value, option, where)
        except ConfigError as error:
            messages.append(str(error))
    named = [option for option in options if option is not type(None)]
    # With one real alternative its own message is the precise one; with several, the list is.
    if len(named) == 1:
        raise ConfigError(messages[options.index(named[0])])
    raise ConfigError(
        f"{where}: expected {' or '.join(_name(option) for option in options)}, got {_show(value)}"
    )


def _convert_literal(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if value in options and not (isinstance(value, bool) and True not in options and False not in options):
        return value
    hint = closest(str(value), [str(option) for option in options])
    raise ConfigError(
        f"{where}: {_show(value)} is not one of {', '.join(str(option) for option in options)}"
        + (f"; {hint}" if hint else "")
    )


def _convert_sequence(value: Any, kind: Any, items: tuple[Any, ...], where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected a list, got {_show(value)}")
    if kind is tuple and items and items[-1] is not Ellipsis:
        if len(value) != len(items):
            raise ConfigError(f"{where}: expected {len(items)} values, got {_show(value)}")
        return tuple(
            _convert(v, t, f"{where}[{i}]") for i, (v, t) in enumerate(zip(value, items, strict=True))
        )
    item = items[0] if items else Any
    converted = [_convert(v, item, f"{where}[{i}]") for i, v in enumerate(value)]
    return tuple(converted) if kind is tuple else converted


def _convert_mapping(value: Any, items: tuple[Any, ...], where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected keys and values, got {_show(value)}")
    item = items[1] if len(items) == 2 else Any
    return {key: _convert(v, item, f"{where}.{key}") for key, v in value.items()}


def _convert_scalar(value: Any, annotation: Any, where: str) -> Any:
    if annotation is bool and isinstance(value, bool):
        return value
    if annotation is int and not isinstance(value, bool):
        # 1e4 is a float in YAML and a whole number to people.
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            return int(value)
    elif annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif annotation is str and isinstance(value, str):
        return value
    elif annotation is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif annotation not in (bool, int, float, str, Path) and (
        not isinstance(annotation, type) or isinstance(value, annotation)
    ):
        return value
    raise ConfigError(f"{where}: expected {_name(annotation)}, got {_show(value)}")


def _name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is Literal:
        return " or ".join(repr(option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) is not None:
        return str(annotation).replace("typing.", "").replace("collections.abc.", "")
    return getattr(annotation, "__name__", str(annotation))


def _show(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"

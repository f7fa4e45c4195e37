"""Paths in a model's section, so that what a run saves means the same from any working directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lavis_lite.common.config import Config

# Keys that may name a file or folder, with the names that mean something else even where a folder is called so.
MODEL_PATHS: dict[str, tuple[str, ...]] = {
    "pretrained": (),
    "tokenizer": ("shapes",),
    "qformer_text_from": (),
    "qformer.pretrained": (),
    "vision_encoder.pretrained": (),
    "language_model.model_name": ("shapes_opt", "shapes_t5"),
}


def with_absolute_paths(cfg: Config) -> Config:
    """A configuration whose model names by absolute paths what lies on this machine; other names stay as they are."""
    return replace(cfg, model=absolute_paths(cfg.model))


def absolute_paths(model: Any, *, existing: bool = True) -> Any:
    """A `model` section with its relative paths made absolute.

    existing: false for comparing sections, also where what one of them named is there no longer; names of the hub
        then look like paths, too. Of what is no mapping nothing changes.
    """
    for key, names in MODEL_PATHS.items():
        value = _at(model, key)
        if value is not None:
            model = _replaced(model, key.split("."), _absolute(value, names, existing))
    return model


def as_moved(saved: Any, now: Any) -> Any:
    """A saved `model` section with the paths that the present one has, where all has moved to another folder.

    That is where what was saved is there no longer and ends with the relative path that is configured.
    """
    for key in MODEL_PATHS:
        old, new = _at(saved, key), _at(now, key)
        if old is None or new is None or os.path.isabs(new) or os.path.exists(old):
            continue
        if old.endswith(os.sep + os.path.normpath(new)):
            saved = _replaced(saved, key.split("."), new)
    return saved


def _at(section: Any, key: str) -> str | None:
    for name in key.split("."):
        section = section.get(name) if isinstance(section, Mapping) else None
    return section if isinstance(section, str) else None


def _replaced(section: Mapping[str, Any], keys: list[str], value: str) -> dict[str, Any]:
    return {**section, keys[0]: _replaced(section[keys[0]], keys[1:], value) if keys[1:] else value}


def _absolute(value: str, names: tuple[str, ...], existing: bool) -> str:
    if not value or value in names or value.startswith("~"):
        return value
    # Links stay: what they point to need not have the suffix that tells a file's kind.
    return os.path.abspath(value) if not existing or os.path.exists(value) else value

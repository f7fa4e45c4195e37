"""One split of a dataset that a command names: a preset, or an entry of a file's `datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lite.common.config import (
    PRESETS,
    check_removed,
    dataset_section,
    merge,
    parse_options,
    read_project,
)
from lavis_lite.common.errors import ConfigError, closest
from lavis_lite.datasets.builders import SPLITS, build_datasets


def preset_names() -> list[str]:
    """The datasets that ship with a preset."""
    return sorted(path.stem for path in (PRESETS / "datasets").glob("*.yaml"))


def named_section(name: str, options: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """(name, section) of a preset, or of the one dataset of a YAML file; options as of `datasets.<name>.<key>=<value>`.

    Raises ConfigError for an unknown name, and for a file with several datasets or none.
    """
    datasets: Mapping[str, Any] = {name: {}}
    if name.endswith((".yaml", ".yml")):
        datasets = read_project(Path(name)).get("datasets") or {}
        if len(datasets) != 1:
            found = ", ".join(datasets) or "none"
            raise ConfigError(
                f"{name}: one dataset is wanted under `datasets:`, found: {found}; name a file with one"
            )
    elif name not in preset_names():
        hint = closest(name, preset_names()) or f"presets: {', '.join(preset_names())}"
        raise ConfigError(f"no dataset preset '{name}' and no YAML file; {hint}")
    check_removed(datasets)
    (chosen, section), *_ = datasets.items()
    given = parse_options(options).get("datasets") or {}
    unknown = [key for key in given if key != chosen]
    if unknown or len(parse_options(options)) > bool(given):
        raise ConfigError(f"options here are of the form datasets.{chosen}.<key>=<value>")
    if chosen in given and given[chosen] is None:
        raise ConfigError(f"datasets.{chosen}=null leaves no dataset")
    laid = merge({chosen: section}, given)[chosen]
    return chosen, dataset_section(chosen, laid)


def only_split(section: Mapping[str, Any], split: str) -> dict[str, Any]:
    """A section without its other splits, so that their files needn't be there.

    A builder whose splits are no mappings (such as the numbers of pictures that `shapes` draws) keeps them.
    """
    others = [name for name in SPLITS if name != split and isinstance(section.get(name), (Mapping, list))]
    return {**section, **dict.fromkeys(others)}


def build_named_split(name: str, split: str, options: Sequence[str] = ()) -> Any:
    """One split of a dataset, see `named_section`. Raises ConfigError and DataError."""
    chosen, section = named_section(name, options)
    if split not in SPLITS:
        raise ConfigError(f"no split '{split}'; splits: {', '.join(SPLITS)}")
    if not section.get(split):
        there = ", ".join(name for name in SPLITS if section.get(name))
        raise ConfigError(f"dataset '{chosen}' has no split '{split}'; splits: {there}")
    return build_datasets({chosen: only_split(section, split)})[chosen][split]

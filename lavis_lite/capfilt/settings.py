"""What is asked of CapFilt: everything that decides which captions a picture ends up with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lavis_lite.common.binding import bind
from lavis_lite.common.config import PRESETS, read_yaml
from lavis_lite.common.errors import ConfigError, closest
from lavis_lite.common.model_recipe import is_run

FOLDER = PRESETS / "capfilt"
HUGGING_FACE = "hf"


@dataclass(frozen=True)
class Settings:
    """How captions are made, ranked and kept.

    captioner: NAME/TYPE[:CHECKPOINT] or a run's folder of ours, or hf:NAME, an image-to-text model of transformers (hub
        or folder).
    ranker: NAME/TYPE[:CHECKPOINT] or a run's folder of ours with ITC, or hf:NAME, a CLIP of transformers.
    rank_by: itc, the cosine; itm, the probability of a match (ours only).
    num_captions: sampled for a picture. keep: so many of them and the web's own stay.
    top_p, temperature: of nucleus sampling. min_length, max_length: of a caption, in new tokens.
    prompt: what the captioner goes on from; None: its own. seed: of the sampling.
    """

    captioner: str
    ranker: str
    rank_by: Literal["itc", "itm"] = "itc"
    num_captions: int = 10
    keep: int = 2
    top_p: float = 0.9
    temperature: float = 1.0
    min_length: int = 5
    max_length: int = 20
    prompt: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "num_captions must be at least 1": self.num_captions >= 1,
            "keep must be at least 1": self.keep >= 1,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "temperature must be above 0": self.temperature > 0,
            "min_length must be from 0 to max_length": 0 <= self.min_length <= self.max_length,
            "max_length must be at least 1": self.max_length >= 1,
        }
        for rule, holds in checks.items():
            if not holds:
                raise ConfigError(f"capfilt: {rule} (--{rule.split()[0].replace('_', '-')})")
        for role in ("captioner", "ranker"):
            parse_model(getattr(self, role), role)


@dataclass(frozen=True)
class ModelName:
    """A model as the command line names it: ours, as of `model_recipe`, or one of transformers."""

    name: str
    checkpoint: str | None = None
    ours: bool = True


def parse_model(text: str, role: str) -> ModelName:
    """The model meant by NAME/TYPE[:CHECKPOINT], a run's folder or hf:NAME; ConfigError for anything else."""
    if text.startswith(f"{HUGGING_FACE}:") and len(text) > len(HUGGING_FACE) + 1:
        return ModelName(text.removeprefix(f"{HUGGING_FACE}:"), ours=False)
    if is_run(text):
        return ModelName(text)
    model, _, checkpoint = text.partition(":")
    name, slash, model_type = model.partition("/")
    if not (name and slash and model_type):
        raise ConfigError(
            f"--{role} '{text}': give NAME/TYPE[:CHECKPOINT], e.g. blip2/shapes:output/pretrain_stage1, a run's "
            "folder, or hf:NAME, a model of transformers by its hub name or folder"
        )
    return ModelName(model, checkpoint or None)


def load_settings(preset: str | None, given: Mapping[str, Any]) -> Settings:
    """The values given, laid over a preset's.

    preset: a name in configs/capfilt, or a YAML file of one's own with the fields of `Settings`.
    Raises ConfigError: no such preset, an unknown field, a value out of range.
    """
    values = {**(read_yaml(_preset_file(preset)) if preset else {}), **given}
    for role in ("captioner", "ranker"):
        if not values.get(role):
            raise ConfigError(f"name a model with --{role}, or a --preset: {', '.join(_presets())}")
    return Settings(**bind(Settings, values, where="capfilt"))


def differences(settings: Settings, before: Mapping[str, Any]) -> str:
    """The fields in which earlier settings differ, in words; empty when they are the same."""
    now = dataclasses.asdict(settings)
    return ", ".join(
        f"{key} was {before.get(key)!r}, now {now[key]!r}" for key in now if before.get(key) != now[key]
    )


def _presets() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _preset_file(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if name not in _presets():
        hint = closest(name, _presets()) or f"presets: {', '.join(_presets())}"
        raise ConfigError(f"--preset '{name}': there is none of that name; {hint}; or give a .yaml file")
    return FOLDER / f"{name}.yaml"

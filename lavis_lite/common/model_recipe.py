"""How to build the model that somebody names, and how to prepare what it reads: a preset's, or a run's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavis_lite.common.config import import_file, load_model_preset, merge, read_yaml
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry

CONFIG_FILE = "config.yaml"  # what a run leaves in its folder


@dataclass(frozen=True)
class ModelRecipe:
    """model: a `model` section with `arch`, and with `pretrained` where weights are known. preprocess: the sections
    `vis_processor`, of pictures or of frames, and `text_processor`. video: the processor of clips in the evaluation of
    a run on clips, with its `name`; empty for others."""

    model: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    video: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arch(self) -> str:
        """The registered model's name."""
        return str(self.model["arch"])


def is_run(name: str | Path) -> bool:
    """Whether that is a folder that training has made."""
    return (Path(name).expanduser() / CONFIG_FILE).is_file()


def enclosing_run(weights: str | Path) -> Path | None:
    """The run that weights lie in: its folder, a file in it, one of its checkpoints or a file in that; or None."""
    place = Path(weights).expanduser().resolve()
    # RUN/checkpoints/STEP/FILE and no further: a config.yaml far above belongs to something else.
    return next((folder for folder in (place, *place.parents[:3]) if is_run(folder)), None)


def run_task(folder: str | Path) -> Mapping[str, Any]:
    """The `task` section that a run was trained and evaluated with; see `is_run`."""
    task = read_yaml(Path(folder).expanduser() / CONFIG_FILE).get("task")
    return task if isinstance(task, Mapping) else {}


def model_recipe(
    name: str, model_type: str | None = None, checkpoint: str | Path | None = None
) -> ModelRecipe:
    """The recipe of a model by name and type, or by "name/type", or of what a run's folder has trained.

    Args:
        checkpoint: weights, instead of a preset's, or of the best of the run's checkpoints.

    Raises ConfigError for anything else, UnknownNameError for a name that isn't registered.
    """
    if model_type is None and is_run(name):
        return _of_run(Path(name).expanduser(), checkpoint)
    arch, _, own_type = (name, "", model_type) if model_type else name.partition("/")
    if not arch or not own_type:
        raise ConfigError(
            f"model '{name}': give a name and a type, e.g. blip2_t5/shapes (see lavis-lite names model), or the "
            "folder of a run"
        )
    preset = load_model_preset({"arch": arch, "model_type": own_type})
    model = {**preset.get("model", {}), "arch": arch}
    if checkpoint is not None:
        model["pretrained"] = str(checkpoint)
    return ModelRecipe(model, preset.get("preprocess", {}))


def _of_run(folder: Path, checkpoint: str | Path | None) -> ModelRecipe:
    """As evaluation builds it; pictures and texts are prepared as those of the run's first dataset."""
    content = read_yaml(folder / CONFIG_FILE)
    for file in content.get("imports") or []:
        import_file(file, relative_to=folder)
    model, datasets = content.get("model") or {}, content.get("datasets") or {}
    if "arch" not in model or not datasets:
        raise ConfigError(f"'{folder / CONFIG_FILE}' is not of a run: it has no model.arch, or no datasets")
    first: Mapping[str, Any] = next(iter(datasets.values())) or {}
    name = first.get("builder", "image_text")
    # One that the program itself registered isn't known to another.
    builder = registry.get_builder_class(name) if name in registry.names("builder") else None
    kinds = {"vis_processor": "default_vis", "text_processor": "default_text"}
    merged = {kind: merge(getattr(builder, own, {}), first.get(kind) or {}) for kind, own in kinds.items()}
    preprocess = {kind: sections for kind, sections in merged.items() if sections}
    own = preprocess.get("vis_processor", {})
    clips = {
        split: one for split, one in own.items() if isinstance(one, Mapping) and one.get("name") == "video"
    }
    if clips:
        # That of a clip's frames is that of pictures, too.
        frames = {split: one["frames"] for split, one in clips.items() if "frames" in one}
        preprocess["vis_processor"] = {**own, **frames}
    return ModelRecipe({**model, "pretrained": str(checkpoint or folder)}, preprocess, clips.get("eval", {}))

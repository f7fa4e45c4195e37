"""What people call from Python, with LAVIS's names and argument order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_lite.common.config import PRESETS, load_dataset_preset, model_types
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.model_recipe import ModelRecipe, model_recipe
from lavis_lite.common.registry import registry

if TYPE_CHECKING:
    from lavis_lite.models.base import BaseModel

Processors = dict[str, Callable[..., Any]]


def load_model(
    name: str,
    model_type: str | None = None,
    is_eval: bool = False,
    device: str = "cpu",
    checkpoint: str | Path | None = None,
) -> BaseModel:
    """The model `name` of type `model_type` with its preset's backbones and a checkpoint's weights, or a run's model.

    Args:
        name: a registered model, e.g. "blip2"; without a type, the folder of a run, whose configuration says how
            its model is built, e.g. "output/my_run"; Python files that it imports are run.
        model_type: one of its presets, e.g. "shapes" (`model_zoo` lists them).
        is_eval: put it in evaluation mode; a warning names parts that no checkpoint has trained.
        device: where to put it, e.g. "cpu", "cuda:0", "mps".
        checkpoint: a run's folder, a checkpoint's folder or a weights file; without it the Q-Former is
            untrained unless the preset names a checkpoint, and a run's model is its best.

    Raises UnknownNameError, ConfigError (no such type), CheckpointError (weights absent or not fitting).
    """
    return build_recipe(model_recipe(name, model_type, checkpoint), is_eval, device)


def build_recipe(recipe: ModelRecipe, is_eval: bool, device: str) -> BaseModel:
    """The model of a recipe, with its weights, on a device."""
    from lavis_lite.models.base import build_model
    from lavis_lite.models.untrained import warn_of_untrained

    model = build_model(recipe.model).to(device)
    if not is_eval:
        return model.train()
    warn_of_untrained(model)
    return model.eval()


def load_preprocess(config: Mapping[str, Any]) -> tuple[Processors, Processors]:
    """Image and text processors, each `{"train": ..., "eval": ...}`, from a preset's `preprocess` section."""
    return _processors(config, "vis_processor"), _processors(config, "text_processor")


def load_model_and_preprocess(
    name: str,
    model_type: str | None = None,
    is_eval: bool = False,
    device: str = "cpu",
    checkpoint: str | Path | None = None,
) -> tuple[BaseModel, Processors, Processors]:
    """`load_model` together with the image and text processors that fit it.

    >>> model, vis_processors, txt_processors = load_model_and_preprocess("blip2", "shapes", is_eval=True)
    >>> image = vis_processors["eval"](pil_image).unsqueeze(0)
    """
    recipe = model_recipe(name, model_type, checkpoint)
    return build_recipe(recipe, is_eval, device), *load_preprocess(recipe.preprocess)


def load_dataset(
    name: str,
    cfg_path: str | Path | None = None,
    vis_path: str | None = None,
    data_type: str | None = None,
) -> Any:
    """The splits of a dataset preset, `{"train": dataset, ...}`, or the one split `data_type`.

    Args:
        name: a preset (`lavis_lite/configs/datasets`), or any name together with `cfg_path`.
        cfg_path: a YAML file with the dataset's section, laid over the preset.
        vis_path: the folder that relative paths start from (`root`).

    Raises ConfigError for an unknown preset or split, DataError when files are missing.
    """
    from lavis_lite.common.config import dataset_section, read_yaml
    from lavis_lite.datasets.builders import build_datasets

    section = load_dataset_preset(name)
    if not section and cfg_path is None:
        names = ", ".join(sorted(path.stem for path in (PRESETS / "datasets").glob("*.yaml")))
        raise ConfigError(f"no dataset preset '{name}' (presets: {names}); name a YAML file with cfg_path")
    if cfg_path is not None:
        section = dataset_section(name, read_yaml(Path(cfg_path)))
    if vis_path is not None:
        section = {**section, "root": vis_path}
    splits = build_datasets({name: section})[name]
    if data_type is None:
        return splits
    if data_type not in splits:
        raise ConfigError(f"dataset '{name}' has no split '{data_type}'; splits: {', '.join(splits)}")
    return splits[data_type]


class ModelZoo:
    """Every registered model with its presets; printing it gives a table."""

    def __init__(self) -> None:
        self.model_zoo = {name: model_types(self._folder(name)) for name in registry.names("model")}

    @staticmethod
    def _folder(name: str) -> Path:
        return PRESETS / "models" / getattr(registry.get_model_class(name), "presets", name)

    def __iter__(self) -> Any:
        return iter(self.model_zoo.items())

    def __len__(self) -> int:
        return sum(len(types) for types in self.model_zoo.values())

    def __str__(self) -> str:
        width = max(len(name) for name in self.model_zoo)
        lines = [f"{'model':<{width}}  types", "-" * (width + 40)]
        lines += [f"{name:<{width}}  {', '.join(types) or '-'}" for name, types in self.model_zoo.items()]
        return "\n".join(lines)


def _processors(config: Mapping[str, Any], kind: str) -> Processors:
    sections = config.get(kind) or {}
    return {split: _processor(section, f"preprocess.{kind}.{split}") for split, section in sections.items()}


def _processor(section: Mapping[str, Any], where: str) -> Callable[..., Any]:
    from lavis_lite.common.binding import bind

    cls = registry.get_processor_class(section.get("name", ""))
    processor: Callable[..., Any] = cls(**bind(cls, section, where=where, skip=("name",)))
    return processor


def __getattr__(name: str) -> Any:
    # Made on request: it imports every model's module to find its presets.
    if name == "model_zoo":
        return ModelZoo()
    raise AttributeError(f"module 'lavis_lite.api' has no attribute '{name}'")

"""Reads a run's YAML: schema < model preset < dataset presets < project file < command-line options.

Every key is checked against the thing it configures before anything heavy is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_lite.common.binding import bind
from lavis_lite.common.errors import ConfigError, closest
from lavis_lite.common.expected import Expected
from lavis_lite.common.registry import registry
from lavis_lite.common.run_config import RunConfig

PRESETS = Path(__file__).resolve().parent.parent / "configs"
SECTIONS = ("model", "datasets", "task", "run", "expected")
# Keys of the model section that choose what to build or load; the others are the model class's own keywords.
MODEL_KEYS = ("arch", "model_type", "pretrained")


@dataclass(frozen=True)
class Config:
    """A checked, fully resolved configuration; sections other than `run` and `expected` are plain mappings."""

    run: RunConfig
    model: dict[str, Any]
    datasets: dict[str, dict[str, Any]]
    task: dict[str, Any]
    expected: Expected | None = None
    imports: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as saved beside a run; loading them again gives an equal configuration."""
        run = {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.run).items()
        }
        sections = {"model": self.model, "datasets": self.datasets, "task": self.task, "run": run}
        if self.expected:
            sections["expected"] = asdict(self.expected)
        return {"imports": self.imports, **sections} if self.imports else sections

    def to_yaml(self) -> str:
        """The configuration as YAML text."""
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))


def load_config(path: str | Path, options: Sequence[str] = ()) -> Config:
    """The configuration of a project file with `key.subkey=value` options laid over it.

    Raises ConfigError with the YAML path of the first thing that is wrong: an unknown or misspelt key, a
    value of the wrong type, an unknown name, a preset that doesn't exist, a file that can't be read.
    """
    path = Path(path)
    user = lay_project(read_project(path), parse_options(options))
    _check_keys(user, [*SECTIONS, "imports"], where="the configuration")
    _check_kinds(user)
    check_removed(user.get("datasets") or {})
    imports = [import_file(name, relative_to=path.parent) for name in user.get("imports") or []]
    preset = load_model_preset(user.get("model") or {})
    model = merge(preset.get("model", {}), user.get("model") or {})
    preprocess, video = preset.get("preprocess", {}), model.get("video")
    frames = video.get("frame_embeddings") if isinstance(video, Mapping) else None
    datasets = {
        name: _fitted(dataset_section(name, section), preprocess, frames, name)
        for name, section in (user.get("datasets") or {}).items()
    }
    run_defaults = {"output_dir": f"output/{path.stem}"}
    resolved = _resolve({**user, "model": model, "datasets": datasets})
    published = resolved.get("expected")
    config = Config(
        run=RunConfig(**bind(RunConfig, merge(run_defaults, resolved.get("run") or {}), where="run")),
        model=resolved["model"],
        datasets=resolved["datasets"],
        task=resolved.get("task") or {},
        expected=Expected(**bind(Expected, published, where="expected")) if published else None,
        imports=imports,
    )
    validate(config)
    return config


def validate(config: Config) -> None:
    """Check every section against the signature of the class it names; builds and loads nothing."""
    for where, section, key, get in (
        ("model", config.model, "arch", registry.get_model_class),
        ("task", config.task, "name", registry.get_task_class),
    ):
        if key not in section:
            raise ConfigError(f"missing {where}.{key}: it names what to build")
        _validate_part(
            get(section[key]), section, where=where, skip=(key, *MODEL_KEYS) if key == "arch" else (key,)
        )
    for name, section in config.datasets.items():
        builder = registry.get_builder_class(section.get("builder", "image_text"))
        _validate_part(builder, {"name": name, **section}, where=f"datasets.{name}", skip=("builder",))


def _validate_part(part: Any, section: Mapping[str, Any], *, where: str, skip: Sequence[str]) -> None:
    """A class may check nested sections itself (`validate_config`); otherwise its signature is the schema."""
    if hasattr(part, "validate_config"):
        part.validate_config({key: value for key, value in section.items() if key not in skip}, where=where)
    else:
        bind(part, section, where=where, skip=skip)


def _fitted(
    section: Mapping[str, Any], preprocess: Mapping[str, Any], most: Any, name: str
) -> dict[str, Any]:
    """A dataset's section over the processors of a model's preset, which are of pictures.

    What a builder of something else makes of these its class method `adapt_preprocess` says, and `fit_frames` what it
    means to one of clips that the model takes so many (`most`) frames, if that is limited.
    """
    builder = registry.get_builder_class(str(section.get("builder", "image_text")))
    laid = merge(getattr(builder, "adapt_preprocess", dict)(preprocess), section)
    if not isinstance(most, int) or most < 1 or not hasattr(builder, "fit_frames"):
        return laid
    return dict(builder.fit_frames(laid, most, where=f"datasets.{name}"))


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, mappings key by key.

    A mapping whose `name` or `builder` differs from the one below replaces it whole: the keywords of one part mean
    nothing to another.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and _same_part(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def lay_project(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A project file or options laid over what lies beneath, where null removes a dataset.

    A null that finds nothing to remove stays: in a list of bases such a file may lie over another one.
    """
    laid = merge(below, above)
    known, given = below.get("datasets"), above.get("datasets")
    if isinstance(known, Mapping) and isinstance(given, Mapping):
        laid["datasets"] = {
            name: section
            for name, section in laid["datasets"].items()
            if section is not None or name not in known or name not in given
        }
    return laid


def check_removed(datasets: Mapping[str, Any]) -> None:
    """Raise ConfigError for a dataset that is null where there was none to remove."""
    for name, section in datasets.items():
        if section is None:
            others = [other for other in datasets if other != name]
            hint = closest(name, others) or f"datasets: {', '.join(others) or 'none'}"
            raise ConfigError(
                f"datasets.{name}: null removes a dataset, and no file beneath has one of this name ({hint}); write "
                "{} for its preset as it is"
            )


def _same_part(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    builders = {part["builder"] for part in (below, above) if "builder" in part}
    return bool(above.get("name", below.get("name")) == below.get("name")) and len(builders) < 2


def read_project(path: Path, *, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A project file with the files its `base:` names (one, or a list; relative to it) beneath, the first lowest.

    A dataset that is null is removed; one that no base has stays null, see `lay_project`.
    """
    content = read_yaml(path)
    if seen and isinstance(content.get("imports"), list):  # a base's files lie beside the base
        beside = [(path.parent / str(name), name) for name in content["imports"]]
        content["imports"] = [str(file.resolve()) if file.is_file() else name for file, name in beside]
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base: expected the name of a file, or a list of them, got {bases!r}")
    below: dict[str, Any] = {}
    for base in bases:
        base_path = path.parent / base
        if base_path.resolve() in (*seen, path.resolve()):
            raise ConfigError(f"{path}: 'base: {base}' leads back to a file that is based on this one")
        below = lay_project(below, read_project(base_path, seen=(*seen, path.resolve())))
    return lay_project(below, content)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as plain containers, interpolations not yet resolved."""
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = closest(str(path), siblings) or (f"there: {', '.join(sorted(siblings))}" if siblings else "")
        raise ConfigError(f"no configuration file '{path}'" + (f"; {hint}" if hint else ""))
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections {', '.join(SECTIONS)}, got a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Nested plain containers from `key.subkey=value` strings; values are read as YAML.

    A text with a colon in it needs no quotes (model.prompt=Question: {} Answer:); mappings are written in braces.
    """
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"option '{option}' is not of the form key.subkey=value, e.g. run.max_steps=100"
            )
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([_quoted(o) for o in options]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"options {' '.join(options)}: {' '.join(str(error).split())}") from error
    assert isinstance(parsed, dict)
    return {str(key): value for key, value in parsed.items()}


def _quoted(option: str) -> str:
    """The option, its value in quotes where YAML would take a text with a colon for a mapping, or for an error."""
    key, _, value = option.partition("=")
    try:
        is_text = isinstance(yaml.safe_load(value), dict) and not value.lstrip().startswith("{")
    except yaml.YAMLError:
        is_text = True
    return f"{key}={json.dumps(value, ensure_ascii=False)}" if is_text else option


def load_model_preset(model: Mapping[str, Any]) -> dict[str, Any]:
    """The preset `arch` and `model_type` choose, sections `model` and `preprocess`; empty without a type."""
    if "arch" not in model:
        raise ConfigError("missing model.arch: one of " + ", ".join(registry.names("model")))
    model_type = model.get("model_type")
    if model_type is None:
        return {}
    folder = PRESETS / "models" / getattr(registry.get_model_class(model["arch"]), "presets", model["arch"])
    preset = folder / f"{model_type}.yaml"
    if not preset.is_file():
        names = model_types(folder)
        hint = closest(str(model_type), names)
        raise ConfigError(
            f"model.model_type: '{model['arch']}' has no type '{model_type}'"
            + (f", {hint}" if hint else ";")
            + f" types: {', '.join(names) or 'none'}"
        )
    content = read_project(preset)
    _check_keys(content, ["model", "preprocess"], where=str(preset.name))
    return content


def model_types(folder: Path) -> list[str]:
    """The presets in a model's folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_dataset_preset(name: str) -> dict[str, Any]:
    """The preset of a dataset, empty for a name of the user's own."""
    preset = PRESETS / "datasets" / f"{name}.yaml"
    return read_yaml(preset) if preset.is_file() else {}


def dataset_section(name: str, section: Mapping[str, Any] | None) -> dict[str, Any]:
    """A dataset's section laid over its preset; with another `builder` than that it stands alone."""
    preset = load_dataset_preset(name)
    return merge(preset, section or {}) if _same_part(preset, section or {}) else dict(section or {})


def import_file(name: str, *, relative_to: Path) -> str:
    """Run a user's Python file so that its decorators register; returns its absolute path.

    The path is taken relative to the project file, then to the working directory.
    """
    candidates = [relative_to / name, Path(name)]
    path = next((candidate.resolve() for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise ConfigError(
            f"imports: no file '{name}', looked for {' and '.join(str(c.resolve()) for c in candidates)}"
        )
    module_name = f"lavis_lite_user_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return str(path)
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"imports: '{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs, as `import` does: data classes and worker processes look modules up by name.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[module_name]
        raise ConfigError(f"imports: {path}, line {error.lineno}: {error.msg}") from error
    except BaseException:
        del sys.modules[module_name]
        raise
    return str(path)


def _check_keys(mapping: Mapping[str, Any], valid: Sequence[str], *, where: str) -> None:
    for key in mapping:
        if key not in valid:
            hint = closest(key, valid) or f"valid: {', '.join(valid)}"
            raise ConfigError(f"unknown section '{key}' in {where}; {hint}")


def _check_kinds(user: Mapping[str, Any]) -> None:
    """Sections and datasets are mappings, `imports` is a list of files: what merging them relies on."""
    datasets = user.get("datasets")
    sections = {name: user.get(name) for name in SECTIONS}
    if isinstance(datasets, Mapping):
        sections |= {f"datasets.{name}": section for name, section in datasets.items()}
    for where, section in sections.items():
        if section is not None and not isinstance(section, Mapping):
            raise ConfigError(f"{where}: expected keys and values, got {section!r}")
    imports = user.get("imports") or []
    if not isinstance(imports, list) or not all(isinstance(name, str) for name in imports):
        raise ConfigError(f"imports: expected a list of files, e.g. [my_encoder.py], got {imports!r}")


def _resolve(content: Mapping[str, Any]) -> dict[str, Any]:
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(dict(content)), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"interpolation in the configuration: {' '.join(str(error).split())}") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}

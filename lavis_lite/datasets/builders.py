"""From the `datasets` section of a config to datasets: paths resolved, files checked, processors built."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

from lavis_lite.common.binding import bind
from lavis_lite.common.config import PRESETS, dataset_section, merge
from lavis_lite.common.errors import ConfigError, DataError, closest
from lavis_lite.common.io import cache_dir
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import MapDataset
from lavis_lite.datasets.image_text import ImageTextDataset, Part
from lavis_lite.datasets.readers import Fields
from lavis_lite.datasets.records import RecordTable, Source, open_records
from lavis_lite.processors import build_processor

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
DEFAULT_VIS = {"train": {"name": "blip2_image_train"}, "eval": {"name": "blip_image_eval"}}
DEFAULT_TEXT = {"train": {"name": "blip_caption"}, "eval": {"name": "blip_caption"}}
# So many rows, spread over a table, are looked up before a run starts.
PROBED_ROWS = 16


@dataclass(frozen=True)
class SplitConfig:
    """One source of a split's rows.

    annotations: the annotation file; without one, `images` holds pictures with .txt files beside them.
    images: the folder that the file's picture paths start from; by default the dataset's root.
    format: of the annotation file; `auto` goes by its suffix and content.
    fields: the names its fields have. where: field -> value or values: takes only such rows.
    group_by_image: join the rows of one picture (by default in val and test). split_captions: make a row of each
        caption, so that an epoch shows all of them, instead of drawing one. limit: only the first rows.
    """

    annotations: str | None = None
    images: str | None = None
    format: Literal["auto", "coco", "karpathy", "json", "jsonl", "csv", "tsv", "parquet"] = "auto"
    fields: Fields | None = None
    where: Mapping[str, Any] | None = None
    group_by_image: bool | None = None
    split_captions: bool = False
    limit: int | None = None

    def check(self, where: str) -> None:
        """Raise ConfigError for keys that don't go together."""
        if self.annotations is None and self.images is None:
            raise ConfigError(
                f"{where}: set {where}.annotations to a file, {where}.images to a folder, or both"
            )
        if self.annotations is not None and ".tar" in Path(self.annotations).suffixes:
            raise ConfigError(
                f"{where}.annotations: '{self.annotations}' are shards: set "
                f"{'.'.join(where.split('.')[:2])}.builder=shards and {where}.shards to them, without annotations"
            )
        if self.group_by_image and self.split_captions:
            raise ConfigError(
                f"{where}: group_by_image joins captions and split_captions parts them; set one"
            )
        check_limit(self.limit, where)


@registry.register_builder("image_text")
class ImageTextBuilder:
    """Pictures with captions from annotation files and folders; making one checks the configuration, reads no
    file.

    Args:
        name: the dataset's, as in the config.
        root: folder that relative paths start from. Without it: `<cache>/<name>` if the path is there,
            else the working directory. `~` and $VARIABLES are expanded in all paths.
        train, val, test: keys and values of `SplitConfig`, or a list of such; null leaves a split out.
        format, fields: defaults of the splits' own.
        vis_processor, text_processor: `train` and `eval`, each with a `name` and that processor's keywords.
        ratio: how often a batch is drawn from this dataset in a mix; by default in proportion to its rows.
        limit: only so many rows of each source, for trials.

    Raises ConfigError with the YAML path of what is wrong.

    split_class, dataset_class, default_vis, default_text: what a builder of other rows replaces. source_example: how a
    split is configured, for messages.
    """

    split_class: ClassVar[type] = SplitConfig
    dataset_class: ClassVar[Callable[..., MapDataset]] = ImageTextDataset
    default_vis: ClassVar[Mapping[str, Any]] = DEFAULT_VIS
    default_text: ClassVar[Mapping[str, Any]] = DEFAULT_TEXT
    source_example: ClassVar[str] = "annotations=<file>"

    def __init__(
        self,
        *,
        name: str,
        root: str | None = None,
        train: Mapping[str, Any] | Sequence[Any] | None = None,
        val: Mapping[str, Any] | Sequence[Any] | None = None,
        test: Mapping[str, Any] | Sequence[Any] | None = None,
        format: Literal["auto", "coco", "karpathy", "json", "jsonl", "csv", "tsv", "parquet"] = "auto",
        fields: Fields | None = None,
        vis_processor: Mapping[str, Any] | None = None,
        text_processor: Mapping[str, Any] | None = None,
        ratio: float | None = None,
        limit: int | None = None,
    ) -> None:
        self._set_up(
            name,
            root,
            {"train": train, "val": val, "test": test},
            {"format": format, "fields": fields, "limit": limit},
            vis_processor,
            text_processor,
            ratio,
        )

    def _set_up(
        self,
        name: str,
        root: str | None,
        splits: Mapping[str, Any],
        defaults: Mapping[str, Any],
        vis_processor: Mapping[str, Any] | None,
        text_processor: Mapping[str, Any] | None,
        ratio: float | None,
    ) -> None:
        """Check and keep the configuration; defaults: of the keys of `split_class`."""
        self.name = name
        self.ratio = ratio
        self._root = root
        where = f"datasets.{name}"
        self.vis_processors = _processors(vis_processor, self.default_vis, where=f"{where}.vis_processor")
        self.text_processors = _processors(text_processor, self.default_text, where=f"{where}.text_processor")
        self.splits = {
            split: _split_configs(self.split_class, section, defaults, where=f"{where}.{split}")
            for split, section in splits.items()
            if section
        }
        if not self.splits:
            raise ConfigError(_no_split(name))
        if ratio is not None and ratio < 0:
            raise ConfigError(f"{where}.ratio can't be negative, got {ratio}")

    @classmethod
    def adapt_preprocess(cls, preprocess: Mapping[str, Any]) -> dict[str, Any]:
        """The processors of a model's preset, which are of pictures and captions, as those of this builder's rows.

        A clip's frames are pictures: the default processor of clips gets that of pictures as its `frames`. Of rows that
        aren't captions the default processor stays.
        """
        fits = {
            "vis_processor": (_of_frames, cls.default_vis),
            "text_processor": (_of_texts, cls.default_text),
        }
        adapted = dict(preprocess)
        for kind, (fit, defaults) in fits.items():
            if preprocess.get(kind):
                sections = preprocess[kind].items()
                adapted[kind] = {split: fit(defaults.get(split, own), own) for split, own in sections}
        return adapted

    @classmethod
    def fit_frames(cls, section: Mapping[str, Any], most: int, *, where: str) -> dict[str, Any]:
        """The section with so many frames of a clip where it doesn't say how many; it changes nothing of pictures.

        Raises ConfigError for more, which the model has no embeddings for.
        """
        given, fitted = section.get("vis_processor") or {}, dict(section)
        if not isinstance(given, Mapping):  # said to be one of another section's, or wrong: both show later
            return fitted
        for split, default in cls.default_vis.items():
            own = given.get(split) or {}
            processor = merge(default, own) if isinstance(own, Mapping) else {}
            if processor.get("name") != "video":
                continue
            frames = processor.get("num_frames")
            if frames is None:
                fitted = merge(fitted, {"vis_processor": {split: {**processor, "num_frames": most}}})
            elif isinstance(frames, int) and frames > most:
                raise ConfigError(
                    f"{where}.vis_processor.{split}.num_frames: a clip may have model.video.frame_embeddings={most} "
                    f"frames at most, got {frames}"
                )
        return fitted

    @classmethod
    def check_level(cls, section: Mapping[str, Any], *, where: str) -> None:
        """Raise ConfigError for a split's key that stands beside the splits."""
        own, of_split = (inspect.signature(part).parameters for part in (cls, cls.split_class))
        key = next((key for key in section if key not in own and key in of_split), None)
        if key is not None:
            split = next((split for split in SPLITS if section.get(split)), "train")
            raise ConfigError(f"unknown key '{where}.{key}'; it is one of a split: {where}.{split}.{key}")

    @classmethod
    def validate_config(cls, section: Mapping[str, Any], *, where: str) -> None:
        """Check a section, nested keys included, without touching a data file; raises ConfigError."""
        cls.check_level(section, where=where)
        cls(**bind(cls, section, where=where))

    def build_datasets(self) -> dict[str, MapDataset]:
        """The configured splits by name.

        Raises DataError before anything is converted when a file or folder is missing: with its resolved path
        and the key that sets it.
        """
        sources = {split: self._sources(split) for split in self.splits}
        missing = [split for split in SPLITS if split not in self.splits]
        if missing:
            example = f"datasets.{self.name}.{missing[0]}.{self.source_example}"
            logger.info(
                "dataset '%s' has no %s split, so none is evaluated or trained on (%s adds one)",
                self.name,
                " and no ".join(missing),
                example,
            )
        return {split: self._dataset(split, found) for split, found in sources.items()}

    def has_picture_files(self, split: str) -> bool:
        """Whether the rows of a split are picture files (or members of local shards), as far as its section tells."""
        return getattr(type(self).dataset_class, "visual", ImageTextDataset.visual) == ImageTextDataset.visual

    def _dataset(self, split: str, sources: list[Source]) -> MapDataset:
        parts = [Part(open_records(source), source.images) for source in sources]
        for part, source in zip(parts, sources, strict=True):
            self._probe(part.records, source)
        kind = "train" if split == "train" else "eval"
        return type(self).dataset_class(
            parts,
            vis_processor=self.vis_processors[kind],
            text_processor=self.text_processors[kind],
            name=self.name,
        )

    def _probe(self, records: RecordTable, source: Source) -> None:
        """A folder that holds none of the pictures its file names is the wrong folder."""
        step = max(1, len(records) // PROBED_ROWS)
        names = [records[row].image for row in range(0, len(records), step)]
        paths = [os.path.join(source.images, name) for name in names if name]
        if not paths or any(os.path.exists(path) for path in paths):
            return
        hint = "; these are addresses: fetch the pictures first" if "://" in names[0] else ""
        raise DataError(
            f"none of {len(paths)} pictures looked up for {source.path} exists, for example {paths[0]}{hint}; "
            f"set {source.where}.images=<folder> to where its paths start"
        )

    def _sources(self, split: str) -> list[Source]:
        configs = self.splits[split]
        where = f"datasets.{self.name}.{split}"
        places = [where] if len(configs) == 1 else [f"{where}[{number}]" for number in range(len(configs))]
        return [self._source(config, split, place) for config, place in zip(configs, places, strict=True)]

    def _file(self, path: str | None, key: str) -> Path | None:
        """Where a configured annotation file is; None where none is configured."""
        return None if path is None else self._resolve(path, "annotation file", key, Path.is_file)

    def _images(self, path: str | None, where: str) -> Path:
        return self._resolve(path or ".", "image folder", f"{where}.images", Path.is_dir)

    def _source(self, config: Any, split: str, where: str) -> Source:
        grouped = config.group_by_image
        if grouped is None:
            grouped = split != "train" and not config.split_captions
        return Source(
            annotations=self._file(config.annotations, f"{where}.annotations"),
            images=self._images(config.images, where),
            format=config.format,
            fields=config.fields or Fields(),
            select=selection(config.where),
            group_by_image=grouped,
            split_captions=config.split_captions,
            limit=config.limit,
            where=where,
        )

    def _resolve(self, path: str, what: str, key: str, exists: Callable[[Path], bool]) -> Path:
        """Where a configured path is, which must exist."""
        candidates = (folder / _expand(path) for folder in self.folders())
        found = next((candidate for candidate in candidates if exists(candidate)), None)
        return self.missing(_expand(path), what, key) if found is None else found

    def folders(self) -> list[Path]:
        """The folders that a relative path may start from, the first that has it first."""
        folders = [Path(_expand(self._root))] if self._root else [cache_dir() / self.name, Path()]
        return [folder.absolute() for folder in folders]

    def missing(self, path: str, what: str, key: str) -> NoReturn:
        """Raise the DataError for a configured path that isn't there."""
        looked = " or ".join(dict.fromkeys(str(folder / path) for folder in self.folders()))
        card = f"; dataset_card/{self.name}.md says how to get it" if _has_preset(self.name) else ""
        split = key.rsplit(".", 1)[0].split("[")[0]
        raise DataError(
            f"dataset '{self.name}': no {what} {looked}; set {key}=<path> "
            f"or datasets.{self.name}.root=<folder>, or leave the split out with {split}=null{card}"
        )


def make_builder(name: str, section: Mapping[str, Any] | None) -> Any:
    """The builder of one `datasets` entry, its keywords checked; reads no data file. Raises ConfigError."""
    section = dict(section or {})
    builder = registry.get_builder_class(section.get("builder", "image_text"))
    if hasattr(builder, "check_level"):
        builder.check_level(section, where=f"datasets.{name}")
    return builder(**bind(builder, {"name": name, **section}, where=f"datasets.{name}", skip=("builder",)))


def build_datasets(datasets: Mapping[str, Mapping[str, Any] | None]) -> dict[str, dict[str, MapDataset]]:
    """Every configured dataset's splits: {dataset: {split: rows}}.

    All entries are checked before the first is built. Raises ConfigError and DataError, see
    `ImageTextBuilder`.
    """
    builders = {name: make_builder(name, section) for name, section in datasets.items()}
    return {name: builder.build_datasets() for name, builder in builders.items()}


def validate_datasets_config(datasets: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Check the `datasets` section without touching a data file; raises ConfigError."""
    for name, section in datasets.items():
        make_builder(name, section)


def build_dataset_from_preset(name: str, overrides: Mapping[str, Any] | None = None) -> dict[str, MapDataset]:
    """The splits of a preset with `overrides` laid over it; a name without a preset needs overrides."""
    return build_datasets({name: dataset_section(name, overrides)})[name]


def _split_configs(split_class: type, section: Any, defaults: Mapping[str, Any], *, where: str) -> list[Any]:
    """A split's sources; a list holds several, whose rows follow each other."""
    if isinstance(section, Mapping):
        return [_split_config(split_class, section, defaults, where=where)]
    if isinstance(section, (list, tuple)):
        return [
            _split_config(split_class, item, defaults, where=f"{where}[{number}]")
            for number, item in enumerate(section)
        ]
    raise ConfigError(f"{where}: expected {where}.annotations and {where}.images, got {section!r}")


def _split_config(
    split_class: type, section: Mapping[str, Any], defaults: Mapping[str, Any], *, where: str
) -> Any:
    config = split_class(**bind(split_class, merge(defaults, section), where=where))
    config.check(where)
    return config


def _of_frames(default: Mapping[str, Any], pictures: Mapping[str, Any]) -> Mapping[str, Any]:
    """A builder's default processor with a preset's in the place of its frames' one; the preset's if it has none."""
    if "frames" not in default or pictures.get("name") == default["name"]:
        return pictures
    return {**default, "frames": pictures}


def _of_texts(default: Mapping[str, Any], captions: Mapping[str, Any]) -> Mapping[str, Any]:
    """A preset's processor, but for that of captions where a builder's rows are something else."""
    known = {processor["name"] for processor in DEFAULT_TEXT.values()}
    return default if captions.get("name") in known and default["name"] not in known else captions


def check_limit(limit: int | None, where: str) -> None:
    """Raise ConfigError for a limit that leaves no row."""
    if limit is not None and limit < 1:
        raise ConfigError(f"{where}.limit must be at least 1, got {limit}")


def _processors(
    section: Mapping[str, Any] | None, defaults: Mapping[str, Any], *, where: str
) -> dict[str, Callable[..., Any]]:
    section = section or {}
    for key in section:
        if key not in defaults:
            hint = closest(str(key), defaults) or f"valid keys: {', '.join(defaults)}"
            raise ConfigError(f"unknown key '{where}.{key}'; {hint}")
    merged = merge(defaults, {key: value for key, value in section.items() if value is not None})
    return {key: build_processor(merged[key], where=f"{where}.{key}") for key in defaults}


def selection(where: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """A split's `where` as lists of strings, whatever it was written as."""
    return {
        str(name): [str(value) for value in (values if isinstance(values, (list, tuple)) else [values])]
        for name, values in (where or {}).items()
    }


def _no_split(name: str) -> str:
    presets = sorted(path.stem for path in (PRESETS / "datasets").glob("*.yaml"))
    hint = closest(name, presets) if name not in presets else ""
    return (
        f"datasets.{name}: no split is set and there is no preset of that name"
        + (f", {hint}" if hint else f" (presets: {', '.join(presets)})")
        + f"; for data of your own set datasets.{name}.train.annotations=<file> "
        f"and datasets.{name}.train.images=<folder>"
    )


def _has_preset(name: str) -> bool:
    return (PRESETS / "datasets" / f"{name}.yaml").is_file()


def _expand(path: str) -> str:
    return os.path.expanduser(os.path.expandvars(path))

"""From `datasets` entries with `builder: video_text` or `video_vqa` to datasets of clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, ClassVar, Literal

from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import MapDataset
from lavis_lite.datasets.builders import ImageTextBuilder, SplitConfig
from lavis_lite.datasets.clip_sources import CLIP_NAME, ClipQuestionSource, ClipSource
from lavis_lite.datasets.clips import ClipDataset, ClipQuestionDataset
from lavis_lite.datasets.questions import QuestionFields
from lavis_lite.datasets.readers import Fields
from lavis_lite.datasets.records import Source
from lavis_lite.datasets.vqa_builder import Format as QuestionFormat
from lavis_lite.datasets.vqa_builder import QuestionSplitConfig, VqaBuilder

Format = Literal["auto", "msrvtt", "msvd", "coco", "karpathy", "json", "jsonl", "csv", "tsv", "parquet"]
PUBLISHED = ("msrvtt", "msvd")
DEFAULT_VIS: Mapping[str, Any] = {
    "train": {"name": "video", "sampling": "random", "frames": {"name": "blip2_image_train"}},
    "eval": {"name": "video", "frames": {"name": "blip_image_eval"}},
}


@dataclass(frozen=True)
class ClipSplitConfig(SplitConfig):
    """One source of a split's captioned clips: the keys of `SplitConfig`, of which `images` is the folder of clips,
    without `annotations` with .txt files beside them.

    format: also `msrvtt` and `msvd`, the files that these were published with.
    names: a file with the names of the clips to take, one a line. video_name: a clip's path from its `video_id`.
    """

    format: Format = "auto"  # type: ignore[assignment]
    names: str | None = None
    video_name: str = CLIP_NAME

    def check(self, where: str) -> None:
        """Raise ConfigError for keys that don't go together."""
        super().check(where)
        if self.annotations is None and self.format in PUBLISHED:
            raise ConfigError(
                f"{where}.format: '{self.format}' is that of a file: set {where}.annotations to it, or for clips with "
                f".txt files beside them {where}.format=auto"
            )


@registry.register_builder("video_text")
class VideoTextBuilder(ImageTextBuilder):
    """Clips with captions; making one checks the configuration, reads no file.

    Args:
        name, root, text_processor, ratio, limit, fields: as of `ImageTextBuilder`.
        train, val, test: keys and values of `ClipSplitConfig`, or a list of such; null leaves a split out.
        format, video_name: defaults of the splits' own.
        vis_processor: `train` and `eval`, of clips; by default eight frames by the processor `video`.

    Raises ConfigError with the YAML path of what is wrong.
    """

    split_class: ClassVar[type] = ClipSplitConfig
    dataset_class: ClassVar[Callable[..., MapDataset]] = ClipDataset
    default_vis: ClassVar[Mapping[str, Any]] = DEFAULT_VIS

    def __init__(
        self,
        *,
        name: str,
        root: str | None = None,
        train: Mapping[str, Any] | Sequence[Any] | None = None,
        val: Mapping[str, Any] | Sequence[Any] | None = None,
        test: Mapping[str, Any] | Sequence[Any] | None = None,
        format: Format = "auto",
        fields: Fields | None = None,
        video_name: str = CLIP_NAME,
        vis_processor: Mapping[str, Any] | None = None,
        text_processor: Mapping[str, Any] | None = None,
        ratio: float | None = None,
        limit: int | None = None,
    ) -> None:
        self._set_up(
            name,
            root,
            {"train": train, "val": val, "test": test},
            {"format": format, "fields": fields, "video_name": video_name, "limit": limit},
            vis_processor,
            text_processor,
            ratio,
        )

    def _source(self, config: Any, split: str, where: str) -> Source:
        plain = super()._source(config, split, where)
        return ClipSource(
            **{field.name: getattr(plain, field.name) for field in dataclass_fields(plain)},
            names_file=self._file(config.names, f"{where}.names"),
            video_name=config.video_name,
        )


@dataclass(frozen=True)
class ClipQuestionSplitConfig(QuestionSplitConfig):
    """One source of a split's questions about clips: the keys of `QuestionSplitConfig`, of which `images` is the folder
    of clips.

    names: a file with the names of the clips to take, one a line. video_name: a clip's path from its `video_id`, the
    same as `image_name`.
    """

    names: str | None = None
    video_name: str | None = None

    def check(self, where: str) -> None:
        """Raise ConfigError for keys that don't go together."""
        super().check(where)
        other = next((key for key in ("image_name", "pictures") if getattr(self, key) is not None), None)
        if self.video_name is not None and other is not None:
            raise ConfigError(f"{where}: {where}.video_name and {where}.{other} both name clips: keep one")


@registry.register_builder("video_vqa")
class VideoVqaBuilder(VqaBuilder):
    """Questions about clips; making one checks the configuration, reads no file.

    Args:
        name, root, format, fields, image_name, text_processor, ratio, limit: as of `VqaBuilder`.
        train, val, test: keys and values of `ClipQuestionSplitConfig`, or a list of such; null leaves a split out.
        video_name: default of the splits' own.
        vis_processor: as of `VideoTextBuilder`.

    Raises ConfigError with the YAML path of what is wrong.
    """

    split_class: ClassVar[type] = ClipQuestionSplitConfig
    dataset_class: ClassVar[Callable[..., MapDataset]] = ClipQuestionDataset
    default_vis: ClassVar[Mapping[str, Any]] = DEFAULT_VIS

    def __init__(
        self,
        *,
        name: str,
        root: str | None = None,
        train: Mapping[str, Any] | Sequence[Any] | None = None,
        val: Mapping[str, Any] | Sequence[Any] | None = None,
        test: Mapping[str, Any] | Sequence[Any] | None = None,
        format: QuestionFormat = "auto",
        fields: QuestionFields | None = None,
        image_name: str | None = None,
        video_name: str | None = None,
        vis_processor: Mapping[str, Any] | None = None,
        text_processor: Mapping[str, Any] | None = None,
        ratio: float | None = None,
        limit: int | None = None,
    ) -> None:
        named = {"image_name": image_name, "video_name": video_name}
        self._set_up(
            name,
            root,
            {"train": train, "val": val, "test": test},
            {"format": format, "fields": fields, "limit": limit, **named},
            vis_processor,
            text_processor,
            ratio,
        )

    def _source(self, config: Any, split: str, where: str) -> Source:
        plain = super()._source(config, split, where)
        known = {field.name: getattr(plain, field.name) for field in dataclass_fields(plain)}
        if config.image_name is None:
            known.update(image_name=config.video_name, name_key="video_name")
        return ClipQuestionSource(**known, names_file=self._file(config.names, f"{where}.names"))

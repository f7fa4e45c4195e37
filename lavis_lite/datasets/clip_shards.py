"""From `datasets` entries with `builder: video_shards` or `video_vqa_shards` to datasets of clips in tar shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import MapDataset
from lavis_lite.datasets.clip_builders import DEFAULT_VIS
from lavis_lite.datasets.clip_sources import CLIPS
from lavis_lite.datasets.clips import ClipDataset, ClipQuestionDataset, ClipStream
from lavis_lite.datasets.folder import Kind
from lavis_lite.datasets.shard_builder import QuestionShardBuilder, ShardBuilder
from lavis_lite.datasets.shard_stream import ShardStream


@registry.register_builder("video_shards")
class VideoShardBuilder(ShardBuilder):
    """Clips with captions from tar shards; see `ShardBuilder`, of which `image` is the extension of a clip's member."""

    kind: ClassVar[Kind] = CLIPS
    stream_class: ClassVar[type[ShardStream]] = ClipStream
    dataset_class: ClassVar[Callable[..., MapDataset]] = ClipDataset
    default_vis: ClassVar[Mapping[str, Any]] = DEFAULT_VIS


@registry.register_builder("video_vqa_shards")
class VideoQuestionShardBuilder(QuestionShardBuilder):
    """Questions about clips from local tar shards; see `VideoShardBuilder` and `QuestionShardBuilder`."""

    kind: ClassVar[Kind] = CLIPS
    dataset_class: ClassVar[Callable[..., MapDataset]] = ClipQuestionDataset
    default_vis: ClassVar[Mapping[str, Any]] = DEFAULT_VIS

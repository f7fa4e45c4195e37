"""From a `datasets` entry with `builder: shards` to a dataset: local tars read at random, or a stream."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lavis_lite.common import dist
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import MapDataset, UnreadableSample
from lavis_lite.datasets.builders import ImageTextBuilder, check_limit
from lavis_lite.datasets.folder import PICTURES, Kind
from lavis_lite.datasets.readers import Fields
from lavis_lite.datasets.records import Record, RecordTable, Source
from lavis_lite.datasets.shard_rows import SampleForm
from lavis_lite.datasets.shard_stream import ShardStream
from lavis_lite.datasets.shard_urls import expand, is_local, is_local_tar, names, parts
from lavis_lite.datasets.shards import ShardSource
from lavis_lite.datasets.tar_members import Address, read_member
from lavis_lite.datasets.vqa import QuestionDataset

logger = logging.getLogger(__name__)

# So many samples, spread over the shards, are read before a run starts.
PROBED_SAMPLES = 16


@dataclass(frozen=True)
class ShardSplitConfig:
    """One source of a split's samples.

    shards: paths, `pipe:` commands or http(s) addresses of tars; braces ({00000..00099}) are expanded, and * in paths.
    image: extension of the picture's (or clip's) member; by default the first that is one of a picture.
    fields: the names in a sample's .json. Without a caption in it, each line of the .txt is one.
    split_captions: make a row of each caption, instead of drawing one. limit: only the first rows.
    stream: read from beginning to end instead of at random; what is no local .tar always is. It is for training.
    samples: about how many samples the shards of a stream hold, by which its epochs are counted.
    shuffle: samples of a stream that are shuffled together; as many are held in each loader worker's memory.
    """

    shards: str | Sequence[str] | None = None
    image: str | None = None
    fields: Fields | None = None
    split_captions: bool = False
    limit: int | None = None
    stream: bool | None = None
    samples: int | None = None
    shuffle: int = 1000

    @property
    def patterns(self) -> list[str]:
        """What `shards` lists."""
        return [self.shards] if isinstance(self.shards, str) else list(self.shards or ())

    @property
    def streamed(self) -> bool:
        """Whether it is read as a stream."""
        return bool(self.stream) or not all(map(is_local_tar, self.names))

    @property
    def names(self) -> list[str]:
        """What the patterns name; see `shard_urls.names`."""
        return [name for pattern in self.patterns for name in names(pattern)]

    def check(self, where: str) -> None:
        """Raise ConfigError for keys that don't go together."""
        if not self.patterns:
            raise ConfigError(
                f"{where}: set {where}.shards to tar files, such as 'shards/{{00000..00099}}.tar'"
            )
        check_limit(self.limit, where)
        if self.shuffle < 1:
            raise ConfigError(f"{where}.shuffle must be at least 1, got {self.shuffle}")
        if not self.streamed:
            return
        if self.stream is False:
            raise ConfigError(f"{where}.stream=false: only local .tar files can be read at random")
        at_random = next(filter(is_local_tar, self.names), None)
        if self.stream is None and at_random is not None:
            other = next(name for name in self.names if not is_local_tar(name))
            raise ConfigError(
                f"{where}.shards mixes local .tar files ('{at_random}'), which are read at random, with streams "
                f"('{other}'): give each a dataset of its own, mixed by `ratio`, or set {where}.stream=true"
            )
        if self.samples is None or self.samples < 1:
            raise ConfigError(
                f"{where}.samples: how many samples a stream's shards hold isn't known before they are read; set it "
                "to about their number: epochs are counted by it"
            )
        if self.limit is not None or self.split_captions:
            raise ConfigError(f"{where}: a stream knows neither {where}.limit nor {where}.split_captions")


@registry.register_builder("shards")
class ShardBuilder(ImageTextBuilder):
    """Pictures with captions from tar shards in webdataset's layout; making one only checks the configuration.

    Args:
        name, root, vis_processor, text_processor, ratio, limit: as of `ImageTextBuilder`.
        train, val, test: keys and values of `ShardSplitConfig`, or a list of such; null leaves a split out.
        image, fields: defaults of the splits' own.

    Raises ConfigError with the YAML path of what is wrong.
    """

    split_class: ClassVar[type] = ShardSplitConfig
    source_example: ClassVar[str] = "shards=<tars>"
    kind: ClassVar[Kind] = PICTURES
    stream_class: ClassVar[type[ShardStream]] = ShardStream

    def __init__(
        self,
        *,
        name: str,
        root: str | None = None,
        train: Mapping[str, Any] | Sequence[Any] | None = None,
        val: Mapping[str, Any] | Sequence[Any] | None = None,
        test: Mapping[str, Any] | Sequence[Any] | None = None,
        image: str | None = None,
        fields: Fields | None = None,
        vis_processor: Mapping[str, Any] | None = None,
        text_processor: Mapping[str, Any] | None = None,
        ratio: float | None = None,
        limit: int | None = None,
    ) -> None:
        splits = {"train": train, "val": val, "test": test}
        defaults = {"image": image, "fields": fields, "limit": limit}
        self._set_up(name, root, splits, defaults, vis_processor, text_processor, ratio)
        for split, configs in self.splits.items():
            self._check_streams(configs, f"datasets.{name}.{split}", training=split == "train")

    def _check_streams(self, configs: Sequence[ShardSplitConfig], where: str, *, training: bool) -> None:
        if not any(config.streamed for config in configs):
            return
        if not training:
            raise ConfigError(f"{where}: a stream is for training; evaluation needs local .tar files")
        if len(configs) > 1:
            raise ConfigError(f"{where}: a stream stands alone; give each its own dataset, mixed by `ratio`")
        if self._asks():
            raise ConfigError(f"{where}: questions are read from local .tar files, not from a stream")

    def has_picture_files(self, split: str) -> bool:
        """As of `ImageTextBuilder`; a stream has none."""
        return super().has_picture_files(split) and not any(
            one.streamed for one in self.splits.get(split, ())
        )

    def _dataset(self, split: str, sources: list[Source]) -> Any:
        config = self.splits[split][0]
        if not config.streamed:
            return super()._dataset(split, sources)
        stream = type(self).stream_class(
            self._urls(config, f"datasets.{self.name}.{split}.shards"),
            samples=config.samples,
            shuffle=config.shuffle,
            form=self._form(config),
            vis_processor=self.vis_processors["train"],
            text_processor=self.text_processors["train"],
            name=self.name,
        )
        stream.probe()
        return stream

    def _sources(self, split: str) -> list[Source]:
        return [] if self.splits[split][0].streamed else super()._sources(split)

    def _source(self, config: Any, split: str, where: str) -> Source:
        shards = tuple(Path(path) for path in self._urls(config, f"{where}.shards"))
        return ShardSource(
            annotations=None,
            images=Path(os.path.commonpath([shard.parent for shard in shards])),
            split_captions=config.split_captions,
            limit=config.limit,
            where=where,
            shards=shards,
            pattern=", ".join(config.patterns),
            form=self._form(config),
        )

    def _form(self, config: ShardSplitConfig) -> SampleForm:
        return SampleForm(image=config.image, fields=config.fields or Fields(), kind=type(self).kind)

    def _asks(self) -> bool:
        """Whether rows are questions."""
        rows = type(self).dataset_class
        return isinstance(rows, type) and issubclass(rows, QuestionDataset)

    def _urls(self, config: ShardSplitConfig, key: str) -> list[str]:
        """The shards of a split: addresses as they are, local ones with the paths where they were found."""
        found: list[str] = []
        for pattern in config.patterns:
            # What local parts stand for is looked for together: some of it may be missing, but not all.
            local = all(map(is_local, names(pattern)))
            for part in [pattern] if local else parts(pattern):
                if all(map(is_local, names(part))):
                    found += self._local(part, key)
                else:
                    for name in names(part):
                        found += self._local(name, key) if is_local(name) else [name]
        return list(dict.fromkeys(found))

    def _local(self, pattern: str, key: str) -> list[str]:
        shards = expand(pattern, self._resolve_any(pattern, key))
        found = [shard for shard in shards if os.path.isfile(shard)]
        missing = [shard for shard in shards if not os.path.isfile(shard)]
        if missing:
            logger.warning(
                "dataset '%s': %d of %d shards are missing, for example %s",
                self.name,
                len(missing),
                len(shards),
                missing[0],
            )
        return found

    def _resolve_any(self, pattern: str, key: str) -> Path:
        """The folder below which any of the shards is; DataError when none is."""
        found = next(
            (folder for folder in self.folders() if any(map(os.path.isfile, expand(pattern, folder)))), None
        )
        if found is None:
            self.missing(expand(pattern)[0], "shard", key)
        return found

    def _probe(self, records: RecordTable, source: Source) -> None:
        """Read some samples; a warning tells of pictures that can't be read. DataError when no sample can be used."""
        rows = range(0, len(records), max(1, len(records) // PROBED_SAMPLES))
        found = {row: problem for row in rows if (problem := self._problem(records[row], source.images))}
        if len(found) == len(rows):
            raise DataError(
                f"none of the samples looked up in {source.path} can be used, for example {found[0]}; "
                f"{source.where}.image and {source.where}.fields name members and fields"
            )
        # The others are counted before training.
        unreadable = [problem for row, problem in found.items() if records[row].problem is None]
        if unreadable and dist.is_main():
            logger.warning(
                "dataset '%s': %d of %d samples looked up in %s can't be used, for example %s",
                *(self.name, len(unreadable), len(rows), source.path, unreadable[0]),
            )

    def _problem(self, record: Record, folder: Path) -> str | None:
        """Why a sample of local shards can't be used; None when it can. The picture is read, not decoded."""
        address = Address.parse(os.path.join(folder, record.image))
        if record.problem is not None or address is None:
            return record.problem or f"{record.image} is no member of a shard"
        asks = self._asks()
        if not (record.question if asks else record.captions):
            return f"{address}: no {'question' if asks else 'caption'} in it"
        try:
            read_member(address)
        except UnreadableSample as error:
            return str(error)
        return None


@registry.register_builder("vqa_shards")
class QuestionShardBuilder(ShardBuilder):
    """Questions about pictures from local tar shards, as `lavis-lite shards make` writes them; see `ShardBuilder`."""

    dataset_class: ClassVar[Callable[..., MapDataset]] = QuestionDataset
    default_text: ClassVar[Mapping[str, Any]] = {
        "train": {"name": "blip_question"},
        "eval": {"name": "blip_question"},
    }

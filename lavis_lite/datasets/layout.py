"""Whether a dataset's files lie where its preset looks for them: what is there, what is missing, how many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lavis_lite.common.config import PRESETS, dataset_section, read_yaml
from lavis_lite.common.errors import LavisLiteError
from lavis_lite.datasets.builders import SPLITS, build_datasets
from lavis_lite.datasets.image_text import ImageTextDataset
from lavis_lite.datasets.named import only_split
from lavis_lite.datasets.shard_stream import ShardStream
from lavis_lite.datasets.tar_members import Address

# Pictures looked for in each split, spread over its rows, unless all are.
SPREAD = 20_000
COUNTS = PRESETS / "dataset_counts.yaml"
# Of a split, what says where pictures are and not which rows there are.
PICTURE_KEYS = ("images", "image_name", "image")


@dataclass
class SplitLayout:
    """What was found of a split.

    problem: why it can't be read at all. rows: found. exact, published: how many there should be, or were once; None
    where that isn't known. uncounted: why it isn't. streamed: shards of a stream, which has no rows. looked_for: rows
    whose picture was looked for. missing: paths of those that aren't there. unusable: rows that can't be used. example:
    why one of them can't, such as an empty caption. files: what its rows show.
    """

    split: str
    problem: str | None = None
    rows: int = 0
    exact: int | None = None
    published: int | None = None
    uncounted: str | None = None
    streamed: int | None = None
    looked_for: int = 0
    missing: list[str] = field(default_factory=list)
    unusable: int = 0
    example: str | None = None
    files: str = "pictures"

    @property
    def good(self) -> bool:
        """Whether all is there that should be."""
        counted = self.exact is None or self.streamed is not None or self.exact == self.rows
        return counted and not (self.problem or self.missing or self.unusable)

    def lines(self) -> list[str]:
        """What to tell a user of it."""
        if self.problem is not None:
            return [f"{self.split}: {self.problem}"]
        if self.streamed is not None:
            return [
                f"{self.split}: a stream of {self.streamed:,} shards, of which the beginnings of some can be read; not "
                "counted: `lavis-lite shards check` reads it"
            ]
        told = [f"{self.rows:,} rows"]
        if self.exact is not None:
            told.append("as they should be" if self.exact == self.rows else f"there should be {self.exact:,}")
        if self.published is not None:
            told.append(f"{self.rows / self.published:.0%} of the {self.published:,} published")
        there = self.looked_for - len(self.missing)
        told.append(f"{there:,} of {self.looked_for:,} {self.files} looked for are there")
        if self.uncounted is not None:
            told.append(f"not compared with a count: {self.uncounted}")
        lines = [f"{self.split}: {', '.join(told)}"]
        lines += [f"{self.split}: missing, for example {path}" for path in self.missing[:3]]
        if self.unusable:
            lines.append(f"{self.split}: {self.unusable:,} rows can't be used, for example {self.example}")
        return lines


def check_layout(name: str, section: Mapping[str, Any], *, all_rows: bool = False) -> Iterator[SplitLayout]:
    """Each split of a dataset's section, built and looked through.

    all_rows: look for every picture, not for some thousands spread over the split. Pictures are not decoded.
    """
    for split in SPLITS:
        if not section.get(split):
            continue
        found = _expected(name, split, section)
        try:
            dataset = build_datasets({name: only_split(section, split)})[name][split]
        except LavisLiteError as error:
            found.problem = str(error)
            yield found
            continue
        if isinstance(dataset, ShardStream):
            found.streamed = len(dataset.urls)
        else:
            found.rows = len(dataset)
            if isinstance(dataset, ImageTextDataset):
                found.files = dataset.kind.name
                found.unusable, found.example = dataset.problems()
                _look_for_files(dataset, found, all_rows=all_rows)
        yield found


def _expected(name: str, split: str, section: Mapping[str, Any]) -> SplitLayout:
    """What is known of a split before it is looked at."""
    counts = read_yaml(COUNTS)
    exact, published = (counts[kind].get(name, {}).get(split) for kind in ("exact", "published"))
    if exact is None and published is None:
        return SplitLayout(split, uncounted=counts["uncounted"].get(name))
    if _rows_of(section, split) != _rows_of(dataset_section(name, {}), split):
        return SplitLayout(split, uncounted="the options ask for other rows than the preset has")
    return SplitLayout(split, exact=exact, published=published)


def _rows_of(section: Mapping[str, Any], split: str) -> Any:
    """What of a section decides a split's rows: all but where its pictures are."""
    sources = section.get(split)
    listed = sources if isinstance(sources, list) else [sources]
    kept = [
        {key: value for key, value in one.items() if key not in PICTURE_KEYS and value is not None}
        if isinstance(one, Mapping)
        else one
        for one in listed
    ]
    return kept, section.get("limit")


def _look_for_files(dataset: ImageTextDataset, found: SplitLayout, *, all_rows: bool) -> None:
    step = 1 if all_rows else max(1, len(dataset) // SPREAD)
    for row in range(0, len(dataset), step):
        if dataset.record(row).problem is not None:
            continue
        found.looked_for += 1
        path = dataset.image_path(row)
        address = Address.parse(path)
        if not os.path.isfile(address.tar if address else path):
            found.missing.append(path)

"""The dataset builder that draws the world's clips when they aren't there and then reads them like any user's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import MapDataset
from lavis_lite.datasets.clip_builders import VideoTextBuilder, VideoVqaBuilder
from lavis_lite.worlds.shapes.clip_writer import ClipSpec, write_clips
from lavis_lite.worlds.shapes.scene import SPLITS


@registry.register_builder("shapes_video")
class ShapesVideoBuilder:
    """Clips of the shapes world with captions or questions, drawn into the cache folder at first use.

    Args:
        name: the dataset's, as in the config.
        texts: what goes with the clips; both kinds share their files.
        train, val, test: clips per split; 0 leaves a split out. No clip is in two splits, whatever the seed.
        image_size: the side in pixels. questions_per_clip: 1-5, of different types. seed: of the clips.
        vis_processor, text_processor: `train` and `eval`, each with a `name` and that processor's keywords.
        ratio: how often a batch is drawn from this dataset in a mix; by default in proportion to its rows.
        limit: only so many rows of each split, for trials.
    """

    adapt_preprocess = staticmethod(VideoTextBuilder.adapt_preprocess)
    fit_frames = staticmethod(VideoTextBuilder.fit_frames)

    def __init__(
        self,
        *,
        name: str,
        texts: Literal["captions", "questions"] = "captions",
        train: int = 3000,
        val: int = 300,
        test: int = 300,
        image_size: int = 64,
        questions_per_clip: int = 4,
        seed: int = 0,
        vis_processor: Mapping[str, Any] | None = None,
        text_processor: Mapping[str, Any] | None = None,
        ratio: float | None = None,
        limit: int | None = None,
    ) -> None:
        self.name = name
        self.ratio = ratio
        self.spec = ClipSpec(
            train=train,
            val=val,
            test=test,
            image_size=image_size,
            questions_per_clip=questions_per_clip,
            seed=seed,
        )
        sources: dict[str, Any] = {
            split: {"annotations": f"annotations/{texts}_{split}.jsonl", "images": f"clips/{split}"}
            for split in SPLITS
            if self.spec.size(split)
        }
        builder = VideoTextBuilder if texts == "captions" else VideoVqaBuilder
        # The generic builder; the folder it reads is written later, by `build_datasets`.
        self.files = builder(
            name=name,
            root=str(self.spec.folder),
            vis_processor=vis_processor,
            text_processor=text_processor,
            ratio=ratio,
            limit=limit,
            **sources,
        )
        self.splits = self.files.splits

    def has_picture_files(self, split: str) -> bool:
        """Never: its rows are clips."""
        return False

    def build_datasets(self) -> dict[str, MapDataset]:
        """The configured splits by name, their files written first where they are missing."""
        write_clips(self.spec)
        return self.files.build_datasets()

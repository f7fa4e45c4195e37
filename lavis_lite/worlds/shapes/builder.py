"""The dataset builder that draws the world when it isn't there and then reads it like any user's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import MapDataset
from lavis_lite.datasets.builders import ImageTextBuilder
from lavis_lite.datasets.vqa_builder import VqaBuilder
from lavis_lite.worlds.shapes.scene import SPLITS, Split
from lavis_lite.worlds.shapes.writer import WorldSpec, write_world

# What reads each kind of text: builder, format, and the files of annotations/ by the key that takes them.
_READ: dict[str, tuple[type[ImageTextBuilder], Any, dict[str, str]]] = {
    "captions": (ImageTextBuilder, "coco", {"annotations": "captions"}),
    "questions": (
        VqaBuilder,
        "vqa",
        {"questions": "questions", "annotations": "answers", "pictures": "captions"},
    ),
}


def _paths(files: Mapping[str, str], split: Split) -> dict[str, str]:
    paths = {key: f"annotations/{file}_{split}.json" for key, file in files.items()}
    return {**paths, "images": f"images/{split}"}


@registry.register_builder("shapes")
class ShapesBuilder:
    """Pictures of the shapes world with captions or questions, drawn into the cache folder at first use.

    Args:
        name: the dataset's, as in the config.
        texts: what goes with the pictures; both kinds share their files.
        train, val, test: pictures per split; 0 leaves a split out. No scene is in two splits, whatever the
            seed.
        image_size: the side in pixels.
        captions_per_image: 1-4, in different styles. questions_per_image: 0-10, of different types.
        split_captions: a row of training for each caption, so that a picture can come twice in a batch.
        seed: of the scenes.
        vis_processor, text_processor: `train` and `eval`, each with a `name` and that processor's keywords.
        ratio: how often a batch is drawn from this dataset in a mix; by default in proportion to its rows.
        limit: only so many rows of each split, for trials.
    """

    def __init__(
        self,
        *,
        name: str,
        texts: Literal["captions", "questions"] = "captions",
        train: int = 20_000,
        val: int = 500,
        test: int = 500,
        image_size: int = 64,
        captions_per_image: int = 2,
        questions_per_image: int = 4,
        split_captions: bool = False,
        seed: int = 0,
        vis_processor: Mapping[str, Any] | None = None,
        text_processor: Mapping[str, Any] | None = None,
        ratio: float | None = None,
        limit: int | None = None,
    ) -> None:
        self.name = name
        self.ratio = ratio
        self.spec = WorldSpec(
            train=train,
            val=val,
            test=test,
            image_size=image_size,
            captions_per_image=captions_per_image,
            questions_per_image=questions_per_image,
            seed=seed,
        )
        if texts == "questions" and not questions_per_image:
            raise ConfigError(f"datasets.{name}.questions_per_image must be at least 1 for texts: questions")
        builder, format, files = _READ[texts]
        sources: dict[str, Any] = {split: _paths(files, split) for split in SPLITS if self.spec.size(split)}
        if split_captions:
            if texts == "questions":
                raise ConfigError(f"datasets.{name}.split_captions: questions are rows of their own already")
            if "train" in sources:
                sources["train"]["split_captions"] = True
        # The generic builder; the folder it reads is written later, by `build_datasets`.
        self.files = builder(
            name=name,
            root=str(self.spec.folder),
            format=format,
            vis_processor=vis_processor,
            text_processor=text_processor,
            ratio=ratio,
            limit=limit,
            **sources,
        )

    def build_datasets(self) -> dict[str, MapDataset]:
        """The configured splits by name, their files written first where they are missing."""
        write_world(self.spec)
        return self.files.build_datasets()

"""Rendered pictures with the labels of their objects, for pre-training and probing the embedded ViT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import MapDataset
from lavis_lite.processors import build_processor
from lavis_lite.worlds.shapes.render import render
from lavis_lite.worlds.shapes.scene import SPLITS, Split, sample_scene
from lavis_lite.worlds.shapes.targets import scene_targets

DEFAULT_VIS = {"train": {"name": "shapes_image_train"}, "eval": {"name": "shapes_image_eval"}}


class RenderedScenes:
    """Pictures drawn when they are read, each with the tensors of `targets.scene_targets`.

    In the train split a row is another scene in every epoch: nothing is seen twice.
    """

    def __init__(
        self,
        *,
        name: str,
        split: Split,
        rows: int,
        seed: int,
        image_size: int,
        patch_size: int,
        vis_processor: Any,
    ) -> None:
        self.name = name
        self.split = split
        self.rows = rows
        self.seed = seed
        self.image_size = image_size
        self.patch_size = patch_size
        self.vis_processor = vis_processor

    def __len__(self) -> int:
        return self.rows

    def load(self, index: int, *, seed: int) -> dict[str, Any]:
        """One row: image float32[3, H, W], index, and the labels."""
        scene = sample_scene(seed=seed if self.split == "train" else self.seed, split=self.split, index=index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image = self.vis_processor(render(scene, size=self.image_size))
        labels = scene_targets(scene, image_size=self.image_size, patch_size=self.patch_size)
        return {"image": image, "index": index, **labels}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Everything stacked along a first dimension B."""
        columns = {name: [sample[name] for sample in samples] for name in samples[0]}
        return {
            name: torch.stack(values) if isinstance(values[0], torch.Tensor) else torch.tensor(values)
            for name, values in columns.items()
        }

    def captions(self, index: int) -> list[str]:
        """None: these rows have labels, not texts."""
        return []

    def image(self, index: int) -> Image.Image:
        """The row's picture, unprocessed; of the run's own seed in every split."""
        return render(sample_scene(seed=self.seed, split=self.split, index=index), size=self.image_size)


@registry.register_builder("shapes_rendered")
class RenderedScenesBuilder:
    """Rendered scenes with labels of their objects; nothing is written to disk.

    Args:
        name: the dataset's, as in the config.
        train_rows, val_rows, test_rows: pictures per split; in training, per epoch.
        image_size, patch_size: in pixels; the labels say which object covers each patch.
        seed: of the val and test scenes (training scenes follow run.seed).
        vis_processor: `train` and `eval`, each with a `name` and that processor's keywords.
        ratio: how often a batch is drawn from this dataset in a mix.
    """

    def __init__(
        self,
        *,
        name: str,
        train_rows: int = 64_000,
        val_rows: int = 2_000,
        test_rows: int = 2_000,
        image_size: int = 64,
        patch_size: int = 8,
        seed: int = 0,
        vis_processor: Mapping[str, Any] | None = None,
        ratio: float | None = None,
    ) -> None:
        self.name = name
        self.ratio = ratio
        self._rows: dict[Split, int] = {"train": train_rows, "val": val_rows, "test": test_rows}
        self._sizes = {"image_size": image_size, "patch_size": patch_size}
        self._seed = seed
        sections = {**DEFAULT_VIS, **(vis_processor or {})}
        self._processors = {
            kind: build_processor(
                {"image_size": image_size, **sections[kind]}, where=f"datasets.{name}.vis_processor.{kind}"
            )
            for kind in ("train", "eval")
        }

    def build_datasets(self) -> dict[str, MapDataset]:
        """The three splits by name."""
        return {
            split: RenderedScenes(
                name=self.name,
                split=split,
                rows=self._rows[split],
                seed=self._seed,
                vis_processor=self._processors["train" if split == "train" else "eval"],
                **self._sizes,
            )
            for split in SPLITS
        }

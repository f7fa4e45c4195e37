"""Documents about scenes as token ids, made when they are read, for pre-training the language models."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import MapDataset
from lavis_lite.worlds.shapes.lm_documents import CONTEXTS, REPLY_WEIGHTS, TYPE_WEIGHTS, Document, document
from lavis_lite.worlds.shapes.lm_encoding import encode_opt, encode_t5
from lavis_lite.worlds.shapes.lm_hints import hints
from lavis_lite.worlds.shapes.lm_tokenizers import build_tokenizer
from lavis_lite.worlds.shapes.questions import TYPES
from lavis_lite.worlds.shapes.render import render
from lavis_lite.worlds.shapes.scene import SPLITS, Scene, Split, sample_scene

DEFAULT_CONTEXTS = {"full": 0.5, "plain": 0.08, "terse": 0.1, "loose": 0.06, "slots": 0.2, "none": 0.06}
# More than fit into a document, and than a T5 is asked at once.
REPLIES = {"opt": 8, "t5": 6}


class SceneDocuments:
    """Tokenised documents. In the train split a row is about another scene in every epoch."""

    def __init__(
        self,
        *,
        name: str,
        split: Split,
        rows: int,
        seed: int,
        family: str,
        max_length: int,
        contexts: Mapping[str, float],
        reply_weights: Mapping[str, float],
        type_weights: Mapping[str, float],
    ) -> None:
        self.name = name
        self.split = split
        self.rows = rows
        self.seed = seed
        self.family = family
        self.max_length = max_length
        self._weights = {
            "contexts": contexts,
            "reply_weights": reply_weights,
            "type_weights": type_weights,
        }
        self.tokenizer = build_tokenizer(family)

    def __len__(self) -> int:
        return self.rows

    def scene(self, index: int, *, seed: int | None = None) -> Scene:
        """The scene of a row; in training that of an epoch by its seed, or without one of an epoch that never comes."""
        drawn = self.seed if seed is None or self.split != "train" else seed
        return sample_scene(seed=drawn, split=self.split, index=index)

    def document(self, index: int, *, seed: int) -> Document:
        """The text of a row; of training scenes a function of (seed, index), of others the scene is fixed."""
        return self._document(self.scene(index, seed=seed), index, seed)

    def _document(self, scene: Scene, index: int, seed: int) -> Document:
        rng = random.Random(f"documents/{seed}/{index}")
        return document(scene, rng, replies=REPLIES[self.family], **self._weights)

    def load(self, index: int, *, seed: int) -> dict[str, Any]:
        """One row as token ids, see `lm_encoding`."""
        rng = random.Random(f"encoding/{seed}/{index}")
        scene = self.scene(index, seed=seed)
        text = self._document(scene, index, seed)
        if self.family == "opt":
            return {"index": index, **encode_opt(self.tokenizer, text, rng, max_length=self.max_length)}
        row = encode_t5(self.tokenizer, text, rng)
        words = self.tokenizer.convert_ids_to_tokens(row["input_ids"].tolist())
        return {"index": index, **row, "hints": hints(words, scene)}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Columns padded on the right with 0 (`<pad>`, no role), and `attention_mask` bool[B, T] of input_ids."""
        batch: dict[str, Any] = {"index": torch.tensor([sample["index"] for sample in samples])}
        for name, value in samples[0].items():
            if isinstance(value, Tensor):
                batch[name] = pad_sequence([sample[name] for sample in samples], batch_first=True)
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch["attention_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
        return batch

    def captions(self, index: int) -> list[str]:
        """None: these rows are documents."""
        return []

    def image(self, index: int) -> Image.Image:
        """The picture that the row's scene would be."""
        return render(self.scene(index))


@registry.register_builder("shapes_documents")
class SceneDocumentsBuilder:
    """Texts about scenes for pre-training a language model; nothing is written to disk.

    Args:
        name: the dataset's, as in the config.
        family: "opt" (a context and several replies in a row) or "t5" (one text, or a few answers).
        train_rows, val_rows, test_rows: documents per split; in training, per epoch.
        max_length: tokens of an "opt" document at most; it gets as many replies as fit.
        seed: of the val and test scenes (training scenes follow run.seed).
        contexts: how often a context has each form: full, plain, terse, loose, slots, none.
        reply_weights, type_weights: how often a reply is of a kind (answer, object, caption, description) and a
            question of a type, next to the others; those left out keep theirs.
        ratio: how often a batch is drawn from this dataset in a mix.

    Raises ConfigError for a form or type that there is not.
    """

    def __init__(
        self,
        *,
        name: str,
        family: str,
        train_rows: int = 64_000,
        val_rows: int = 2_000,
        test_rows: int = 2_000,
        max_length: int = 104,
        seed: int = 0,
        contexts: Mapping[str, float] | None = None,
        reply_weights: Mapping[str, float] | None = None,
        type_weights: Mapping[str, float] | None = None,
        ratio: float | None = None,
    ) -> None:
        self.name = name
        self.ratio = ratio
        self._rows: dict[Split, int] = {"train": train_rows, "val": val_rows, "test": test_rows}
        self._options: dict[str, Any] = {
            "family": family,
            "max_length": max_length,
            "seed": seed,
            "contexts": dict(contexts or DEFAULT_CONTEXTS),
            "reply_weights": {**REPLY_WEIGHTS, **(reply_weights or {})},
            "type_weights": {**TYPE_WEIGHTS, **(type_weights or {})},
        }
        forms = {
            "contexts": (*CONTEXTS, "none"),
            "reply_weights": tuple(REPLY_WEIGHTS),
            "type_weights": TYPES,
        }
        for option, known in forms.items():
            unknown = sorted(set(self._options[option]) - set(known))
            if unknown:
                raise ConfigError(
                    f"datasets.{name}.{option}: no {', '.join(unknown)}; there are {', '.join(known)}"
                )

    def build_datasets(self) -> dict[str, MapDataset]:
        """The three splits by name."""
        return {
            split: SceneDocuments(name=self.name, split=split, rows=self._rows[split], **self._options)
            for split in SPLITS
        }

"""A BLIP-2 of a few thousand parameters for tests: its encoder, its tokenizer, its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis_lite.common.registry import registry

WORDS = ["a", "red", "blue", "dog", "cat", "on", "the", "mat", "sits", "runs", "##s", "big", "small", "and"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CAPTIONS = ["a red dog", "the big blue cat sits on a mat", "a cat and a small dog runs", "dogs"]


@registry.register_vision_encoder("tiny_patches")
class TinyPatches(nn.Module):
    """Patches of 8x8 pixels through one linear layer, with dropout to tell train mode from eval mode."""

    def __init__(self, width: int = 24, image_size: int = 16, dropout: float = 0.5) -> None:
        super().__init__()
        self.num_features = width
        self.image_size = image_size
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor) -> Tensor:
        return self.dropout(self.patches(image).flatten(2).transpose(1, 2))


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> str:
    """A WordPiece tokenizer's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + words) + "\n")
    return str(folder)


def tiny_config(tokenizer: str, **changes: Any) -> dict[str, Any]:
    """A model section; `qformer` and `vision_encoder` in `changes` are laid over the tiny ones."""
    qformer = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 40,
        "num_query_token": 5,
        "dropout": 0.0,
        "max_position_embeddings": 20,
    }
    config: dict[str, Any] = {
        "vision_encoder": {"name": "tiny_patches", **changes.pop("vision_encoder", {})},
        "qformer": {**qformer, **changes.pop("qformer", {})},
        "tokenizer": tokenizer,
        "max_txt_len": 12,
        "embed_dim": 16,
    }
    return {**config, **changes}


def tiny_samples(batch: int = 4, *, seed: int = 0) -> dict[str, Any]:
    """Images of noise with captions of different lengths."""
    image = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    texts = [CAPTIONS[row % len(CAPTIONS)] for row in range(batch)]
    return {"image": image, "text_input": texts, "image_id": torch.arange(batch)}


def enlarge_weights(model: nn.Module, *, seed: int = 0, std: float = 0.2) -> None:
    """Random weights large enough that a wrong mask or a swapped weight shows in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                parameter += torch.randn(parameter.shape, generator=generator) * std

"""A model without training whose vectors are known, and pictures that it tells apart, for the tests of search.

Run as a script it builds an index slowly, for a test that kills it: search_world.py PICTURES IDX LOG.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from lavis_lite.search import BuildOptions, Encoder, build_index, open_index
from lavis_lite.search.journal import write_part
from lavis_lite.search.manifest import Manifest
from lavis_lite.search.store import Store

QUERIES, WIDTH = 3, 8


class Tokens(list[str]):
    """Texts as the model's tokens."""


class Colours(nn.Module):
    """Vectors drawn by a picture's first pixel; a text "a b c" is near the pictures of that pixel."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.query_tokens = nn.Parameter(torch.zeros(1, QUERIES, 4))
        self.vision_proj = nn.Linear(3, WIDTH)
        self.temp = nn.Parameter(torch.tensor(0.1))
        self.table = nn.Parameter(torch.randn(3, QUERIES * WIDTH, generator=draw))
        self.images_seen = self.texts_seen = 0

    @property
    def device(self) -> torch.device:
        return self.temp.device

    def encode_image(self, image: Tensor) -> Tensor:
        self.images_seen += len(image)
        return image[:, :, 0, 0][:, None]

    def project_image(self, embeds: Tensor) -> Tensor:
        return embeds[:, 0]

    def query_features(self, embeds: Tensor) -> Tensor:
        return normalize((embeds[:, 0] @ self.table).unflatten(1, (QUERIES, WIDTH)), dim=-1)

    def tokenize(self, texts: list[str]) -> Tokens:
        self.texts_seen += len(texts)
        return Tokens(texts)

    def text_features(self, tokens: Tokens) -> Tensor:
        pixels = torch.tensor([[float(part) for part in text.split()] for text in tokens]) / 255
        return normalize((pixels @ self.table).unflatten(1, (QUERIES, WIDTH))[:, 1], dim=-1)

    def project_text(self, tokens: Tokens) -> Tensor:
        return torch.zeros(len(tokens))

    def match_logits(self, image_kv: Tensor, texts: Tensor) -> Tensor:
        """The less blue, the better it matches."""
        assert len(texts) == len(image_kv)
        return torch.stack([torch.zeros(len(image_kv)), 5 - 9 * image_kv[:, 2]], 1)


def pixels_of(picture: Image.Image) -> Tensor:
    """float32[3, 1, 1] of a picture's corner."""
    return torch.tensor(picture.getpixel((0, 0)), dtype=torch.float32)[:, None, None] / 255


def colour_encoder(seed: int = 0) -> Encoder:
    """An encoder as `load_encoder` gives one."""
    identity = {"model": "colours/test", "checkpoint": None, "fingerprint": f"{seed:032x}"}
    return Encoder(Colours(seed).eval(), pixels_of, str.strip, identity)


def save_pictures(folder: Path, count: int, *, seed: int = 0) -> list[tuple[int, int, int]]:
    """`count` PNG files of one colour each, 000.png, 001.png, ...; their colours."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    colours = [tuple(int(c) for c in draw.integers(1, 256, 3)) for _ in range(count)]
    for number, colour in enumerate(colours):
        Image.new("RGB", (4, 4), colour).save(folder / f"{number:03}.png")
    return colours


def built_index(folder: Path) -> Path:
    """The index of twelve pictures in <folder>/pictures."""
    save_pictures(folder / "pictures", 12)
    build_index(folder / "pictures", folder / "idx", colour_encoder())
    return folder / "idx"


def names_of(index: Path) -> list[str]:
    """The pictures' names in an index, without their folders."""
    return [Path(name).name for _, name in open_index(index).store.names()]


def interrupted(
    folder: Path, *, batches: int, images: str = "pictures", change: Callable[..., Any] = build_index
) -> None:
    """A build (or add) of two pictures a batch that fails after some."""
    encoder = colour_encoder()
    encode, left = encoder.encode_images, iter(range(batches))

    def failing(tensor: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return encode(tensor)  # type: ignore[arg-type]

    encoder.encode_images = failing  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        change(folder / images, folder / "idx", encoder, BuildOptions(batch_size=2))


def make_store(root: Path, vectors: Tensor, *, dtype: str = "fp32") -> Store:
    """Vectors float32[N, Q, E] as the part of an index."""
    numbers: Any = vectors.numpy().astype({"fp16": np.float16, "fp32": np.float32}[dtype])
    names = [f"/pictures/{row}.jpg" for row in range(len(vectors))]
    part = write_part(root, names, lambda target: target.write_bytes(numbers.tobytes()))
    identity = {"model": "none", "checkpoint": None, "fingerprint": "0"}
    return Store(root, Manifest(identity, vectors.shape[1], vectors.shape[2], dtype, parts=(part,)))


def slow_scores(query: Tensor, images: Tensor) -> list[float]:
    """The definition with loops: mean over the query's vectors of the largest product with one of the image's."""
    found = []
    for image in images.double():
        best = [max(float(own @ vector) for own in image) for vector in query.double()]
        found.append(sum(best) / len(best))
    return found


def main(pictures: str, out: str, log: str) -> None:
    """Build an index with a pause after each batch, noting the pictures of each batch as they are encoded."""
    encoder, processed = colour_encoder(), pixels_of

    def noted(picture: Image.Image) -> Tensor:
        with open(log, "a") as file:
            print(picture.getpixel((0, 0)), file=file)
        return processed(picture)

    encode = encoder.encode_images

    def slowly(images: Tensor) -> Tensor:
        time.sleep(0.2)
        return encode(images)

    encoder.processor, encoder.encode_images = noted, slowly  # type: ignore[method-assign]
    build_index(pictures, out, encoder, BuildOptions(batch_size=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])

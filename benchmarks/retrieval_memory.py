"""Host memory of a retrieval evaluation whose image features don't fit: COCO's test split at 364 pixels.

    python benchmarks/retrieval_memory.py [--images 5000] [--image-tokens 677] [--candidates 128] [--json result.json]

The evaluation is the real one, 5 captions an image, candidates both ways; the model is a stand-in that computes
next to nothing and holds what a real one does: features of ViT-g's shape, an image's keys and values for six
cross-attentions of BERT-base's width, queries and text of every text begun. So what is measured is the evaluation's own
memory: the peak beyond what the process held when the evaluation began. What a real model needs within a layer comes on
top. The features alone would be 19 GB in fp32.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import show, surroundings
from torch import Tensor, nn
from torch.nn.functional import normalize

from lavis_lite.models.qformer_states import ImageKV, PairStart
from lavis_lite.tasks.base import EvalArgs
from lavis_lite.tasks.pretrain import ImageTextPretrainTask

IMAGE_WIDTH, QUERIES, PROJECTION, CAPTIONS = 1408, 32, 256, 5
WIDTH, CROSS_ATTENTIONS = 768, 6


class Pictures:
    """Images that are their number, each with five captions of its own."""

    name = "pictures"

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def load(self, index: int, *, seed: int) -> dict[str, int]:
        return {"index": index}

    def collate(self, samples: list[dict[str, int]]) -> dict[str, Any]:
        index = torch.tensor([sample["index"] for sample in samples])
        return {"image": index[:, None, None, None].float(), "image_id": index, "index": index}

    def captions(self, index: int) -> list[str]:
        return [f"{index} {number}" for number in range(CAPTIONS)]


@dataclass
class Tokens:
    """Texts of 8 to 16 tokens."""

    numbers: Tensor
    attention_mask: Tensor

    def __getitem__(self, rows: Tensor) -> Tokens:
        return Tokens(self.numbers[rows], self.attention_mask[rows])

    def trimmed(self) -> Tokens:
        return self


class StandIn(nn.Module):
    """Features, keys and values, and begun texts of the right shape from a number; hardly anything is looked at."""

    def __init__(self, image_tokens: int) -> None:
        super().__init__()
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.pattern = nn.Parameter(torch.randn(1, image_tokens, IMAGE_WIDTH))
        self.queries = nn.Parameter(torch.randn(1, QUERIES, PROJECTION))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.pattern + image.flatten(1)[:, None] * 1e-4

    def project_image(self, image_embeds: Tensor) -> ImageKV:
        return ImageKV(
            tuple(
                (image_embeds[..., :WIDTH].clone(), image_embeds[..., -WIDTH:].clone())
                for _ in range(CROSS_ATTENTIONS)
            )
        )

    def query_features(self, image_embeds: Tensor) -> Tensor:
        return normalize(self.queries + image_embeds[:, :QUERIES, :PROJECTION].sin(), dim=-1)

    def tokenize(self, texts: list[str]) -> Tokens:
        numbers = torch.arange(len(texts))
        return Tokens(numbers, torch.arange(16) < 8 + numbers[:, None] % 9)

    def text_features(self, tokens: Tokens) -> Tensor:
        seed = tokens.numbers[:, None] * 0.37 + torch.arange(PROJECTION) ** 2
        return normalize(seed.sin(), dim=-1)

    def project_text(self, tokens: Tokens) -> PairStart:
        numbers = tokens.numbers[:, None, None].float()
        length = tokens.attention_mask.shape[1]
        return PairStart(
            numbers.expand(-1, QUERIES, WIDTH).clone(),
            numbers.expand(-1, length, WIDTH).clone(),
            tokens.attention_mask,
        )

    def match_logits(self, images: Sequence[tuple[ImageKV, int]], texts: PairStart) -> Tensor:
        keys = ((image.layers[0], each) for image, each in images)
        seen = torch.cat([kv[0][:, 0, :1].repeat_interleave(each, dim=0) for kv, each in keys if kv])
        return torch.cat([seen, texts.text[:, 0, :1].cos()], dim=1)


def peak_bytes() -> int:
    """This process's largest resident size so far."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print peak memory and time as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--image-tokens", type=int, default=677)
    parser.add_argument("--candidates", type=int, default=128, help="of an image, and of a text")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    args = parser.parse_args(arguments)
    model, data = StandIn(args.image_tokens), Pictures(args.images)
    task = ImageTextPretrainTask(k_test=args.candidates, loss_batches=0, num_examples=0)
    before, began = peak_bytes(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        task.evaluate(model, data, loader_args=EvalArgs(batch_size=16, folder=Path(folder)))
    numbers = args.images * args.image_tokens * IMAGE_WIDTH
    result = {
        "images": args.images,
        "candidates": args.candidates,
        "feature_bytes": {"fp32": 4 * numbers, "fp16": 2 * numbers},
        "peak_bytes_beyond_start": peak_bytes() - before,
        "seconds": time.monotonic() - began,
        **surroundings(),
    }
    print(f"{args.images} images: {result['peak_bytes_beyond_start'] / 1e9:.2f} GB beyond the start")
    show(result, args.json)


if __name__ == "__main__":
    main()

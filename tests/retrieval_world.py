"""A tiny model and dataset with everything a retrieval evaluation asks for, and that evaluation done slowly.

Run as a script under torchrun's environment, it prints the metrics of every rank as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lavis_lite.common import dist
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.tasks import feature_spool
from lavis_lite.tasks.base import EvalArgs
from lavis_lite.tasks.gallery import encode_gallery
from lavis_lite.tasks.pretrain import ImageTextPretrainTask

WORDS = [f"w{number}" for number in range(40)]


class Pictures:
    """N noise pictures with one to three captions of two to seven words; some rows can't be read."""

    def __init__(self, size: int = 23, *, unreadable: tuple[int, ...] = (), seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.name = "pictures"
        self.pixels = torch.randn(size, 3, 4, 4, generator=draw)
        self.ids = list(range(100, 100 + size))
        self.unreadable = set(unreadable)
        self.texts = [
            [
                " ".join(WORDS[int(w)] for w in torch.randint(40, (2 + (row * 5 + n) % 6,), generator=draw))
                for n in range(1 + row % 3)
            ]
            for row in range(size)
        ]

    def __len__(self) -> int:
        return len(self.texts)

    def load(self, index: int, *, seed: int) -> dict[str, Any]:
        if index in self.unreadable:
            raise UnreadableSample(f"picture {index}", "truncated")
        drawn = torch.randint(len(self.texts[index]), (), generator=torch.Generator().manual_seed(seed))
        text = self.texts[index][int(drawn)]
        return {"image": self.pixels[index], "text_input": text, "image_id": self.ids[index], "index": index}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "image": torch.stack([sample["image"] for sample in samples]),
            "text_input": [sample["text_input"] for sample in samples],
            "image_id": torch.tensor([sample["image_id"] for sample in samples]),
            "index": torch.tensor([sample["index"] for sample in samples]),
        }

    def captions(self, index: int) -> list[str]:
        return self.texts[index]

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (300, 200), (index * 10 % 256, 90, 160))


@dataclass
class Tokens:
    input_ids: Tensor
    attention_mask: Tensor

    def __getitem__(self, rows: Tensor) -> Tokens:
        return Tokens(self.input_ids[rows], self.attention_mask[rows])

    def trimmed(self) -> Tokens:
        longest = int(self.attention_mask.sum(1).max())
        return Tokens(self.input_ids[:, :longest], self.attention_mask[:, :longest])


class Matcher(nn.Module):
    """Random but fixed similarity and match scores; counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.temp = nn.Parameter(torch.tensor(0.1))
        self.queries = nn.Linear(12, 3 * 8)
        self.words = nn.Embedding(41, 8)
        self.match = nn.Linear(12 + 8, 2)
        self.dropout = nn.Dropout(0.5)
        self.images_seen = self.texts_seen = self.texts_projected = self.pairs_seen = 0
        self.batches: list[list[str]] = []

    def encode_image(self, image: Tensor) -> Tensor:
        self.images_seen += len(image)
        return image.flatten(2).transpose(1, 2).reshape(len(image), 4, 12)

    def project_image(self, image_embeds: Tensor) -> Tensor:
        return image_embeds.mean(1)

    def query_features(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.queries(self.project_image(images)).unflatten(1, (3, 8)), dim=-1)

    def tokenize(self, texts: list[str]) -> Tokens:
        words = [[1 + WORDS.index(word) for word in text.split()] for text in texts]
        longest = max(len(ids) for ids in words)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in words])
        return Tokens(ids, ids > 0)

    def _mean(self, tokens: Tokens) -> Tensor:
        mask = tokens.attention_mask.unsqueeze(-1)
        return (self.words(tokens.input_ids) * mask).sum(1) / mask.sum(1)

    def text_features(self, tokens: Tokens) -> Tensor:
        self.texts_seen += len(tokens.input_ids)
        return nn.functional.normalize(self._mean(tokens), dim=-1)

    def project_text(self, tokens: Tokens) -> Tokens:
        self.texts_projected += len(tokens.input_ids)
        return tokens

    def match_logits(self, images: list[tuple[Tensor, int]], texts: Tokens) -> Tensor:
        self.pairs_seen += len(texts.input_ids)
        image_kv = torch.cat([kv.repeat_interleave(each, dim=0) for kv, each in images])
        return self.match(torch.cat([image_kv, self._mean(texts)], dim=1)) * 3

    def forward(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        self.batches.append(samples["text_input"])
        image_kv = self.project_image(self.encode_image(samples["image"]))
        noise = torch.rand(()) * dist.world_size()
        loss = self.dropout(image_kv).square().mean() + noise
        return {"loss": loss, "loss_itc": loss / 2, "itm_acc": noise / 9, "features": image_kv}


def slow_retrieval(model: Matcher, data: Pictures, k: int, form: str) -> dict[str, float]:
    """Retrieval metrics by sorting lists, pair by pair; assumes no ties and no equal captions."""
    rows = [row for row in range(len(data)) if row not in data.unreadable]
    pairs = [(row, text) for row in rows for text in data.texts[row]]
    cosine: dict[tuple[int, int], float] = {}
    second: dict[tuple[int, int], float] = {}
    with torch.no_grad():
        for row in rows:
            image_embeds = model.encode_image(data.pixels[row][None])
            kv = model.project_image(image_embeds)
            for number, (_, text) in enumerate(pairs):
                tokens = model.tokenize([text])
                s = float((model.query_features(image_embeds)[0] @ model.text_features(tokens)[0]).max())
                no, yes = model.match_logits([(kv, 1)], tokens)[0].tolist()
                cosine[row, number] = s
                second[row, number] = {"itm": yes - no, "sum": yes - no + s / 0.1, "lavis": yes + s}[form]
    metrics: dict[str, float] = {}
    for name in ("itc", "rerank"):
        text_ranks, image_ranks = [], []
        for row in rows:
            order = sorted(range(len(pairs)), key=lambda number: -cosine[row, number])
            if name == "rerank":
                order = sorted(order[:k], key=lambda number: -second[row, number]) + order[k:]
            text_ranks.append(next(place for place, number in enumerate(order, 1) if pairs[number][0] == row))
        for number, (right, _) in enumerate(pairs):
            order = sorted(rows, key=lambda row: -cosine[row, number])
            if name == "rerank":
                order = sorted(order[:k], key=lambda row: -second[row, number]) + order[k:]
            image_ranks.append(order.index(right) + 1)
        for way, found in (("tr", text_ranks), ("ir", image_ranks)):
            metrics |= {f"{name}/{way}_r{at}": sum(r <= at for r in found) / len(found) for at in (1, 5, 10)}
            metrics[f"{name}/{way}_mean_rank"] = sum(found) / len(found)
        metrics[f"{name}/r1_mean"] = (metrics[f"{name}/tr_r1"] + metrics[f"{name}/ir_r1"]) / 2
    return metrics


def write_of_rank(found: Any) -> None:
    """Write what this rank measured to <first argument>/<rank>.json, the last thing a process of ranks does."""
    with open(f"{sys.argv[1]}/{os.environ.get('RANK', '0')}.json", "w") as file:
        json.dump(found, file)
    dist.shutdown()


def main() -> None:
    dist.init()
    task = ImageTextPretrainTask(k_test=5, loss_batch_size=4)
    args = EvalArgs(batch_size=3, max_bad_fraction=0.5, folder=Path(sys.argv[1]) / "evaluation")
    found = []
    for size in (23, 1):
        data = Pictures(size, unreadable=(4, 11) if size > 1 else ())
        found.append(task.evaluate(Matcher(), data, loader_args=args).metrics)
    # More than one of two processes has of 23 images, and less than all of them.
    feature_spool.MEMORY_LIMIT = 15 * 4 * 48
    with torch.inference_mode():
        embeds = encode_gallery(Matcher(), Pictures(), args).embeds
    found.append({"on_disk": embeds is not None and embeds.on_disk})
    write_of_rank(found)


if __name__ == "__main__":
    main()

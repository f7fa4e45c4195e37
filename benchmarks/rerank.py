"""ITM scores of an image's candidate texts at BERT-base size: ours against scoring the pairs one would first write.

    python benchmarks/rerank.py [--image-tokens 257 677] [--precisions fp32 bf16] [--texts 128] [--rounds 3]

Plain: Hugging Face's Q-Former with explicit attention, every pair complete: the image repeated and projected to keys
and values for each pair, texts padded to 35 tokens. Ours: `match_candidates`, what a retrieval evaluation calls. Both
have the same weights, random, on the same random features of width 1408 (257 tokens: 224 pixels; 677: 364) and texts
of the lengths of COCO's captions, and must agree before anything is timed: to 1e-4 in fp32. Rounds alternate in one
process; a ratio is the median over rounds of plain time / our time, above 1 where ours is faster. Beside it stands the
ratio of the two sides' arithmetic (torch's count of it), which is what one might expect of equally good kernels.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from stage1_step import (
    CLS,
    IMAGE_WIDTH,
    QUERIES,
    SEP,
    VOCABULARY,
    Plain,
    caption_lengths,
    copy_weights,
    make_ours,
)
from timing import count_flop, show, surroundings, time_alternately
from torch import Tensor

from lavis_lite.common.device import autocast
from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.models.tokenizer import TextTokens
from lavis_lite.tasks.base import EvalArgs
from lavis_lite.tasks.feature_spool import FeatureSpool
from lavis_lite.tasks.gallery import Gallery
from lavis_lite.tasks.rerank import match_candidates

MAX_TEXT = 35
PLAIN_BATCH = 32
LARGEST_DIFFERENCE = {"fp32": 1e-4, "bf16": 0.05}


def draw_texts(count: int, generator: torch.Generator) -> TextTokens:
    """Random texts, padded to 35 tokens."""
    lengths = torch.tensor(caption_lengths("coco", count, generator))
    ids = torch.randint(5, VOCABULARY, (count, MAX_TEXT), generator=generator)
    ids[:, 0] = CLS
    ids[torch.arange(count), lengths - 1] = SEP
    mask = torch.arange(MAX_TEXT) < lengths[:, None]
    return TextTokens(ids * mask, mask)


def make_gallery(features: Tensor, tokens: TextTokens) -> Gallery:
    """One image with all texts as its candidates."""
    embeds = FeatureSpool(len(features))
    embeds.append(features)
    return Gallery(
        rows=[0],
        texts=["" for _ in range(len(tokens))],
        image_of_text=torch.zeros(len(tokens), dtype=torch.long),
        similarity=torch.arange(len(tokens), 0, -1.0)[None],
        tokens=tokens,
        text_lengths=tokens.attention_mask.sum(1),
        mine=torch.zeros(1, dtype=torch.long),
        embeds=embeds,
        unreadable=0,
    )


@torch.no_grad()
def plain_scores(plain: Plain, features: Tensor, tokens: TextTokens, precision: str) -> Tensor:
    """Logits [B, 2] of one image with each text, nothing shared."""
    found = []
    for rows in torch.arange(len(tokens)).split(PLAIN_BATCH):
        ids, mask = tokens.input_ids[rows], tokens.attention_mask[rows].long()
        with autocast(features.device, precision):
            hf, image = plain.hf, plain.ln_vision(features).expand(len(rows), -1, -1).contiguous()
            queries = hf.query_tokens.expand(len(rows), -1, -1)
            paired = hf.qformer(
                query_embeds=hf.embeddings(input_ids=ids, query_embeds=queries),
                query_length=QUERIES,
                attention_mask=torch.cat([mask.new_ones(len(rows), QUERIES), mask], 1),
                encoder_hidden_states=image,
            ).last_hidden_state[:, :QUERIES]
            found.append(hf.itm_head(paired).mean(1).float())
    return torch.cat(found)


@torch.no_grad()
def our_scores(ours: Blip2QFormer, features: Tensor, tokens: TextTokens, precision: str) -> Tensor:
    """The same logits by the path of an evaluation."""
    gallery = make_gallery(ours.ln_vision(features), tokens)
    return match_candidates(ours, gallery, len(tokens), EvalArgs(precision=precision)).text_logits[0]


def compare(
    plain: Plain, ours: Blip2QFormer, features: Tensor, tokens: TextTokens, precision: str, rounds: int
) -> dict[str, Any]:
    """Check that the scores agree in a first round, which warms up, too; then time alternating rounds."""
    sides: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: plain_scores(plain, features, tokens, precision),
        "ours": lambda: our_scores(ours, features, tokens, precision),
    }
    scores, flop = {}, {}
    for name, side in sides.items():
        with count_flop() as counter:
            scores[name] = side()
        flop[name] = counter.get_total_flops()
    difference = float((scores["plain"] - scores["ours"]).abs().max())
    if not difference < LARGEST_DIFFERENCE[precision]:
        raise SystemExit(f"scores differ by {difference}, so there is nothing to compare")
    result = {**time_alternately(sides, rounds), "largest_difference": difference}
    return {**result, "flop": flop, "flop_ratio": flop["plain"] / flop["ours"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table and the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-tokens", nargs="+", type=int, default=[257, 677])
    parser.add_argument("--precisions", nargs="+", choices=list(LARGEST_DIFFERENCE), default=["fp32", "bf16"])
    parser.add_argument("--texts", type=int, default=128, help="candidates of the image")
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed rounds of each side, after one to warm up"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there, too")
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = Plain().eval(), make_ours(Path(folder)).eval()
    copy_weights(plain, ours)
    result: dict[str, Any] = {"texts": args.texts, "rounds": args.rounds, **surroundings(), "cases": []}
    print(f"{'tokens':>7}{'precision':>11}{'plain s':>10}{'ours s':>9}{'ratio':>7}{'FLOP':>7}  (rounds)")
    for count in args.image_tokens:
        features, tokens = (
            torch.randn(1, count, IMAGE_WIDTH, generator=generator),
            draw_texts(args.texts, generator),
        )
        for precision in args.precisions:
            case = compare(plain, ours, features, tokens, precision, args.rounds)
            result["cases"].append({"image_tokens": count, "precision": precision, **case})
            seconds, (low, high) = case["seconds"], case["ratio_range"]
            print(
                f"{count:7}{precision:>11}{seconds['plain']:10.2f}{seconds['ours']:9.2f}"
                f"{case['ratio']:6.2f}x{case['flop_ratio']:6.2f}x  ({low:.2f} to {high:.2f})",
                flush=True,
            )
    show(result, args.json)


if __name__ == "__main__":
    main()

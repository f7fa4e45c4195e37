"""Generation: ours against Hugging Face's `Blip2ForConditionalGeneration.generate` with the same weights.

    python benchmarks/generate.py [--batches 1 16] [--beams 1 5] [--rounds 5] [--json result.json]

Both go from images and the prompt "a photo of" to texts of 20 new tokens, tokenizer and detokenizer included, greedily
and with five beams, for OPT's family and T5's, at random weights of moderate size (`blip2_pair.py`). The token ids must
agree before anything is timed. Rounds alternate in one process, so that both see the same machine; a ratio is the
median over rounds of their time / our time, above 1 where ours is faster.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blip2_pair import (
    FAMILIES,
    IMAGE,
    MODERATE,
    PROMPT,
    TINY,
    Family,
    Sizes,
    copy_weights,
    draw_images,
    make_ours,
    make_theirs,
)
from timing import show, surroundings, time_alternately
from torch import Tensor


class Pair:
    """Both models of a family, and what a user calls to get texts from them."""

    def __init__(self, family: Family, sizes: Sizes, *, seed: int) -> None:
        self.theirs = make_theirs(family, sizes, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            self.ours = make_ours(family, sizes, Path(folder)).eval()
            self.tokenizer = self.ours.language_model.tokenizer
        copy_weights(self.theirs, self.ours)
        self.decoder_only = family == "opt"
        self.queries = sizes.queries

    def their_texts(self, images: Tensor, beams: int, new_tokens: int) -> list[str]:
        """By Hugging Face, with the image's places before the prompt as its processor puts them."""
        places = [self.tokenizer.convert_tokens_to_ids(IMAGE)] * self.queries
        ids = torch.tensor([[*places, *self.tokenizer(PROMPT)["input_ids"]]] * len(images))
        said = self.theirs.generate(
            pixel_values=images,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=new_tokens,
        )
        new = said[:, ids.shape[1] :] if self.decoder_only else said[:, 1:]
        return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))

    def our_texts(self, images: Tensor, beams: int, new_tokens: int) -> list[str]:
        """By our model."""
        samples = {"image": images, "prompt": PROMPT}
        return self.ours.generate(samples, num_beams=beams, max_new_tokens=new_tokens, min_length=0)

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """What was said: every token of this tokenizer is a word, so that texts are equal when token ids are."""
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def compare(pair: Pair, images: Tensor, beams: int, *, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Check that both say the same in a first round, which warms up, too; then time alternating rounds."""
    sides: dict[str, Callable[[Tensor, int, int], list[str]]] = {
        "theirs": pair.their_texts,
        "ours": pair.our_texts,
    }
    said = {name: pair.ids_of(side(images, beams, new_tokens)) for name, side in sides.items()}
    if said["theirs"] != said["ours"]:
        raise SystemExit(f"token ids differ, so there is nothing to compare: {said}")
    timed = time_alternately(
        {name: partial(side, images, beams, new_tokens) for name, side in sides.items()}, rounds
    )
    return {
        "batch_size": len(images),
        "beams": beams,
        **timed,
        "different_texts": len({tuple(ids) for ids in said["ours"]}),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table and the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed rounds of each side, after one to warm up"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="tiny models: to try the script, not to measure")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    args = parser.parse_args(arguments)
    sizes = TINY if args.tiny else MODERATE
    generator = torch.Generator().manual_seed(args.seed)
    result: dict[str, Any] = {
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        **surroundings(),
        "cases": [],
    }
    print(
        f"{'family':8}{'batch':>6}{'beams':>6}{'theirs s':>10}{'ours s':>9}{'ratio':>7}  (rounds){'cpu ratio':>14}"
    )
    for family in args.families:
        pair = Pair(family, sizes, seed=args.seed)
        for batch, beams in itertools.product(args.batches, args.beams):
            images = draw_images(batch, sizes, generator)
            case = compare(pair, images, beams, new_tokens=args.new_tokens, rounds=args.rounds)
            result["cases"].append({"family": family, **case})
            seconds, (low, high) = case["seconds"], case["ratio_range"]
            print(
                f"{family:8}{batch:6}{beams:6}{seconds['theirs']:10.3f}{seconds['ours']:9.3f}{case['ratio']:6.2f}x"
                f"  ({low:.2f} to {high:.2f}){case['ratio_cpu_time']:7.2f}x",
                flush=True,
            )
    show(result, args.json)


if __name__ == "__main__":
    main()

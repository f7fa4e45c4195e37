"""Ranking a closed list of answers: visual prompt and question read once an image, against once an answer.

    python benchmarks/vqa_rank.py [--images 1 8] [--answers 128] [--rounds 5] [--json result.json]

Both score every answer of the list for every image by the language model's likelihood, at random weights of moderate
size (`blip2_pair.py`), for OPT's family and T5's. The plain side repeats visual prompt and question for each answer and
scores the rows by the training loss, as many at once as ours does; the visual prompt itself is computed once on both
sides. The scores must agree before anything is timed. Rounds alternate in one process; a ratio is the median over
rounds of their time / our time, above 1 where ours is faster.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from blip2_pair import (
    FAMILIES,
    MODERATE,
    PROMPT,
    TINY,
    Family,
    Sizes,
    copy_weights,
    draw_images,
    make_ours,
    make_theirs,
    word_count,
)
from timing import show, surroundings, time_alternately
from torch import Tensor

from lavis_lite.models.blip2_generative import Blip2Generative
from lavis_lite.models.ranking import PAIRS

TEMPLATE = PROMPT + " {}"
# Of log p, which fp32 sums of some tens of nats hold to about 1e-6 of their size.
LARGEST_DIFFERENCE = 1e-5


class Plain:
    """The same model, asked as one would without thinking of what answers have in common."""

    def __init__(self, model: Blip2Generative) -> None:
        self.model = model

    @torch.no_grad()
    def scores(self, images: Tensor, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """log p of each answer for each image, [B, A]."""
        lm, length = self.model.language_model, self.model.max_txt_len
        visual = self.model.visual_prompt(images)
        prompts = [TEMPLATE.replace("{}", question) for question in questions]
        pairs = [(row, answer) for row in range(len(images)) for answer in answers]
        sums = []
        for start in range(0, len(pairs), PAIRS):
            some = pairs[start : start + PAIRS]
            rows, said = [row for row, _ in some], [answer for _, answer in some]
            losses = lm.answer_losses(visual[rows], [prompts[row] for row in rows], said, max_length=length)
            lengths = [len(ids) for ids in lm.answer_ids(prompts[:1], said, max_length=length)[0]]
            sums += [-part.sum() for part in losses.split(lengths)]
        return torch.stack(sums).unflatten(0, (len(images), len(answers)))


def build(family: Family, sizes: Sizes, *, seed: int) -> Blip2Generative:
    """Our model at random weights that tell answers apart, with its tokenizer in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_ours(family, sizes, Path(folder)).eval()
        assert model.language_model.tokenizer is not None  # read while its files are there
    copy_weights(make_theirs(family, sizes, seed=seed), model)
    return model


def draw_words(count: int, family: Family, sizes: Sizes, draw: random.Random, *, longest: int) -> list[str]:
    """Different texts of 1 to `longest` words."""
    texts: dict[str, None] = {}
    while len(texts) < count:
        words = (f"w{draw.randrange(word_count(family, sizes))}" for _ in range(draw.randint(1, longest)))
        texts[" ".join(words)] = None
    return list(texts)


def compare(
    model: Blip2Generative,
    plain: Plain,
    images: Tensor,
    asked: Sequence[str],
    answers: list[str],
    rounds: int,
) -> dict[str, Any]:
    """Check that both give the same scores in a first round, which warms up, too; then time alternating rounds."""
    samples = {"image": images, "text_input": list(asked)}

    def ours() -> Tensor:
        return model.score_answers(samples, answers, prompt=TEMPLATE, num_ans_candidates=len(answers))

    sides: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: plain.scores(images, asked, answers),
        "ours": ours,
    }
    theirs, own = sides["plain"](), sides["ours"]()
    difference = float((theirs - own).abs().max())
    relative = float(((theirs - own) / theirs).abs().max())
    if not relative < LARGEST_DIFFERENCE:
        raise SystemExit(f"scores differ by {relative:.1e} of their size, so there is nothing to compare")
    return {
        "images": len(images),
        "answers": len(answers),
        **time_alternately(sides, rounds),
        "largest_difference": difference,
        "largest_relative_difference": relative,
        "mean_score": float(theirs.mean()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table and the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--images", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--answers", type=int, default=128)
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed rounds of each side, after one to warm up"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="tiny models: to try the script, not to measure")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    args = parser.parse_args(arguments)
    sizes = TINY if args.tiny else MODERATE
    generator, draw = torch.Generator().manual_seed(args.seed), random.Random(args.seed)
    result: dict[str, Any] = {
        "rounds": args.rounds,
        **surroundings(),
        "cases": [],
    }
    print(
        f"{'family':8}{'images':>7}{'answers':>8}{'plain s':>10}{'ours s':>9}{'ratio':>7}{'difference':>12}  (rounds)"
    )
    for family in args.families:
        model = build(family, sizes, seed=args.seed)
        answers = draw_words(args.answers, family, sizes, draw, longest=3)
        for count in args.images:
            images = draw_images(count, sizes, generator)
            asked = draw_words(count, family, sizes, draw, longest=8)
            case = compare(model, Plain(model), images, asked, answers, args.rounds)
            result["cases"].append({"family": family, **case})
            seconds, (low, high) = case["seconds"], case["ratio_range"]
            print(
                f"{family:8}{count:7}{args.answers:8}{seconds['plain']:10.3f}{seconds['ours']:9.3f}"
                f"{case['ratio']:6.2f}x{case['largest_relative_difference']:12.1e}  ({low:.2f} to {high:.2f})",
                flush=True,
            )
    show(result, args.json)


if __name__ == "__main__":
    main()

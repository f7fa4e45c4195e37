"""One stage-2 training step (forward + backward) through a frozen language model: ours against the plain arrangement.

    python benchmarks/stage2_step.py --batch-size 8 --steps 5 [--plain graph logits text] [--json result.json]

Plain: the same model on Hugging Face's modules (`blip2_pair.py`), as one would first write it:
    graph   gradients are computed for the frozen ViT and language model, too
    logits  labels stand over all places, -100 where there is nothing to learn, so that the vocabulary's logits are
            computed for all [Q + T] of them (decoder-only; an encoder-decoder has targets alone in its decoder)
    text    the Q-Former has its networks for text, which stage 2 never uses
`--plain` leaves some of these out, to see what each costs. Texts have COCO captions' lengths and are padded to the
longest of a batch on both sides. The losses must agree to 1e-4 (fp32) before anything is timed. Steps alternate in one
process, so that both see the same machine; a ratio is the median over steps of plain / ours, above 1 where ours is
better. Peak memory is of one process for each.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from blip2_pair import (
    FAMILIES,
    MODERATE,
    TINY,
    Family,
    Sizes,
    build_tokenizer,
    copy_weights,
    draw_images,
    make_ours,
    make_theirs,
    word_count,
)
from stage1_step import caption_lengths
from timing import show, surroundings
from torch import Tensor, nn

from lavis_lite.common.device import autocast
from lavis_lite.models.blip2_generative import Blip2Generative

ARRANGEMENT = ("graph", "logits", "text")
IGNORED = -100  # as a label


class Plain(nn.Module):
    """Hugging Face's modules, nothing left out."""

    def __init__(self, family: Family, sizes: Sizes, arrangement: Sequence[str]) -> None:
        super().__init__()
        self.hf = make_theirs(family, sizes, text_side="text" in arrangement)
        self.tokenizer = build_tokenizer(family, sizes)
        self.loss = self._decoder_only if family == "opt" else self._encoder_decoder
        self.all_logits = "logits" in arrangement
        if "graph" not in arrangement:
            self.hf.vision_model.encoder.requires_grad_(False)
            self.hf.vision_model.embeddings.requires_grad_(False)
            self.hf.language_model.requires_grad_(False)

    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The language model's loss on texts."""
        visual = self.hf.get_image_features(images).pooler_output
        loss: Tensor = self.loss(visual, texts)
        return loss

    def _decoder_only(self, visual: Tensor, texts: Sequence[str]) -> Tensor:
        ended = [f"{text} {self.tokenizer.eos_token}" for text in texts]
        encoded = self.tokenizer(ended, padding="longest", return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        nothing = ids.new_full(visual.shape[:2], IGNORED)
        labels = torch.cat([nothing, ids.masked_fill(mask == 0, IGNORED)], 1)
        inputs = torch.cat([visual, self.hf.get_input_embeddings()(ids)], 1)
        mask = torch.cat([torch.ones_like(nothing), mask], 1)
        if self.all_logits:
            loss: Tensor = self.hf.language_model(
                inputs_embeds=inputs, attention_mask=mask, labels=labels
            ).loss
            return loss
        kept = ids.shape[1] + 1
        logits = self.hf.language_model(inputs_embeds=inputs, attention_mask=mask, logits_to_keep=kept).logits
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, -kept + 1 :].flatten()
        )

    def _encoder_decoder(self, visual: Tensor, texts: Sequence[str]) -> Tensor:
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        # The same draws as ours: from token 1 to the middle.
        splits = [int(torch.randint(1, len(row) // 2 + 1, ())) for row in rows]
        prefixes = self._padded([row[:at] for row, at in zip(rows, splits, strict=True)])
        targets = self._padded([row[at:] for row, at in zip(rows, splits, strict=True)])
        inputs = torch.cat([visual, self.hf.get_input_embeddings()(prefixes["input_ids"])], 1)
        mask = torch.cat([torch.ones(visual.shape[:2], dtype=torch.long), prefixes["attention_mask"]], 1)
        labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, IGNORED)
        loss: Tensor = self.hf.language_model(inputs_embeds=inputs, attention_mask=mask, labels=labels).loss
        return loss

    def _padded(self, rows: list[list[int]]) -> Any:
        ended = [{"input_ids": [*row, self.tokenizer.eos_token_id]} for row in rows]
        return self.tokenizer.pad(ended, padding="longest", return_tensors="pt")


def make_side(side: str, family: Family, sizes: Sizes, arrangement: Sequence[str]) -> nn.Module:
    """The model of one side, to be trained."""
    if side == "plain":
        return Plain(family, sizes, arrangement)
    with tempfile.TemporaryDirectory() as folder:
        ours = make_ours(family, sizes, Path(folder))
        assert ours.language_model.tokenizer is not None  # read while its folder is there
    return ours.train()


def train_step(model: nn.Module, images: Tensor, texts: Sequence[str], precision: str, seed: int) -> float:
    """Forward and backward; the loss. The seed decides where prefixes end."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    with autocast(images.device, precision):
        if isinstance(model, Blip2Generative):
            loss = model({"image": images, "text_input": list(texts)})["loss"]
        else:
            loss = model(images, texts)
    loss.backward()
    return float(loss.detach())


def draw_texts(batch: int, family: Family, sizes: Sizes, generator: torch.Generator) -> list[str]:
    """Random words, as many as COCO's captions have."""
    count = word_count(family, sizes)
    lengths = [
        length - 2 for length in caption_lengths("coco", batch, generator)
    ]  # [CLS] and [SEP] are not words
    return [
        " ".join(f"w{word}" for word in torch.randint(count, (length,), generator=generator).tolist())
        for length in lengths
    ]


def compare(family: Family, sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
    """Check the losses in a first round, which warms up, too; then time alternating steps."""
    generator = torch.Generator().manual_seed(args.seed)
    models = {side: make_side(side, family, sizes, args.plain) for side in ("plain", "ours")}
    copy_weights(models["plain"].hf, models["ours"])
    wall: dict[str, list[float]] = {side: [] for side in models}
    cpu: dict[str, list[float]] = {side: [] for side in models}
    difference = 0.0
    for number in range(args.steps + 1):
        images = draw_images(args.batch_size, sizes, generator)
        texts = draw_texts(args.batch_size, family, sizes, generator)
        losses = {}
        for side in models if number % 2 else reversed(models):
            start, cpu_start = time.perf_counter(), time.process_time()
            losses[side] = train_step(models[side], images, texts, args.precision, number)
            wall[side].append(time.perf_counter() - start)
            cpu[side].append(time.process_time() - cpu_start)
        difference = max(difference, abs(losses["plain"] - losses["ours"]))
        if args.precision == "fp32" and difference > 1e-4:
            raise SystemExit(f"losses differ by {difference:.1e}: the timing would compare different things")
    ratios = [a / b for a, b in zip(wall["plain"][1:], wall["ours"][1:], strict=True)]
    cpu_ratios = [a / b for a, b in zip(cpu["plain"][1:], cpu["ours"][1:], strict=True)]
    return {
        "family": family,
        "seconds": {side: statistics.median(values[1:]) for side, values in wall.items()},
        "cpu_seconds": {side: statistics.median(values[1:]) for side, values in cpu.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "ratio_cpu_time": statistics.median(cpu_ratios),
        "largest_loss_difference": difference,
    }


def measure_peak(args: argparse.Namespace, sizes: Sizes) -> None:
    """Two steps of one side alone; prints this process's peak memory in bytes."""
    generator = torch.Generator().manual_seed(args.seed)
    family = args.families[0]
    model = make_side(args.side, family, sizes, args.plain)
    for number in range(2):
        images = draw_images(args.batch_size, sizes, generator)
        train_step(
            model, images, draw_texts(args.batch_size, family, sizes, generator), args.precision, number
        )
    # Linux counts in KiB, macOS in bytes.
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def peak_of(side: str, family: Family, arguments: Sequence[str]) -> int:
    """Peak memory of a process that trains one side.

    On Linux a child's peak begins with its parent's at that moment, so call this before anything big is built.
    """
    command = [sys.executable, __file__, *arguments, "--families", family, "--side", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table and the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side, after one to warm up")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--plain", nargs="*", choices=ARRANGEMENT, default=list(ARRANGEMENT))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="tiny models: to try the script, not to measure")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--side", choices=["plain", "ours"], help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    sizes = TINY if args.tiny else MODERATE
    if args.side:
        measure_peak(args, sizes)
        return
    result: dict[str, Any] = {
        "batch_size": args.batch_size,
        "steps": args.steps,
        "precision": args.precision,
        "plain": args.plain,
        **surroundings(),
        "cases": [],
    }
    peaks = {}
    if not args.no_memory:
        peaks = {
            family: {side: peak_of(side, family, arguments) for side in ("plain", "ours")}
            for family in args.families
        }
    columns = ("plain s", "ours s", "ratio", "cpu ratio", "plain GB", "ours GB", "ratio")
    print(f"{'family':8}" + "".join(f"{column:>10}" for column in columns))
    for family in args.families:
        case = compare(family, sizes, args)
        row = [case["seconds"]["plain"], case["seconds"]["ours"], case["ratio"], case["ratio_cpu_time"]]
        if peak := peaks.get(family):
            case |= {"peak_bytes": peak, "ratio_memory": peak["plain"] / peak["ours"]}
            row += [peak["plain"] / 1e9, peak["ours"] / 1e9, case["ratio_memory"]]
        result["cases"].append(case)
        print(f"{family:8}" + "".join(f"{number:10.2f}" for number in row), flush=True)
    show(result, args.json)


if __name__ == "__main__":
    main()

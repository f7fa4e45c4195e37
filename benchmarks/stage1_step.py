"""One stage-1 training step (forward + backward) at BERT-base size: ours against the plain arrangement.

    python benchmarks/stage1_step.py --batch-size 8 --steps 5 --precision fp32 --texts coco

Plain: Hugging Face's Q-Former modules, a pass for each loss as one would first write it: queries encoded for
    ITC and
again for ITG, keys and values of the images projected in every pass (three times as many rows in ITM),
explicit attention, texts padded to 32, prediction head on every position. Both start from the same weights on
the same random 257 x 1408 features and take the same negatives; the losses must agree to 1e-4 (fp32) before
anything is timed. Steps alternate in one process, so that both see the same machine; peak memory is of one
process for each.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import count_flop, show, surroundings
from torch import Tensor, nn

from lavis_lite.common.device import autocast
from lavis_lite.common.registry import registry
from lavis_lite.models import losses
from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.models.convert.formats import our_names
from lavis_lite.models.tokenizer import TextTokens

IMAGE_TOKENS, IMAGE_WIDTH, VOCABULARY, MAX_TEXT, QUERIES = 257, 1408, 30522, 32, 32
CLS, SEP, DEC = 2, 3, VOCABULARY
# Captions of MS COCO 2017 by length in words and punctuation marks with [CLS] and [SEP] (795 captions, mean
# 13.5).
COCO_LENGTHS = {
    9: 4, 10: 30, 11: 129, 12: 173, 13: 137, 14: 117, 15: 78, 16: 52, 17: 26, 18: 13, 19: 10, 20: 9, 21: 1,
        22: 7,
    23: 1, 24: 5, 26: 1, 29: 1, 32: 1,
}  # fmt: skip

Step = Callable[[], dict[str, Tensor]]


@registry.register_vision_encoder("stored_features")
class StoredFeatures(nn.Module):
    """Stands for a frozen encoder whose features are already there."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = IMAGE_WIDTH
        self.features = torch.empty(0)

    def forward(self, image: Tensor) -> Tensor:
        return self.features


def next_row(logits: Tensor, same: Tensor, *, count: int = 1) -> tuple[Tensor, Tensor]:
    """Each row's negative is the next row instead of a draw, so that both sides take the same."""
    batch = len(logits)
    columns = (torch.arange(batch)[:, None] + 1) % batch
    return columns, torch.ones_like(columns, dtype=torch.bool)


class Plain(nn.Module):
    """The three losses on Hugging Face's modules, nothing shared."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, Blip2Config, Blip2ForImageTextRetrieval
        from transformers.models.bert.modeling_bert import BertOnlyMLMHead

        qformer = {
            "vocab_size": VOCABULARY + 1,
            "encoder_hidden_size": IMAGE_WIDTH,
            "use_qformer_text_input": True,
        }
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        # Its vision tower is not used: features are given.
        vision = {
            "hidden_size": IMAGE_WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 16,
            "intermediate_size": 64,
        }
        config = Blip2Config(
            vision_config=vision, qformer_config={**qformer, **no_dropout}, num_query_tokens=QUERIES
        )
        self.hf = Blip2ForImageTextRetrieval(config)
        self.hf.set_attn_implementation("eager")
        self.hf.vision_model.encoder = nn.Identity()
        self.ln_vision = nn.LayerNorm(IMAGE_WIDTH)
        self.head = BertOnlyMLMHead(BertConfig(vocab_size=VOCABULARY + 1))
        self.head.predictions.decoder.weight = self.hf.embeddings.word_embeddings.weight
        self.head.predictions.decoder.bias = self.head.predictions.bias
        self.temp = nn.Parameter(torch.tensor(0.07))

    def forward(self, features: Tensor, tokens: TextTokens) -> dict[str, Tensor]:
        hf, batch = self.hf, len(tokens)
        image = self.ln_vision(features)
        ids, mask = tokens.input_ids, tokens.attention_mask.long()
        queries = hf.query_tokens.expand(batch, -1, -1)

        seen = hf.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
        text = hf.qformer(query_embeds=hf.embeddings(input_ids=ids), query_length=0, attention_mask=mask)
        image_feats = F.normalize(hf.vision_projection(seen), dim=-1)
        text_feat = F.normalize(hf.text_projection(text.last_hidden_state[:, 0]), dim=-1)
        sim = (image_feats @ text_feat.t()).amax(1) / self.temp
        labels, same = torch.arange(batch), torch.eye(batch, dtype=torch.bool)
        loss_itc = sum(F.cross_entropy(s.float(), labels, label_smoothing=0.1) for s in (sim, sim.t())) / 2

        negatives = next_row(sim, same)[0][:, 0]
        itm_ids, itm_mask = torch.cat([ids, ids[negatives], ids]), torch.cat([mask, mask[negatives], mask])
        paired = hf.qformer(
            query_embeds=hf.embeddings(input_ids=itm_ids, query_embeds=queries.repeat(3, 1, 1)),
            query_length=QUERIES,
            attention_mask=torch.cat([itm_mask.new_ones(3 * batch, QUERIES), itm_mask], 1),
            encoder_hidden_states=torch.cat([image, image, image[negatives]]),
        ).last_hidden_state[:, :QUERIES]
        itm_labels = torch.cat([torch.ones(batch), torch.zeros(2 * batch)]).long()
        loss_itm = F.cross_entropy(hf.itm_head(paired).mean(1).float(), itm_labels)

        said = ids.clone()
        said[:, 0] = DEC
        length = ids.shape[1]
        sees = torch.ones(QUERIES + length, QUERIES + length).tril()
        sees[:QUERIES, :QUERIES] = 1
        decoded = hf.qformer(
            query_embeds=hf.embeddings(input_ids=said, query_embeds=queries),
            query_length=QUERIES,
            attention_mask=((1 - sees) * torch.finfo(torch.float32).min).expand(batch, 1, -1, -1),
            encoder_hidden_states=image,
        ).last_hidden_state[:, QUERIES:]
        logits = self.head(decoded)[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].masked_fill(~tokens.attention_mask[:, 1:], -100).flatten()
        loss_itg = F.cross_entropy(logits.float(), targets, label_smoothing=0.1)
        loss = loss_itc + loss_itm + loss_itg
        return {"loss": loss, "loss_itc": loss_itc, "loss_itm": loss_itm, "loss_itg": loss_itg}


def make_ours(folder: Path) -> Blip2QFormer:
    """Our model at the same size, without dropout."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 5))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    config = {
        "vision_encoder": {"name": "stored_features"},
        "qformer": {"dropout": 0.0},
        "tokenizer": str(folder),
    }
    return Blip2QFormer.from_config(config).train()


def copy_weights(plain: Plain, ours: Blip2QFormer) -> None:
    """Ours becomes the plain model; whatever is not copied is named."""
    head = plain.head.predictions
    theirs = {k: v for k, v in plain.hf.state_dict().items() if not k.startswith("vision_model.embeddings.")}
    state = {
        **{k: v for k, v in our_names(theirs).items() if not k.startswith("ln_vision.")},
        "Qformer.cls.predictions.bias": head.bias,
        **{f"Qformer.cls.predictions.transform.{k}": v for k, v in head.transform.state_dict().items()},
    }
    report = ours.load_state_dict(state, strict=False)
    left = set(report.missing_keys) - {"temp", "ln_vision.weight", "ln_vision.bias"}
    assert not report.unexpected_keys and not left, report


def caption_lengths(kind: str, count: int, generator: torch.Generator) -> list[int]:
    """Token counts of `count` texts: all of full length, as COCO's, or as a COCO file's or folder's."""
    if kind == "full":
        return [MAX_TEXT] * count
    histogram = COCO_LENGTHS if kind == "coco" else _count_lengths(Path(kind))
    weights = torch.tensor(list(histogram.values()), dtype=torch.float)
    drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
    return [list(histogram)[i] for i in drawn.tolist()]


def _count_lengths(path: Path) -> dict[int, int]:
    histogram: dict[int, int] = {}
    for file in sorted(path.rglob("captions_*.json")) if path.is_dir() else [path]:
        for row in json.loads(file.read_text())["annotations"]:
            length = min(MAX_TEXT, len(re.findall(r"\w+|[^\w\s]", row["caption"])) + 2)
            histogram[length] = histogram.get(length, 0) + 1
    return histogram


def make_batch(lengths: list[int], generator: torch.Generator) -> tuple[Tensor, TextTokens]:
    """Random features and texts of the given lengths, padded to 32."""
    batch = len(lengths)
    ids = torch.randint(5, VOCABULARY, (batch, MAX_TEXT), generator=generator)
    mask = torch.arange(MAX_TEXT) < torch.tensor(lengths)[:, None]
    ids[:, 0] = CLS
    ids[torch.arange(batch), torch.tensor(lengths) - 1] = SEP
    features = torch.randn(batch, IMAGE_TOKENS, IMAGE_WIDTH, generator=generator)
    return features, TextTokens(ids * mask, mask)


def plain_step(plain: Plain, features: Tensor, tokens: TextTokens, precision: str) -> dict[str, Tensor]:
    plain.zero_grad(set_to_none=True)
    with autocast(features.device, precision):
        output = plain(features, tokens)
    output["loss"].backward()
    return {name: value.detach() for name, value in output.items()}


def our_step(ours: Blip2QFormer, features: Tensor, tokens: TextTokens, precision: str) -> dict[str, Tensor]:
    ours.zero_grad(set_to_none=True)
    ours.visual_encoder.encoder.features = features
    # The tokenizer pads to the longest text of the batch.
    ours.tokenize = lambda texts: tokens.trimmed()
    samples = {"image": torch.zeros(len(features), 3, 1, 1), "text_input": [""] * len(features)}
    with autocast(features.device, precision):
        output = ours(samples)
    output["loss"].backward()
    return {name: value.detach() for name, value in output.items()}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Check the losses and count operations in a first round, then time alternating steps."""
    generator = torch.Generator().manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = Plain().train(), make_ours(Path(folder))
    copy_weights(plain, ours)
    losses.sample_negatives = next_row
    plain_precision = args.plain_precision or args.precision
    wall: dict[str, list[float]] = {"plain": [], "ours": []}
    cpu: dict[str, list[float]] = {"plain": [], "ours": []}
    flops: dict[str, int] = {}
    difference = 0.0
    for index in range(args.steps + 1):
        lengths = caption_lengths(args.texts, args.batch_size, generator)
        features, tokens = make_batch(lengths, generator)
        steps: dict[str, Step] = {
            "plain": functools.partial(plain_step, plain, features, tokens, plain_precision),
            "ours": functools.partial(our_step, ours, features, tokens, args.precision),
        }
        outputs = {}
        for name in steps if index % 2 else reversed(steps):
            if index == 0:
                with count_flop() as counter:
                    outputs[name] = steps[name]()
                flops[name] = counter.get_total_flops()
                continue
            start, cpu_start = time.perf_counter(), time.process_time()
            outputs[name] = steps[name]()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
        for loss, value in outputs["plain"].items():
            difference = max(difference, abs(float(value - outputs["ours"][loss])))
        if args.precision == plain_precision == "fp32" and difference > 1e-4:
            raise SystemExit(f"losses differ by {difference:.1e}: the timing would compare different things")
    ratios = [p / o for p, o in zip(wall["plain"], wall["ours"], strict=True)]
    cpu_ratios = [p / o for p, o in zip(cpu["plain"], cpu["ours"], strict=True)]
    return {
        "seconds": {name: statistics.median(values) for name, values in wall.items()},
        "cpu_seconds": {name: statistics.median(values) for name, values in cpu.items()},
        "gflop_of_first_batch": {name: round(count / 1e9, 1) for name, count in flops.items()},
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "speedup_cpu_time": statistics.median(cpu_ratios),
        "largest_loss_difference": difference,
    }


def measure_peak(args: argparse.Namespace) -> None:
    """Two steps of one side alone; prints this process's peak memory in bytes."""
    generator = torch.Generator().manual_seed(args.seed)
    losses.sample_negatives = next_row
    with tempfile.TemporaryDirectory() as folder:
        model: nn.Module = Plain().train() if args.side == "plain" else make_ours(Path(folder))
    for _ in range(2):
        features, tokens = make_batch(caption_lengths(args.texts, args.batch_size, generator), generator)
        if isinstance(model, Plain):
            plain_step(model, features, tokens, args.plain_precision or args.precision)
        elif isinstance(model, Blip2QFormer):
            our_step(model, features, tokens, args.precision)
    # Linux counts in KiB, macOS in bytes.
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def peak_of(side: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side, after one to warm up")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--plain-precision", choices=["fp32", "bf16"], help="of the plain side, if another")
    parser.add_argument(
        "--texts", default="full", help="full (32 tokens), coco, or a COCO captions file or folder"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there, too")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--side", choices=["plain", "ours"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measure_peak(args)
        return
    result: dict[str, Any] = {
        "batch_size": args.batch_size,
        "steps": args.steps,
        "texts": args.texts,
        "precision": {"plain": args.plain_precision or args.precision, "ours": args.precision},
        **surroundings(),
    }
    if not args.no_memory:
        # Before anything big is built: on Linux a child's peak begins with its parent's at that moment.
        result["peak_bytes"] = {side: peak_of(side) for side in ("plain", "ours")}
    result |= compare(args)
    print(f"{'':8}{'s/step':>10}{'cpu s':>10}{'GFLOP':>10}{'precision':>11}{'peak GB':>9}")
    for side in ("plain", "ours"):
        peak = f"{result['peak_bytes'][side] / 1e9:.2f}" if not args.no_memory else "-"
        numbers = (result[key][side] for key in ("seconds", "cpu_seconds", "gflop_of_first_batch"))
        print(
            f"{side:8}" + "".join(f"{n:10.2f}" for n in numbers) + f"{result['precision'][side]:>11}{peak:>9}"
        )
    low, high = result["speedup_range"]
    print(
        f"speed-up {result['speedup']:.2f}x (single steps {low:.2f} to {high:.2f}), "
        f"{result['speedup_cpu_time']:.2f}x in CPU time"
    )
    show(result, args.json)


if __name__ == "__main__":
    main()

"""Planned memory beside measured memory: `lavis-lite plan` against the peak of real training processes.

    python benchmarks/plan.py [--cases stage1_shapes stage2_opt350m ...] [--json result.json]

Each case is a project file and options laid over it, its weights drawn at random. Measured: a process of its own
builds model and optimiser and does three steps (forward, backward, AdamW) on a batch whose texts have full length; on
a CPU its peak is the kernel's high-water mark of resident memory, on a GPU (`--device cuda`) that of torch's
allocator. Planned: in this process, without allocating. "runtime" is what a process holds before it builds anything;
it is planned by what the planning process holds itself.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import show, surroundings

from lavis_lite.common import optim
from lavis_lite.common.config import Config, load_config
from lavis_lite.common.device import autocast
from lavis_lite.common.registry import registry
from lavis_lite.runners.planning.account import Planner, Target
from lavis_lite.runners.planning.runtime import resident_bytes, runtime_of
from lavis_lite.runners.planning.shapes import Shape, WordTokens, image_size_of, offline_section

PROJECTS = Path(__file__).resolve().parents[1] / "projects" / "blip2"
VIT_B = "model.vision_encoder={name: timm, model_name: vit_base_patch16_224, image_size: 224, freeze: true}"
VIT_B_TRAINED = VIT_B.replace("freeze: true", "freeze: false, grad_checkpointing: true")
OPT_350M = (
    "model.language_model.config={model_type: opt, hidden_size: 1024, word_embed_proj_dim: 1024, ffn_dim: 4096, "
    "num_hidden_layers: 24, num_attention_heads: 16}"
)
T5_LARGE = (
    "model.language_model.config={model_type: t5, vocab_size: 32128, d_model: 1024, d_kv: 64, d_ff: 2816, "
    "num_layers: 24, num_heads: 16, feed_forward_proj: gated-gelu, tie_word_embeddings: false, "
    "decoder_start_token_id: 0}"
)
PLAIN_LLM = "model.language_model.precision=fp32"
CASES: dict[str, tuple[str, list[str]]] = {
    "stage1_shapes": ("pretrain_stage1.yaml", ["run.batch_size_train=64"]),
    "stage1_shapes_256": ("pretrain_stage1.yaml", ["run.batch_size_train=256"]),
    "stage1_base": ("paper/pretrain_stage1_vitg.yaml", [VIT_B, "run.batch_size_train=8"]),
    "stage1_base_24": ("paper/pretrain_stage1_vitg.yaml", [VIT_B, "run.batch_size_train=24"]),
    "stage2_shapes_t5": ("pretrain_stage2_t5.yaml", ["run.batch_size_train=256"]),
    "stage2_opt350m": (
        "paper/pretrain_stage2_vitg_opt2.7b.yaml",
        [VIT_B, OPT_350M, PLAIN_LLM, "run.batch_size_train=16"],
    ),
    "stage2_t5large": (
        "paper/pretrain_stage2_vitg_flant5xl.yaml",
        [VIT_B, T5_LARGE, PLAIN_LLM, "run.batch_size_train=16"],
    ),
    "caption_opt350m": (
        "paper/caption_coco_opt2.7b.yaml",
        [VIT_B_TRAINED, OPT_350M, PLAIN_LLM, "run.batch_size_train=16"],
    ),
}


def config_of(case: str) -> Config:
    """The configuration of a case; pictures have the encoder's size."""
    name, options = CASES[case]
    config = load_config(PROJECTS / name, options)
    return config if "shapes" in case else replace(config, datasets={})


def measure(case: str, device: torch.device, precision: str) -> dict[str, int]:
    """Three real steps in this process: its peak, and what it held before."""
    config = config_of(case)
    model_class = registry.get_model_class(config.model["arch"])
    torch.manual_seed(config.run.seed)
    before = runtime_of(device.type)
    with offline_section(model_class, config.model) as section:
        model = model_class.from_config(section).to(device).train()
    if hasattr(model, "language_model"):
        model.language_model.tokenizer = WordTokens(model.language_model.model.config)
    shape = Shape(model, contextlib.nullcontext(), image_size_of(config, model), model.max_txt_len)
    groups = optim.param_groups(model, config.run.weight_decay, config.run.lr_layer_decay)
    optimizer = optim.build_optimizer(groups, config.run.betas, device)
    for _ in range(3):
        samples = shape.samples(config.run.batch_size_train)
        samples["image"] = samples["image"].normal_().to(device)
        with autocast(device, precision):
            loss = model(samples)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        return {"peak": torch.cuda.max_memory_reserved() + before, "runtime": before}
    return {"peak": resident_bytes(peak=True), "runtime": before}


def measure_apart(case: str, args: argparse.Namespace) -> dict[str, int]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", case, "--device", args.device]
    command += ["--precision", args.precision]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def compare(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Planned and measured peak of one case."""
    measured = measure_apart(case, args)
    runtime = runtime_of(args.device)
    plan = Planner(config_of(case), Target(args.device, None, runtime, precision=args.precision)).plan()
    gc.collect()
    return {
        "case": case,
        "batch": plan.batch,
        "planned": plan.total,
        "planned_runtime": runtime,
        "measured": measured["peak"],
        "measured_runtime": measured["runtime"],
        "error": plan.total / measured["peak"] - 1.0,
        # Of what the model and its step need, the process itself left out.
        "error_of_model": (plan.total - runtime) / (measured["peak"] - measured["runtime"]) - 1.0,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table and the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure:
        print(json.dumps(measure(args.measure, torch.device(args.device), args.precision)))
        return
    result: dict[str, Any] = {"precision": args.precision, "device": args.device, **surroundings()}
    result["cases"] = []
    print(f"{'case':18}{'batch':>6}{'planned GB':>12}{'measured GB':>12}{'error':>8}{'without runtime':>17}")
    for name in args.cases:
        case = compare(name, args)
        result["cases"].append(case)
        print(
            f"{name:18}{case['batch']:6}{case['planned'] / 1e9:12.2f}{case['measured'] / 1e9:12.2f}"
            f"{case['error']:8.1%}{case['error_of_model']:17.1%}",
            flush=True,
        )
    show(result, args.json)


if __name__ == "__main__":
    main()

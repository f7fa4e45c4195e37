"""`lavis-lite plan`: how much memory a run would need, before it is started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lavis_lite.commands.errors import one_line_errors
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.sizes import parse_bytes

if TYPE_CHECKING:
    from lavis_lite.common.config import Config
    from lavis_lite.runners.planning.account import Target


def plan_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite plan") -> None:
    """Work out a run's memory by part, the largest batch that fits, and what would make it fit; allocates nothing."""
    parser = argparse.ArgumentParser(prog=prog, description=plan_main.__doc__)
    parser.add_argument("--cfg-path", required=True, metavar="FILE", help="the project's YAML file")
    parser.add_argument("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="of one GPU, e.g. 24GB (as cards are sold: GiB); by default the plan is for this machine's CPU",
    )
    parser.add_argument(
        "--usable",
        type=float,
        metavar="SHARE",
        help="of --gpu-memory, what a program gets of it (0.92)",
    )
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--strategy", metavar="NAME", help="by default run.strategy")
    parser.add_argument(
        "--text-tokens", type=int, metavar="N", help="of every text; by default the longest, max_txt_len"
    )
    parser.add_argument("--proposals", action="store_true", help="what would save memory, even if it fits")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, in bytes")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    with one_line_errors(debug=args.debug):
        _print_plan(args)


def _print_plan(args: argparse.Namespace) -> None:
    from lavis_lite.common.config import load_config
    from lavis_lite.runners.features import check_storable
    from lavis_lite.runners.planning.account import Planner
    from lavis_lite.runners.planning.proposals import propose
    from lavis_lite.runners.planning.report import dict_of, lines_of

    config = load_config(args.cfg_path, args.options)
    if config.run.cache_features:
        check_storable(config)
    planner = Planner(config, _target(args, config))
    plan = planner.with_largest_batch()
    remedy = None
    if args.proposals or not plan.fits:
        remedy = propose(lambda more: load_config(args.cfg_path, [*args.options, *more]), planner, plan)
    print(json.dumps(dict_of(plan, remedy)) if args.json else "\n".join(lines_of(plan, remedy)))


def _target(args: argparse.Namespace, config: Config) -> Target:
    import torch

    from lavis_lite.common.device import choose_precision
    from lavis_lite.parallel.auto import USABLE, process_memory, usable_memory
    from lavis_lite.runners.planning.account import Target
    from lavis_lite.runners.planning.runtime import runtime_of

    for name, value in (("--world-size", args.world_size), ("--text-tokens", args.text_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if args.usable is not None and not 0 < args.usable <= 1:
        raise ConfigError(f"--usable must be above 0 and at most 1, got {args.usable}")
    device_type = "cuda" if args.gpu_memory else "cpu"
    precision = config.run.precision
    if precision == "auto":
        # GPUs that are planned for today compute in bfloat16.
        planned = "bf16" if args.gpu_memory else choose_precision("auto", torch.device("cpu"))
    else:
        planned = precision
    if args.gpu_memory:
        whole = parse_memory(args.gpu_memory)
        memory: int | None = usable_memory(whole)
        limit: int | None = round(whole * (USABLE if args.usable is None else args.usable))
    else:
        memory = limit = process_memory(torch.device("cpu"), processes=args.world_size)
    return Target(
        device_type=device_type,
        limit=limit,
        memory=memory,
        runtime=runtime_of(device_type),
        world_size=args.world_size,
        strategy=args.strategy or config.run.strategy,
        precision=planned,
        text_tokens=args.text_tokens,
        stored_features=config.run.cache_features,
    )


def parse_memory(text: str) -> int:
    """Bytes of a GPU's memory such as 24GB, units being powers of 1024; ConfigError for what is no size."""
    try:
        size = parse_bytes(text, binary=True)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"--gpu-memory: '{text}' is no size; write e.g. 24GB")
    return size

"""The command line `lavis-lite`; `train.py` and `evaluate.py` are its first two commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lavis_lite
from lavis_lite.commands.capfilt import capfilt_main
from lavis_lite.commands.convert import convert_main
from lavis_lite.commands.data import data_main
from lavis_lite.commands.explain import explain_main
from lavis_lite.commands.features import features_main
from lavis_lite.commands.index import index_main
from lavis_lite.commands.names import names_main
from lavis_lite.commands.pictures import answer_main, generate_main
from lavis_lite.commands.plan import plan_main
from lavis_lite.commands.run import evaluate_main, train_main
from lavis_lite.commands.shards import shards_main
from lavis_lite.commands.tokenizer import tokenizer_main

COMMANDS = {
    "train": train_main,
    "evaluate": evaluate_main,
    "plan": plan_main,
    "names": names_main,
    "tokenizer": tokenizer_main,
    "generate": generate_main,
    "answer": answer_main,
    "explain": explain_main,
    "convert": convert_main,
    "features": features_main,
    "shards": shards_main,
    "data": data_main,
    "capfilt": capfilt_main,
    "index": index_main,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The `lavis-lite` command: hands the rest of the line to the command it names."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="lavis-lite",
        description="A lean, registry-based vision-language framework with BLIP-2 complete.",
        epilog="commands:\n" + "\n".join(lines) + "\n\n`lavis-lite COMMAND --help` tells more of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lavis-lite {lavis_lite.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="the command's own arguments")
    args = parser.parse_args(argv)
    COMMANDS[args.command](args.rest, prog=f"lavis-lite {args.command}")


if __name__ == "__main__":
    main()

"""`train.py` and `evaluate.py`: a configuration is read and handed to its runner."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lavis_lite.commands.errors import one_line_errors
from lavis_lite.common.registry import registry

if TYPE_CHECKING:
    from lavis_lite.common.config import Config


def train_main(argv: Sequence[str] | None = None, *, prog: str = "train.py") -> None:
    """Train what a configuration describes, then evaluate and report."""
    parser = argparse.ArgumentParser(prog=prog, description=train_main.__doc__)
    args = add_run_arguments(parser).parse_args(argv)
    from lavis_lite.common import dist

    with dist.ending_process(), one_line_errors(debug=args.debug):
        config = read_config(args)
        registry.get_runner_class(config.run.runner)(config).train()


def evaluate_main(argv: Sequence[str] | None = None, *, prog: str = "evaluate.py") -> None:
    """Evaluate a checkpoint on the test splits: model.pretrained, or the best of the run's own."""
    parser = argparse.ArgumentParser(prog=prog, description=evaluate_main.__doc__)
    args = add_run_arguments(parser).parse_args(argv)
    from lavis_lite.common import dist

    with dist.ending_process(), one_line_errors(debug=args.debug):
        config = read_config(args)
        registry.get_runner_class(config.run.runner)(config).evaluate()


def add_run_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with the arguments of every command that reads a project file."""
    parser.add_argument("--cfg-path", required=True, metavar="FILE", help="the project's YAML file")
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="values laid over the file, e.g. run.max_steps=100 model.model_type=pretrain",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and exit"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """The checked configuration; with --print-config it is printed and the command ends."""
    from lavis_lite.common.config import load_config

    config = load_config(args.cfg_path, args.options)
    if args.print_config:
        print(config.to_yaml(), end="")
        sys.exit(0)
    return config

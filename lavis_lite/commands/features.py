"""`lavis-lite features`: what runs with `run.cache_features` read is stored before they start."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lavis_lite.commands.errors import one_line_errors
from lavis_lite.commands.run import add_run_arguments, read_config

if TYPE_CHECKING:
    from lavis_lite.common.config import Config


def features_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite features") -> None:
    """Store a frozen image encoder's features of a training set, for runs with run.cache_features."""
    parser = argparse.ArgumentParser(prog=prog, description=features_main.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser(
        "build",
        help="store what a project's run would read and is missing",
        description="Store what a project's run would read and is missing; under torchrun all processes take part. "
        "The same command goes on after an interruption. Settings: run.features, see docs/cached_features.md.",
    )
    add_run_arguments(build)
    args = parser.parse_args(argv)
    from lavis_lite.common import dist

    with dist.ending_process(), one_line_errors(debug=args.debug):
        _build(read_config(args))


def _build(config: Config) -> None:
    from lavis_lite.common import dist
    from lavis_lite.runners.faults import speaking_once
    from lavis_lite.runners.features import check_encoder, prepare
    from lavis_lite.runners.setup import build_base, encoder_placed

    check_encoder(config)
    dist.init(config.run.timeout)
    with speaking_once(lambda: "storing features; the same command goes on"):
        base = build_base(config, model_cfg=config.model, placed=False)
        with encoder_placed(base) as encoder:
            stored = prepare(config, base.datasets, encoder)
    for one, store in stored:
        if dist.is_main():
            print(f"features of {one.label}: {store} in {store.folder}")
    dist.shutdown()

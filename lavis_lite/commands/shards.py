"""`lavis-lite shards make` and `lavis-lite shards check`."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lavis_lite.commands.errors import one_line_errors
from lavis_lite.common.logging import say

if TYPE_CHECKING:
    from lavis_lite.datasets.shard_check import Report
    from lavis_lite.datasets.shard_rows import SampleForm

# Samples at fault that are named for each shard.
SHOWN = 3


def shards_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite shards") -> None:
    """Write a dataset as tar shards (make), or see whether shards are whole (check)."""
    parser = argparse.ArgumentParser(prog=prog, description=shards_main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="make|check")
    _add_make(commands.add_parser("make", help="write a dataset as shards"))
    _add_check(commands.add_parser("check", help="see whether shards are whole"))
    args = parser.parse_args(argv)
    with one_line_errors(debug=args.debug):
        (_make if args.command == "make" else _check)(args)


def _add_make(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dataset", metavar="DATASET_OR_YAML", help="a preset's name, or a file with `datasets:`"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="where to write; what is complete there is kept"
    )
    parser.add_argument("--split", default="train", help="train by default")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="K", help="processes; the shards are the same"
    )
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="mix the rows, as streams need it")
    parser.add_argument("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _make(args: argparse.Namespace) -> None:
    from lavis_lite.common.errors import ConfigError
    from lavis_lite.common.logging import only_warnings
    from lavis_lite.datasets.named import build_named_split
    from lavis_lite.datasets.shard_writer import make_shards, plan_of

    for name in ("samples_per_shard", "workers"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    # That other splits are left out is no news here.
    with only_warnings("lavis_lite.datasets"):
        dataset = build_named_split(args.dataset, args.split, args.options)
    plan = plan_of(dataset, split=args.split, samples_per_shard=args.samples_per_shard, shuffle=args.shuffle)
    written = make_shards(dataset, plan, Path(args.out), workers=args.workers)
    samples = sum(one.samples for one in written)
    size = sum(one.bytes for one in written) / 1e6
    print(f"{args.out}: {samples:,} samples of {plan.rows:,} rows in {plan.shards} shards, {size:.1f} MB")
    failures = [failure for one in written for failure in one.failures]
    if samples < plan.rows:
        example = f", for example {failures[0][0]}: {failures[0][1]}" if failures else ""
        say(f"{plan.rows - samples:,} rows could not be read and are left out{example}")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "patterns", nargs="+", metavar="PATTERN", help="'shards/{00000..00099}.tar', 'a/*.tar', ..."
    )
    parser.add_argument(
        "--deep", action="store_true", help="decode every picture or clip, compare local shards' checksums"
    )
    parser.add_argument("--clips", action="store_true", help="samples show clips, not pictures")
    parser.add_argument("--image", metavar="EXT", help="the extension of the picture's or clip's member")
    parser.add_argument(
        "--caption-field", metavar="NAME", help="of the .json, as the configuration's fields.caption"
    )
    parser.add_argument("--workers", type=int, metavar="K", help="processes")
    parser.add_argument(
        "--readers", type=int, metavar="R", help="ranks x loader workers that will stream them"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _check(args: argparse.Namespace) -> None:
    from lavis_lite.datasets.clip_sources import CLIPS
    from lavis_lite.datasets.folder import PICTURES
    from lavis_lite.datasets.readers import Fields
    from lavis_lite.datasets.shard_rows import SampleForm

    form = SampleForm(args.image, Fields(caption=args.caption_field), CLIPS if args.clips else PICTURES)
    total = good = samples = captions = bad = 0
    for report in _reports(args.patterns, form, deep=args.deep, workers=args.workers):
        total, good = total + 1, good + report.good
        samples, captions, bad = samples + report.samples, captions + report.captions, bad + len(report.bad)
        for line in _lines(report):
            print(line)
    print(
        f"{good} of {total} shards are whole: {samples:,} samples, {captions:,} captions, {bad:,} bad samples"
    )
    if samples and not samples - bad and not captions and not args.clips:
        say("samples that show clips are looked at with --clips")
    if args.readers is not None and total < args.readers:
        say(f"{total} shards are too few for {args.readers} readers of a stream: each needs one")
        sys.exit(1)
    if good < total or not total:
        sys.exit(1)


def _reports(
    patterns: Sequence[str], form: SampleForm, *, deep: bool, workers: int | None
) -> Iterator[Report]:
    from lavis_lite.common.errors import DataError
    from lavis_lite.datasets.shard_check import check_shards, check_streams
    from lavis_lite.datasets.shard_urls import expand, is_local_tar

    for pattern in patterns:
        found = expand(pattern)
        local = [path for path in found if is_local_tar(path)]
        if local and not any(map(os.path.isfile, local)):
            raise DataError(f"no shard '{pattern}'")
        for at_random, some in itertools.groupby(found, is_local_tar):
            look = check_shards if at_random else check_streams
            yield from look(list(some), form, deep=deep, workers=workers)


def _lines(report: Report) -> list[str]:
    """What is wrong with a shard; nothing for a whole one."""
    after = f" (after {report.samples} samples)" if report.samples else ""
    lines = [f"{report.shard}: {report.broken}{after}"] if report.broken else []
    lines += [f"{report.shard}: {problem}" for problem in report.bad[:SHOWN]]
    more = len(report.bad) - SHOWN
    return [*lines, f"{report.shard}: and {more} more bad samples"] if more > 0 else lines

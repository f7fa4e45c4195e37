"""`lavis-lite data check`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lavis_lite.commands.errors import one_line_errors


def data_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite data") -> None:
    """See whether a dataset's files lie where its preset looks for them (check)."""
    parser = argparse.ArgumentParser(prog=prog, description=data_main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="check")
    check = commands.add_parser("check", help="what is there, what is missing, how many")
    check.add_argument("dataset", metavar="NAME", help="a preset, or a YAML file with one dataset")
    check.add_argument("--all", action="store_true", help="look for every picture, not for some thousands")
    check.add_argument("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    check.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    with one_line_errors(debug=args.debug):
        from lavis_lite.common.logging import only_warnings
        from lavis_lite.datasets.layout import check_layout
        from lavis_lite.datasets.named import named_section

        name, section = named_section(args.dataset, args.options)
        good = True
        # That a split is left out is no news here: splits are built one by one.
        with only_warnings("lavis_lite.datasets"):
            for found in check_layout(name, section, all_rows=args.all):
                good &= found.good
                print("\n".join(f"{name} {line}" for line in found.lines()))
        if not good:
            sys.exit(1)

"""`lavis-lite names`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lavis_lite.common.registry import registry


def names_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite names") -> None:
    """List the registered names, of one kind or of all."""
    parser = argparse.ArgumentParser(prog=prog, description=names_main.__doc__)
    parser.add_argument("kind", nargs="?", choices=registry.KINDS, help="one kind only")
    args = parser.parse_args(argv)
    for kind in [args.kind] if args.kind else registry.KINDS:
        print(f"{kind}: {', '.join(registry.names(kind)) or '-'}")

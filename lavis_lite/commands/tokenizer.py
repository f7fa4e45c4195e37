"""`lavis-lite tokenizer`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lavis_lite.commands.errors import one_line_errors


def tokenizer_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite tokenizer") -> None:
    """Learn a WordPiece tokenizer from captions, for model.tokenizer=FOLDER; needs no network."""
    parser = argparse.ArgumentParser(prog=prog, description=tokenizer_main.__doc__)
    parser.add_argument(
        "--captions", required=True, metavar="FILE", help="any annotation file datasets can read"
    )
    parser.add_argument(
        "--caption-field", metavar="NAME", help="the captions' column, if its name is unusual"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to save it")
    parser.add_argument("--vocab-size", type=int, default=30_000, metavar="N", help="at most so many tokens")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    with one_line_errors(debug=args.debug):
        from lavis_lite.datasets.records import Fields, Source, open_records
        from lavis_lite.models.wordpiece import train_wordpiece

        annotations, fields = Path(args.captions), Fields(caption=args.caption_field)
        table = open_records(Source(annotations, annotations.parent, fields=fields, where="--captions"))
        captions = (caption for row in range(len(table)) for caption in table[row].captions)
        size = train_wordpiece(captions, args.out, vocab_size=args.vocab_size)
        print(f"{size} tokens from {len(table)} rows; use it with model.tokenizer={args.out}")

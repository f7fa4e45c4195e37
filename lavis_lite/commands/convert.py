"""`lavis-lite convert`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lavis_lite.commands.errors import one_line_errors


def convert_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite convert") -> None:
    """Write a BLIP-2 checkpoint of LAVIS, Hugging Face or ours as another of them."""
    parser = argparse.ArgumentParser(prog=prog, description=convert_main.__doc__)
    parser.add_argument(
        "source", metavar="SRC", help="a weights file, a model's, run's or checkpoint's folder"
    )
    parser.add_argument(
        "target", metavar="DST", help="a new folder; or a .safetensors file, for LAVIS a .pth"
    )
    parser.add_argument(
        "--to", required=True, choices=("lavis_lite", "hf", "lavis"), help="whose names to use"
    )
    parser.add_argument("--llm", choices=("opt", "t5"), help="the language model, if the source doesn't tell")
    parser.add_argument("--config", metavar="FILE", help="for hf: the config.json to go with the weights")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    with one_line_errors(debug=args.debug):
        from lavis_lite.common.tensor_reader import first_of
        from lavis_lite.models.convert.command import convert

        done = convert(args.source, args.target, to=args.to, llm=args.llm, config=args.config)
        print(f"{done.source} -> {done.target}: {done.tensors} tensors in '{args.target}'")
        for line in done.notes:
            print(f"note: {line}")
        if done.left_out:
            print(f"left out, as docs/checkpoints.md says: {first_of(done.left_out)}")

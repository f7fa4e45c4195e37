"""`lavis-lite explain`: where in a picture a model finds the evidence for a text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lavis_lite.commands.errors import one_line_errors


def explain_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite explain") -> None:
    """Show where in a picture the evidence for a text lies, by a stage-1 model; a page of HTML."""
    parser = argparse.ArgumentParser(prog=prog, description=explain_main.__doc__)
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="NAME/TYPE, e.g. blip2/shapes, or a run's folder"
    )
    parser.add_argument("--checkpoint", metavar="PATH", help="a run's folder or a weights file")
    parser.add_argument("--image", required=True, metavar="FILE", help="the picture")
    parser.add_argument(
        "--text", required=True, nargs="+", metavar="TEXT", dest="texts", help="one or several about it"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the page to write")
    parser.add_argument(
        "--method", default="gradcam", metavar="NAME", help="gradcam (default), attention, occlusion (slow)"
    )
    parser.add_argument(
        "--score",
        default="itg",
        metavar="NAME",
        help="what is explained: itg (default), the probability that the model would say the text; itm, its matching",
    )
    parser.add_argument("--per-word", action="store_true", help="a map for each word as well")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = vars(parser.parse_args(argv))
    with one_line_errors(debug=arguments.pop("debug")):
        from lavis_lite.explain import explain_file

        found = explain_file(**arguments)
        for item in found:
            print(f"match {item.match:.3f}  {item.text}")
        print(f"page  {arguments['out']}")

"""`lavis-lite generate` and `lavis-lite answer`: what a model says of pictures or clips."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lavis_lite.commands.errors import one_line_errors
from lavis_lite.common.logging import say

if TYPE_CHECKING:
    from lavis_lite.generate import Place


def generate_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite generate") -> None:
    """Say something about pictures or clips: captions, or what follows a prompt; JSON lines."""
    parser = argparse.ArgumentParser(prog=prog, description=generate_main.__doc__)
    _add_picture_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="by default the model's own")
    parser.add_argument("--num-beams", type=int, default=5, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=30, metavar="N", dest="max_length")
    parser.add_argument("--min-length", type=int, default=1, metavar="N")
    parser.add_argument("--num-captions", type=int, default=1, metavar="N", help="texts for each picture")
    parser.add_argument("--sample", action="store_true", dest="use_nucleus_sampling", help="draw, not search")
    parser.add_argument("--top-p", type=float, metavar="P", help="of --sample; 0.9")
    parser.add_argument("--temperature", type=float, metavar="T", help="of --sample; 1.0")
    parser.add_argument("--length-penalty", type=float, default=1.0, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="P")
    arguments = vars(parser.parse_args(argv))
    with one_line_errors(debug=arguments.pop("debug")):
        from lavis_lite.generate import generate_files

        _take_sampling(arguments)
        model, images, place = _take_picture_arguments(arguments)
        _tell_unreadable(generate_files(model, images, place, **arguments))


def answer_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite answer") -> None:
    """Answer questions about pictures or clips; JSON lines."""
    parser = argparse.ArgumentParser(prog=prog, description=answer_main.__doc__)
    _add_picture_arguments(parser)
    parser.add_argument(
        "--question",
        required=True,
        nargs="+",
        metavar="TEXT",
        dest="questions",
        help="asked of every picture",
    )
    parser.add_argument(
        "--prompt", default="", metavar="TEXT", help="'Question: {} Answer:'; by default the model's own"
    )
    parser.add_argument(
        "--answer-list", metavar="FILE", help="choose from these, a line each, instead of generating"
    )
    parser.add_argument(
        "--num-ans-candidates",
        type=int,
        default=128,
        metavar="N",
        help="of the list, so many answers with the likeliest first token are scored whole; 128",
    )
    parser.add_argument("--num-beams", type=int, default=5, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=10, metavar="N", dest="max_len")
    parser.add_argument("--min-length", type=int, default=1, metavar="N", dest="min_len")
    parser.add_argument("--length-penalty", type=float, default=-1.0, metavar="P")
    parser.add_argument(
        "--confidence",
        action="store_true",
        help="tell how likely the language model finds each answer, 0 to 1",
    )
    arguments = vars(parser.parse_args(argv))
    with one_line_errors(debug=arguments.pop("debug")):
        from lavis_lite.generate import answer_files

        model, images, place = _take_picture_arguments(arguments)
        _tell_unreadable(answer_files(model, images, arguments.pop("questions"), place, **arguments))


def _take_sampling(arguments: dict[str, Any]) -> None:
    """Leave only those settings of sampling that were given, with a line where nothing is sampled."""
    for name in ("top_p", "temperature"):
        if arguments[name] is None:
            del arguments[name]
        elif not arguments["use_nucleus_sampling"]:
            say(f"warning: --{name.replace('_', '-')} has no effect without --sample")


def _add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="NAME/TYPE, e.g. blip2_t5/shapes, or a run's folder"
    )
    parser.add_argument("--checkpoint", metavar="PATH", help="a run's folder or a weights file")
    files = parser.add_mutually_exclusive_group(required=True)
    files.add_argument(
        "--image", nargs="+", metavar="FILE", dest="images", help="pictures, or folders of them"
    )
    files.add_argument("--video", nargs="+", metavar="FILE", dest="clips", help="clips, or folders of them")
    parser.add_argument(
        "--num-frames",
        type=int,
        metavar="N",
        help="of each clip, evenly; by default as a run's evaluation, else one for each frame embedding, else 4",
    )
    parser.add_argument("--out", metavar="FILE", help="where to write the lines; by default they are printed")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _take_picture_arguments(arguments: dict[str, Any]) -> tuple[str, list[str], Place]:
    """Model, pictures and place, taken out of the arguments, so that only the command's own are left."""
    from lavis_lite.generate import Place, default_frames

    model = arguments.pop("model")
    images, clips, frames = (arguments.pop(name) for name in ("images", "clips", "num_frames"))
    place = Place(
        **{name: arguments.pop(name) for name in ("out", "checkpoint", "device", "batch_size")},
        num_frames=(default_frames(model) if frames is None else frames) if clips else None,
    )
    return model, clips or images, place


def _tell_unreadable(number: int) -> None:
    if number:
        say(f"error: {number} files could not be read; their lines say why")
        sys.exit(1)

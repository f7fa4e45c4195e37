"""`lavis-lite capfilt`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lavis_lite.commands.errors import one_line_errors

# Of the options, those that decide the captions: fields of `Settings`, given only where the user gives them.
SETTINGS = (
    (
        "captioner",
        str,
        "MODEL",
        "ours (NAME/TYPE[:CHECKPOINT] or a run's folder), or hf:NAME of transformers (hub name or folder)",
    ),
    (
        "ranker",
        str,
        "MODEL",
        "stage 1 of ours (NAME/TYPE[:CHECKPOINT] or a run's folder), or a CLIP of transformers, hf:NAME",
    ),
    ("rank-by", str, "WAY", "itc, the cosine, or itm, the probability of a match (stage 1 of ours only)"),
    ("num-captions", int, "N", "sampled for each picture"),
    ("keep", int, "N", "so many of these and the web's own are kept"),
    ("top-p", float, "P", "of nucleus sampling"),
    ("temperature", float, "T", "of sampling"),
    ("min-length", int, "N", "of a caption, in tokens"),
    ("max-length", int, "N", "of a caption, in tokens"),
    ("prompt", str, "TEXT", "what captions go on from; by default the captioner's own"),
    ("seed", int, "N", "of the sampling"),
)


def capfilt_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite capfilt") -> None:
    """Caption web pictures, rank those captions with the web's own, keep the best: shards to train on.

    Give the same command to a process for each device (--device cuda:0, cuda:1, ...), on any machines that see OUT, or
    to torchrun; give it again after a crash. Nothing is done twice.
    """
    parser = argparse.ArgumentParser(prog=prog, description=capfilt_main.__doc__)
    source = parser.add_argument_group("input")
    which = source.add_mutually_exclusive_group(required=True)
    which.add_argument("--images", metavar="DIR", help="a folder of pictures")
    which.add_argument(
        "--shards", metavar="PATTERN", help="tar shards: 'web/{00000..00099}.tar', pipe:, http(s)"
    )
    source.add_argument(
        "--annotations", metavar="FILE", help="of --images; by default .txt files beside the pictures, if any"
    )
    source.add_argument("--image", metavar="EXT", help="of --shards: the extension of the picture's member")
    source.add_argument("--caption-field", metavar="NAME", help="the captions' name, if it is unusual")
    source.add_argument("--group-by-image", action="store_true", help="the file has several rows a picture")
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, metavar="DIR", help="where the shards go")
    output.add_argument("--shard-size", type=int, metavar="N", help="of --images: pictures a shard; 1000")
    output.add_argument("--no-tars", action="store_true", help="of --images: annotations.jsonl alone")
    how = parser.add_argument_group("captions")
    how.add_argument(
        "--preset", metavar="NAME", help="paper, shapes, or a .yaml file: values for what isn't given"
    )
    for name, kind, metavar, said in SETTINGS:
        how.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar=metavar, help=said)
    work = parser.add_argument_group("work")
    work.add_argument("--batch-size", type=int, default=16, metavar="N", help="pictures at a time")
    work.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    work.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    work.add_argument(
        "--max-bad-fraction", type=float, default=0.5, metavar="F", help="of unreadable pictures"
    )
    work.add_argument(
        "--stale-after",
        type=float,
        default=600.0,
        metavar="S",
        help="a silent process elsewhere counts as dead",
    )
    work.add_argument(
        "--skip-unreadable-shards",
        action="store_true",
        help="do without shards that can't be read, instead of ending with exit code 1",
    )
    work.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = vars(parser.parse_args(argv))
    with one_line_errors(debug=arguments.pop("debug")):
        from lavis_lite.capfilt.run import Place, run_capfilt
        from lavis_lite.capfilt.settings import load_settings

        names = [name.replace("-", "_") for name, *_ in SETTINGS]
        given = {name: arguments.pop(name) for name in names if name in arguments}
        settings = load_settings(arguments.pop("preset"), given)
        run_capfilt(settings, Place(**arguments))

"""The command line `lavis-lite`; `train.py` and `evaluate.py` are its first two commands."""

from __future__ import annotations

import argparse
import contextlib
import errno
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lavis_lite
from lavis_lite.common.errors import LavisLiteError
from lavis_lite.common.registry import registry

if TYPE_CHECKING:
    from lavis_lite.common.config import Config
    from lavis_lite.generate import Place


def train_main(argv: Sequence[str] | None = None, *, prog: str = "train.py") -> None:
    """Train what a configuration describes, then evaluate and report."""
    parser = argparse.ArgumentParser(prog=prog, description=train_main.__doc__)
    args = _add_run_arguments(parser).parse_args(argv)
    with one_line_errors(debug=args.debug):
        config = _load_config(args)
        registry.get_runner_class(config.run.runner)(config).train()


def evaluate_main(argv: Sequence[str] | None = None, *, prog: str = "evaluate.py") -> None:
    """Evaluate a checkpoint on the test splits: model.pretrained, or the best of the run's own."""
    parser = argparse.ArgumentParser(prog=prog, description=evaluate_main.__doc__)
    args = _add_run_arguments(parser).parse_args(argv)
    with one_line_errors(debug=args.debug):
        config = _load_config(args)
        registry.get_runner_class(config.run.runner)(config).evaluate()


def names_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite names") -> None:
    """List the registered names, of one kind or of all."""
    parser = argparse.ArgumentParser(prog=prog, description=names_main.__doc__)
    parser.add_argument("kind", nargs="?", choices=registry.KINDS, help="one kind only")
    args = parser.parse_args(argv)
    for kind in [args.kind] if args.kind else registry.KINDS:
        print(f"{kind}: {', '.join(registry.names(kind)) or '-'}")


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


def generate_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite generate") -> None:
    """Say something about pictures: captions, or what follows a prompt; JSON lines."""
    parser = argparse.ArgumentParser(prog=prog, description=generate_main.__doc__)
    _add_picture_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="by default the model's own")
    parser.add_argument("--num-beams", type=int, default=5, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=30, metavar="N", dest="max_length")
    parser.add_argument("--min-length", type=int, default=1, metavar="N")
    parser.add_argument("--num-captions", type=int, default=1, metavar="N", help="texts for each picture")
    parser.add_argument("--sample", action="store_true", dest="use_nucleus_sampling", help="draw, not search")
    parser.add_argument("--top-p", type=float, default=0.9, metavar="P")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T")
    parser.add_argument("--length-penalty", type=float, default=1.0, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="P")
    arguments = vars(parser.parse_args(argv))
    with one_line_errors(debug=arguments.pop("debug")):
        from lavis_lite.generate import generate_files

        model, images, place = _take_picture_arguments(arguments)
        _tell_unreadable(generate_files(model, images, place, **arguments))


def answer_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite answer") -> None:
    """Answer questions about pictures; JSON lines."""
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
    parser.add_argument("--num-beams", type=int, default=5, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=10, metavar="N", dest="max_len")
    parser.add_argument("--min-length", type=int, default=1, metavar="N", dest="min_len")
    parser.add_argument("--length-penalty", type=float, default=-1.0, metavar="P")
    arguments = vars(parser.parse_args(argv))
    with one_line_errors(debug=arguments.pop("debug")):
        from lavis_lite.generate import answer_files

        model, images, place = _take_picture_arguments(arguments)
        _tell_unreadable(answer_files(model, images, arguments.pop("questions"), place, **arguments))


def _add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME/TYPE", help="e.g. blip2_t5/shapes")
    parser.add_argument("--checkpoint", metavar="PATH", help="a run's folder or a weights file")
    parser.add_argument(
        "--image",
        required=True,
        nargs="+",
        metavar="FILE",
        dest="images",
        help="pictures, or folders of them",
    )
    parser.add_argument("--out", metavar="FILE", help="where to write the lines; by default they are printed")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _take_picture_arguments(arguments: dict[str, Any]) -> tuple[str, list[str], Place]:
    """Model, pictures and place, taken out of the arguments, so that only the command's own are left."""
    from lavis_lite.generate import Place

    place = Place(**{name: arguments.pop(name) for name in ("out", "checkpoint", "device", "batch_size")})
    return arguments.pop("model"), arguments.pop("images"), place


def _tell_unreadable(number: int) -> None:
    if number:
        print(f"error: {number} pictures could not be read; their lines say why", file=sys.stderr)
        sys.exit(1)


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
COMMANDS = {
    "train": train_main,
    "evaluate": evaluate_main,
    "names": names_main,
    "tokenizer": tokenizer_main,
    "generate": generate_main,
    "answer": answer_main,
    "convert": convert_main,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The `lavis-lite` command: hands the rest of the line to the command it names."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="lavis-lite",
        description="A lean, registry-based vision-language framework with BLIP-2 complete.",
        epilog="commands:\n" + "\n".join(lines) + "\n\n`lavis-lite COMMAND --help` tells more of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lavis-lite {lavis_lite.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="the command's own arguments")
    args = parser.parse_args(argv)
    COMMANDS[args.command](args.rest, prog=f"lavis-lite {args.command}")


@contextlib.contextmanager
def one_line_errors(*, debug: bool) -> Iterator[None]:
    """A user's mistake becomes one line and an exit code (2 for usage, 1 otherwise), Ctrl-C becomes 130.

    So does a disk that is full or may not be written to. A fault of ours keeps its traceback, and with
    `debug` everything does.
    """
    try:
        yield
    except LavisLiteError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if debug or error.errno not in DISK_ERRORS:
            raise
        print(f"error: {error.strerror}: '{error.filename or 'a file of the run'}'", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _add_run_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
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


def _load_config(args: argparse.Namespace) -> Config:
    """The checked configuration; with --print-config it is printed and the command ends."""
    from lavis_lite.common.config import load_config

    config = load_config(args.cfg_path, args.options)
    if args.print_config:
        print(config.to_yaml(), end="")
        sys.exit(0)
    return config


if __name__ == "__main__":
    main()

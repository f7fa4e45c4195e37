"""`lavis-lite index`: search over many images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lavis_lite.commands.errors import one_line_errors

if TYPE_CHECKING:
    from lavis_lite.search import Encoder, ModelChoice, Summary


def index_main(argv: Sequence[str] | None = None, *, prog: str = "lavis-lite index") -> None:
    """Make an index of many images and search it with a text or a picture."""
    parser = argparse.ArgumentParser(prog=prog, description=index_main.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, arguments, run in (
        ("build", _build_arguments, _build),
        ("search", _search_arguments, _search),
        ("add", _add_arguments, _add),
        ("delete", _delete_arguments, _delete),
        ("compact", _place_argument, _compact),
        ("check", _place_argument, _check),
    ):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        arguments(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    with one_line_errors(debug=args.debug):
        run_command: Callable[[argparse.Namespace], None] = args.run
        run_command(args)


def _build(args: argparse.Namespace) -> None:
    """Encode pictures and make an index of them; interrupted, the same command goes on where it was."""
    from lavis_lite.search import BuildOptions, ModelChoice, build_index

    options = BuildOptions(  # before the model is loaded, which takes long: they may be refused
        kind=args.kind,
        dtype=args.dtype,
        target=args.recall,
        texts=_texts(args.texts),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )
    encoder = _encoder(ModelChoice(_model_name(args), args.checkpoint), args)
    _tell(build_index(args.images, args.out, encoder, options, replace_old=args.replace), args.out, "indexed")


def _add(args: argparse.Namespace) -> None:
    """Add the pictures that aren't in the index yet."""
    from lavis_lite.search import BuildOptions, add_images

    options = BuildOptions(batch_size=args.batch_size, num_workers=args.num_workers)
    _tell(add_images(args.images, args.index, _encoder(_choice(args), args), options), args.index, "added")


def _delete(args: argparse.Namespace) -> None:
    """Delete images by their names."""
    from lavis_lite.search import delete_images

    _tell(delete_images(args.index, args.images), args.index, "deleted")


def _compact(args: argparse.Namespace) -> None:
    """Write an index again without its deleted images."""
    from lavis_lite.search import compact_index

    _tell(compact_index(args.index), args.index, "removed")


def _check(args: argparse.Namespace) -> None:
    """Compare every file of an index with its checksum."""
    from lavis_lite.search import check_index

    manifest = check_index(args.index)
    found = manifest.candidates
    how = (
        f"{found.factory}, recall {_recalls(found.recall, found.picture_recall)}" if found else "exact search"
    )
    size = sum(file.bytes for file in manifest.files()) / 2**20
    print(
        f"'{args.index}' is sound: {manifest.images - manifest.num_deleted} images, {manifest.num_deleted} deleted, "
        f"{manifest.queries} vectors each of {manifest.width} numbers in {manifest.dtype}; {how}; {size:.1f} MiB; "
        f"built by {manifest.model['model']}"
    )


def _search(args: argparse.Namespace) -> None:
    """Find the images that fit a text or a picture best."""
    from rich.console import Console

    from lavis_lite.search import Searcher
    from lavis_lite.search.present import as_json, as_table, write_contact_sheet

    searcher = Searcher.open(args.index, _choice(args), device=args.device)
    hits = searcher.search(
        args.text,
        args.image,
        top=args.top,
        rerank=args.rerank,
        candidates=args.candidates,
        itm_weight=args.itm_weight,
        exact=args.exact,
    )
    query = args.text if args.text is not None else args.image
    if args.html:
        order = f"ITC, then the first {args.candidates} by ITM ({args.rerank})" if args.rerank else "ITC"
        searched = f"{len(searcher.index)} images of '{args.index}', by {order}"
        write_contact_sheet(Path(args.html), query, hits, searched=searched)
    if args.json:
        print(as_json(query, hits))
    elif args.html:
        print(f"{len(hits)} images in '{args.html}'")
    else:
        Console().print(as_table(hits))


def _build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="IDX", help="the index's folder")
    parser.add_argument("--replace", action="store_true", help="an index that is there already")
    parser.add_argument(
        "--kind",
        default="auto",
        help="flat (exact), ivfpq, hnsw or a faiss factory string; auto: flat up to a million vectors, above ivfpq",
    )
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="of the stored vectors")
    parser.add_argument(
        "--recall", type=float, default=0.99, metavar="R", help="what an approximate index is tuned to find"
    )
    parser.add_argument("--texts", metavar="FILE", help="texts, a line each, to measure the recall with")
    _picture_arguments(parser, required=True)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    _place_argument(parser)
    _picture_arguments(parser, required=False)


def _picture_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--images",
        required=True,
        metavar="WHERE",
        help="a folder, a tar file, or a pattern such as 'shards/{000..031}.tar'",
    )
    _model_arguments(parser, required=required)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument(
        "--num-workers", type=int, default=0, metavar="N", help="processes that read pictures"
    )


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    _place_argument(parser)
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="what to search for")
    query.add_argument("--image", metavar="FILE", help="a picture to search with")
    parser.add_argument("--top", type=int, default=10, metavar="N")
    parser.add_argument(
        "--rerank",
        nargs="?",
        const="sum",
        choices=("sum", "itm"),
        help="order the first candidates by image-text matching: with ITC (sum) or alone (itm)",
    )
    parser.add_argument("--candidates", type=int, default=128, metavar="N", help="re-ranked images")
    parser.add_argument(
        "--itm-weight",
        type=float,
        metavar="W",
        help="of matching in --rerank sum; by default the run's own task.itm_weight, 1 where there is no run",
    )
    parser.add_argument("--exact", action="store_true", help="compare with every image")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", metavar="FILE", help="write a contact sheet")
    _model_arguments(parser, required=False)


def _delete_arguments(parser: argparse.ArgumentParser) -> None:
    _place_argument(parser)
    parser.add_argument(
        "images", nargs="+", metavar="NAME", help="a picture's name, or a pattern such as '*.gif'"
    )


def _place_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", metavar="IDX", help="the index's folder")


def _model_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    said = "" if required else "; by default the one that built the index"
    parser.add_argument(
        "--model",
        required=required,
        metavar="MODEL",
        help=f"NAME/TYPE, e.g. blip2/shapes, or a run's folder{said}",
    )
    parser.add_argument("--type", metavar="TYPE", help="the model's type, where --model has none")
    parser.add_argument("--checkpoint", metavar="PATH", help=f"a run's folder or a weights file{said}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def _model_name(args: argparse.Namespace) -> str:
    return f"{args.model}/{args.type}" if args.type else str(args.model)


def _choice(args: argparse.Namespace) -> ModelChoice:
    """The model that the index names, or what of it was named anew."""
    from lavis_lite.common.model_recipe import is_run
    from lavis_lite.search import ModelChoice
    from lavis_lite.search.searcher import choice_of

    own = choice_of(args.index)
    if args.model and is_run(args.model):
        return ModelChoice(args.model, args.checkpoint)
    return ModelChoice(_model_name(args) if args.model else own.model, args.checkpoint or own.checkpoint)


def _encoder(choice: ModelChoice, args: argparse.Namespace) -> Encoder:
    from lavis_lite.search import load_encoder

    return load_encoder(choice, device=args.device)


def _texts(file: str | None) -> tuple[str, ...]:
    """The non-empty lines of a file."""
    from lavis_lite.tasks.answers import read_answer_list

    return tuple(read_answer_list(file, where="--texts")) if file else ()


def _tell(summary: Summary, place: str, done: str) -> None:
    speed = f", {summary.images_per_second:.1f} images/s" if summary.images_per_second else ""
    bad = f", {summary.unreadable} unreadable ones left out" if summary.unreadable else ""
    found = "search is exact"
    if summary.recall is not None:
        found = f"recall of the exact first 100: {_recalls(summary.recall, summary.picture_recall)}"
    print(f"{summary.changed} images {done}{bad}{speed}; {summary.images} in '{place}'; {found}")


def _recalls(texts: float, pictures: float | None) -> str:
    return f"{texts:.4f} for texts" + (f", {pictures:.4f} for pictures" if pictures is not None else "")

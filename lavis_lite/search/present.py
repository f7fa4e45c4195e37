"""What was found as a table, as JSON, or as a contact sheet in HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.table import Table

from lavis_lite.common.io import atomic_write
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.images import read_image
from lavis_lite.search.searcher import Hit
from lavis_lite.tasks.examples import small_jpeg
from lavis_lite.tasks.html import card, cards, picture, section
from lavis_lite.tasks.report import page


def as_table(hits: Sequence[Hit]) -> Table:
    """Rank, scores and name, a row each."""
    table = Table(box=None, pad_edge=False)
    matched = any(hit.itm is not None for hit in hits)
    for heading in ("", "score", *(("re-ranked", "ITM") if matched else ())):
        table.add_column(heading, justify="right")
    table.add_column("image", overflow="fold")
    for hit in hits:
        again = (_number(hit.reranked, 4), _number(hit.itm, 3)) if matched else ()
        table.add_row(str(hit.rank), f"{hit.score:.4f}", *again, escape_markup(hit.image))
    return table


def as_json(query: str, hits: Sequence[Hit]) -> str:
    """{"query", "results": [{"rank", "image", "score", "reranked", "itm"}]}, the last two of re-ranked images."""
    results = [
        {"rank": hit.rank, "image": hit.image, "score": hit.score}
        | ({"reranked": hit.reranked, "itm": hit.itm} if hit.reranked is not None else {})
        for hit in hits
    ]
    return json.dumps({"query": query, "results": results}, ensure_ascii=False)


def write_contact_sheet(path: Path, query: str, hits: Sequence[Hit], *, searched: str) -> None:
    """A page with the pictures in their order, itself all there is to it: no links to other files.

    Args:
        query: the text, or the name of the picture that was searched with. searched: what was searched, for the note.
    """
    shown = [_tile(hit) for hit in hits]
    body = section("Found images", cards(shown) if shown else "<p>None.</p>", note=searched)
    atomic_write(path, page(query, query, f"{len(hits)} images", [body]))


def _tile(hit: Hit) -> str:
    scores = f"score {hit.score:.4f}"
    if hit.reranked is not None:
        scores += f" · re-ranked {hit.reranked:.4f} · ITM {_number(hit.itm, 3)}"
    try:
        image = picture(small_jpeg(read_image(hit.name)), hit.image)
    except UnreadableSample as error:
        image = f'<p class="note">{escape(error.reason)}</p>'
    return card(image, f'<strong>{hit.rank}</strong> {escape(scores)}<p class="note">{escape(hit.image)}</p>')


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def escape_markup(text: str) -> str:
    """A file's name in a rich table: its brackets are no styles."""
    return text.replace("[", r"\[")

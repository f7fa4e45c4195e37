"""report.html and curves.png of a run: one page without links to anything outside itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lavis_lite.common.io import atomic_write
from lavis_lite.tasks.curves import draw, panels
from lavis_lite.tasks.html import data_uri, section
from lavis_lite.tasks.summary import duration

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b636b; --paper: #f6f7f8; --card: #fff;
  --line: #d9dde1; --right: #0b6e3f; --right-paper: #e3f4ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaec; --soft: #a3abb3; --paper: #0f1114; 
  --card: #16191d; --line: #343a40; --right: #7ee2a8; --right-paper: #143524; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 0 0 .25rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .5rem; }
section, header { margin-bottom: 2.25rem; }
.note { color: var(--soft); font-size: .9rem; margin: 0 0 .75rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem;
  margin: 0 0 1rem; }
.tiles > div, .card, .row, .curves, .wide, pre { background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
.tiles > div { padding: .75rem 1rem; } .tiles dt { font-size: .9rem; color: var(--soft); }
.tiles dd { margin: 0; font-size: 1.7rem; font-weight: 600; line-height: 1.25; }
.tiles dd.note { font-size: .85rem; font-weight: 400; }
.wide { overflow-x: auto; margin-bottom: 1rem; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; min-width: min(30rem, 90vw); font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .9rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child { text-align: left; } tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 500; }
thead th { font-size: .85rem; color: var(--soft); }
.curves { padding: .75rem; overflow-x: auto; }
.curves img { display: block; width: 100%; min-width: 40rem; height: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: .75rem;
  margin-bottom: .75rem; }
.card { display: flex; gap: 1rem; padding: .9rem; align-items: flex-start; }
.card img { width: 7rem; flex: none; } .card ol { margin: 0; padding-left: 1.4rem; font-size: .92rem; }
img { border-radius: .3rem; }
.card li { margin-bottom: .25rem; padding: .05rem .35rem; border-radius: .25rem; overflow-wrap: anywhere; }
.card li.right { background: var(--right-paper); }
.tick { color: var(--right); font-weight: 700; }
.row { padding: .9rem; margin-bottom: .75rem; }
.strip { display: flex; flex-wrap: wrap; gap: .75rem; list-style: none; margin: 0; padding: 0; }
.strip li { width: 7.5rem; padding: .25rem; border: 2px solid transparent; border-radius: .4rem;
  text-align: center; }
.strip li.right { border-color: var(--right); background: var(--right-paper); }
.strip li.missing { border: 2px dashed var(--line); color: var(--soft); font-size: .8rem; }
.strip img { width: 100%; height: auto; display: block; }
pre { padding: 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
summary { cursor: pointer; font-weight: 600; }
"""


def write_report(
    run_dir: Path,
    sections: Sequence[str],
    log_rows: Sequence[Mapping[str, Any]],
    *,
    wall_time: float | None = None,
    split: str = "",
    config: str = "",
) -> dict[str, Path]:
    """Write curves.png and report.html; `sections` are HTML and stand after the curves.

    Returns: label -> path.
    """
    curves = run_dir / "curves.png"
    page = run_dir / "report.html"
    light = draw(log_rows)
    html = _page(
        run_dir.resolve().name, sections, log_rows, light, wall_time=wall_time, split=split, config=config
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(curves, light)
    atomic_write(page, html.encode("utf-8"))
    return {"curves": curves, "report": page}


def _page(
    name: str,
    sections: Sequence[str],
    log_rows: Sequence[Mapping[str, Any]],
    light: bytes,
    *,
    wall_time: float | None,
    split: str,
    config: str,
) -> str:
    facts = [f"{_last_step(log_rows)} optimiser steps", f"held-out split: {split}" if split else ""]
    facts.append(f"wall time {duration(wall_time)}" if wall_time is not None else "")
    rest = list(sections) or [section("Held-out results", "<p>This run ended before an evaluation.</p>")]
    if config:
        opened = f"<details><summary>Show</summary><pre>{escape(config)}</pre></details>"
        rest.append(section("Configuration", opened, note="As resolved: with it the run can be repeated."))
    # Results first: what a reader came for. Curves explain them.
    body = [rest[0], _curves(log_rows, light), *rest[1:]]
    return page(f"{name}: report", name, " · ".join(fact for fact in facts if fact), body)


def page(title: str, heading: str, note: str, body: Sequence[str], *, style: str = "") -> str:
    """A whole HTML page; title, heading and note are text, `body` is HTML, `style` is laid over the report's own."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n<body><header>"
        f'<h1>{escape(heading)}</h1><p class="note">{escape(note)}</p></header>\n'
        "<main>" + "\n".join(body) + "</main></body></html>\n"
    )


def _curves(log_rows: Sequence[Mapping[str, Any]], light: bytes) -> str:
    if not panels(log_rows):
        return section("Curves", "<p>No step was logged.</p>")
    described = escape(f"Curves over steps. {_in_words(log_rows)}")
    dark = data_uri(draw(log_rows, dark=True), "png")
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{data_uri(light, "png")}" alt="{described}"></picture>'
    )
    return section("Curves", f'<div class="curves">{picture}</div>')


def _in_words(log_rows: Sequence[Mapping[str, Any]]) -> str:
    """What the curves show, for those who can't see them: where the training loss began and ended."""
    losses = [
        (row["step"], row["loss"])
        for row in log_rows
        if row.get("kind") == "train" and isinstance(row.get("loss"), float) and math.isfinite(row["loss"])
    ]
    if not losses:
        return "No step logged yet."
    (first_step, first), (last_step, last) = losses[0], losses[-1]
    return f"The training loss went from {first:.3g} at step {first_step} to {last:.3g} at step {last_step}."


def _last_step(log_rows: Sequence[Mapping[str, Any]]) -> int:
    return max((row["step"] for row in log_rows if isinstance(row.get("step"), int)), default=0)

"""How people are shown a captioning evaluation: the table of scores, pictures with what was said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lavis_lite.metrics.caption import cider
from lavis_lite.metrics.ptb import words
from lavis_lite.tasks.captions import Captioned
from lavis_lite.tasks.examples import thumbnail
from lavis_lite.tasks.html import card, cards, picture, section, table, tiles
from lavis_lite.tasks.predictions import evenly

COLUMNS = {
    "cider": "CIDEr", "bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "spice": "SPICE",
    "bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3",
}  # fmt: skip
SCALE = "Papers print 100 times these numbers."
REFERENCES_SHOWN = 5


@dataclass(frozen=True)
class CaptionExample:
    """A picture (JPEG bytes), its caption and its CIDEr beside the references."""

    item: Captioned
    cider: float
    picture: bytes


@dataclass(frozen=True)
class CaptionExamples:
    """Evenly drawn examples, and those with the lowest CIDEr."""

    even: list[CaptionExample]
    lowest: list[CaptionExample]


def draw_examples(rows: Sequence[Captioned], dataset: Any, number: int) -> CaptionExamples:
    """`number` images at even distances through the split, and half as many with the lowest CIDEr."""
    tokens = [[words(text) for text in item.references] for item in rows]
    scores = cider([words(item.prediction) for item in rows], tokens)
    even = evenly(range(len(rows)), number)
    lowest = sorted(range(len(rows)), key=lambda at: scores[at])[: (number + 1) // 2]

    def example(at: int) -> CaptionExample:
        return CaptionExample(rows[at], scores[at], thumbnail(dataset, rows[at].row))

    return CaptionExamples([example(at) for at in even], [example(at) for at in lowest])


def caption_table(
    metrics: Mapping[str, float], columns: Mapping[str, str] = COLUMNS
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of scores: all images, then each group; '-' where not measured.

    columns: metric -> title, of which those measured are shown.
    """
    shown = {name: title for name, title in columns.items() if name in metrics}
    suffixes = [""] + [f"_{group}" for group in _groups(metrics)]
    rows = [
        [
            suffix.strip("_").replace("_", "-") or "all",
            *(_number(metrics.get(name + suffix)) for name in shown),
        ]
        for suffix in suffixes
    ]
    return ["captions of", *shown.values()], rows if shown else []


def _groups(metrics: Mapping[str, float]) -> list[str]:
    """The suffixes that metrics have besides their own name: cider_in_domain gives in_domain."""
    found = (
        metric.removeprefix(f"{name}_")
        for name in COLUMNS
        for metric in metrics
        if metric.startswith(f"{name}_")
    )
    return list(dict.fromkeys(found))


def size_line(metrics: Mapping[str, float]) -> str:
    """How much was evaluated, in words."""
    left_out = int(metrics.get("unreadable_images", 0))
    images, references = metrics.get("num_images", 0), metrics.get("num_references", 0)
    size = f"{images:.0f} images, {references:.0f} reference captions"
    return size + (f"; {left_out} unreadable images left out" if left_out else "")


def scores_section(metrics: Mapping[str, float], columns: Mapping[str, str] = COLUMNS) -> str:
    """Headline scores, then all of them as a table."""
    headline = [(title, _number(metrics[name]), "") for name, title in columns.items() if name in metrics]
    told = [tile for tile in headline if not tile[0].startswith("BLEU") or tile[0] == "BLEU-4"]
    if "loss" in metrics:
        told.append(("Loss", f"{metrics['loss']:.3f}", "held out"))
    header, rows = caption_table(metrics, columns)
    body = tiles(told) + (table(header, rows) if rows else "")
    return section("Held-out results", body, note=f"{size_line(metrics)}. {SCALE}")


def examples_sections(examples: CaptionExamples) -> list[str]:
    """Pictures with the caption in bold, its CIDEr, and the references."""
    note = "The model's caption, then those of the annotations. Drawn at even distances through the split."
    result = [section("Images and their captions", cards(map(_card, examples.even)), note=note)]
    if examples.lowest:
        note = "Far from what people wrote: wrong, or right in other words."
        result.append(
            section("Captions with the lowest CIDEr", cards(map(_card, examples.lowest)), note=note)
        )
    return result


def _card(example: CaptionExample) -> str:
    item = example.item
    described = f"image {item.image_id}: {item.references[0]}"
    references = "".join(f"<li>{escape(text)}</li>" for text in item.references[:REFERENCES_SHOWN])
    group = f"{escape(item.group)}, " if item.group else ""
    said = f"<h3>{escape(item.prediction) or '(nothing)'}</h3>"
    note = f'<p class="note">{group}CIDEr {example.cider:.2f}</p>'
    return card(picture(example.picture, described), f"{said}{note}<ol>{references}</ol>")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

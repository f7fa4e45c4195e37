"""The parts of report.html: every text from outside is escaped, every picture is inside the file."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from lavis_lite.tasks.examples import Examples, ImageExample, TextExample
from lavis_lite.tasks.summary import loss_table, retrieval_table

CHARACTERS_OF_CAPTION = 300


def data_uri(content: bytes, kind: str) -> str:
    """The bytes as a data: address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def section(title: str, body: str, *, note: str = "") -> str:
    """A titled section; `body` is HTML, title and note are text."""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names its rows."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def metrics_section(metrics: Mapping[str, float]) -> str:
    """All metrics by name."""
    return section(
        "Held-out metrics", table(["metric", "value"], [[n, f"{v:.4g}"] for n, v in metrics.items()])
    )


def comparison_section(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Measured beside published numbers."""
    return section("Compared with what was published", table(header, rows))


def tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """Headline numbers: (name, value, what to compare it with)."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class=note>{escape(beside)}</dd></div>"
        for name, value, beside in values
    )
    return f'<dl class="tiles">{cells}</dl>'


def retrieval_section(metrics: Mapping[str, float]) -> str:
    """Headline recalls, then losses and all recalls as tables."""
    best = "rerank/" if "rerank/tr_r1" in metrics else "itc/"
    headline = []
    for way, name in (("tr", "Image to text, R@1"), ("ir", "Text to image, R@1")):
        beside = f"{metrics[f'itc/{way}_r1']:.3f} by ITC, " if best == "rerank/" else ""
        chance = f"{beside}{metrics[f'chance_{way}_r1']:.4f} by chance"
        headline.append((name, f"{metrics[f'{best}{way}_r1']:.3f}", chance))
    if "itm_acc" in metrics:
        headline.append(
            ("Matching accuracy", f"{metrics['itm_acc']:.3f}", "share of held-out pairs told right")
        )
    if "loss" in metrics:
        headline.append(("Sum of losses", f"{metrics['loss']:.3f}", "held out"))
    losses = loss_table(metrics)
    left_out = int(metrics["unreadable_images"])
    note = (
        f"{metrics['num_images']:.0f} images and {metrics['num_texts']:.0f} captions. "
        "TR: the caption for an image; IR: the image for a caption; ties count as wrong."
    ) + (f" {left_out} unreadable images were left out with their captions." if left_out else "")
    body = tiles(headline) + table(*retrieval_table(metrics)) + (table(*losses) if losses[1] else "")
    return section("Held-out results", body, note=note)


def examples_sections(examples: Examples) -> list[str]:
    """Images with their first captions, captions with their first images, and mistakes of both kinds."""
    mark = "Right answers carry a tick. Drawn at even distances through the split."
    result = [
        section("Images and their first captions", _image_cards(examples.images, examples), note=mark),
        section("Captions and their first images", _text_cards(examples.texts, examples), note=mark),
    ]
    wrong = _image_cards(examples.wrong_images, examples) if examples.wrong_images else ""
    wrong += _text_cards(examples.wrong_texts, examples) if examples.wrong_texts else ""
    if wrong:
        result.append(
            section("Mistakes", wrong, note="Queries whose first answer is wrong, at even distances.")
        )
    return result


def _image_cards(examples: Sequence[ImageExample], everything: Examples) -> str:
    return cards(_image_card(example, everything) for example in examples)


def _image_card(example: ImageExample, everything: Examples) -> str:
    answers = "".join(
        f'<li class="{"right" if right else "wrong"}">{tick(right)}{_caption(text)}</li>'
        for text, right in example.answers
    )
    own = ""
    if not any(right for _, right in example.answers):
        own = f'<p class="note">Not among them: {_caption(example.description)}</p>'
    return card(_picture(example.image, everything), f"<ol>{answers}</ol>{own}")


def _text_cards(examples: Sequence[TextExample], everything: Examples) -> str:
    return "".join(_text_card(example, everything) for example in examples)


def _text_card(example: TextExample, everything: Examples) -> str:
    answers = "".join(
        f'<li class="{"right" if right else "wrong"}">{_picture(image, everything)}{tick(right)}</li>'
        for image, right in example.answers
    )
    if not any(right for _, right in example.answers):
        answers += f'<li class="missing">{_picture(example.image, everything)}not among them</li>'
    return f'<article class="row"><h3>{_caption(example.text)}</h3><ol class="strip">{answers}</ol></article>'


def _picture(image: int, everything: Examples) -> str:
    described = f"image {image}: {everything.descriptions.get(image, 'without a caption')}"
    return picture(everything.thumbnails[image], described[:CHARACTERS_OF_CAPTION])


def picture(jpeg: bytes, description: str) -> str:
    """A picture with a description for those who can't see it."""
    described = escape(description)
    return f'<img src="{data_uri(jpeg, "jpeg")}" alt="{described}" title="{described}" loading="lazy">'


def card(shown: str, told: str) -> str:
    """A picture with something about it below."""
    return f'<article class="card">{shown}<div>{told}</div></article>'


def cards(several: Iterable[str]) -> str:
    """Cards side by side."""
    return f'<div class="cards">{"".join(several)}</div>'


def tick(right: bool) -> str:
    """The mark of a right answer, nothing for a wrong one."""
    return '<span class="tick" role="img" aria-label="right">✓</span> ' if right else ""


def _caption(text: str) -> str:
    short = text if len(text) <= CHARACTERS_OF_CAPTION else text[: CHARACTERS_OF_CAPTION - 1] + "…"
    return escape(short)

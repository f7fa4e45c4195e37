"""One page for a picture and texts about it: where the evidence for each text lies, drawn over the picture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from lavis_lite.tasks.examples import jpeg
from lavis_lite.tasks.heat import SIDE, overlay
from lavis_lite.tasks.html import picture, section
from lavis_lite.tasks.report import page

STYLE = """
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin-bottom: 1rem; }
figure { margin: 0; } figure img { display: block; max-width: 100%; image-rendering: auto; }
figcaption { font-size: .92rem; margin-top: .25rem; } figcaption b { font-size: 1rem; }
.words figure { width: 8rem; } .words img { width: 100%; height: auto; }
"""
SCORES = {
    "itg": "the log-probability that the model's own caption decoder says {} of the picture",
    "itm": "how much the matching score (log-odds of match) falls when {} is left out of the text",
}
METHODS = {
    "gradcam": "Bright is where the model's queries read something that raises {score}, to first order (Grad-CAM: "
    "cross-attention weight times its gradient, where positive).",
    "attention": "Bright is where the queries looked while they read the text: the mean of cross-attention over "
    "queries, heads and blocks. It shows what was read, and nothing about what it was good for.",
    "occlusion": "Bright is where covering the picture with its median colour lowers {score}.",
}
CAUTION = (
    "Every map has its own scale: the largest value is the brightest, however small it is. A map says where evidence "
    "was found by this model, not whether the text is true; a text that doesn't fit the picture gets a map too."
)
ABOUT_WORDS = {
    "itg": "A word's map is of its probability after the words before it: what these leave open is what the picture "
    "decides. It is of this word in this text, and a word that follows from the others has a map of little evidence.",
    "itm": "A word's map is of what leaving out this word alone changes, the text around it staying as it is.",
}


def explain_page(name: str, shown: Image.Image, found: Sequence[Any], *, method: str, score: str) -> str:
    """The page as HTML.

    Args:
        name: the picture's. found: `Explanation`s of texts about it, made with `method` and `score`.
    """
    body = [_section(shown, item, method, score) for item in found]
    what = SCORES[score].format("the text" if score == "itm" else "the text's words")
    note = f"{METHODS[method].format(score=what)} {CAUTION}"
    return page(f"{name}: explained", name, note, body, style=STYLE)


def _section(shown: Image.Image, item: Any, method: str, score: str) -> str:
    plain = shown.copy()
    plain.thumbnail((SIDE, SIDE))
    if max(plain.size) < SIDE:
        scale = SIDE / max(plain.size)
        plain = plain.resize((round(plain.width * scale), round(plain.height * scale)))
    heat = overlay(shown, item.map)
    both = _figure(jpeg(plain), "the picture", "as it is") + _figure(
        heat, f"evidence over the picture for: {item.text}", _told(item, method, score)
    )
    body = f'<div class="figures">{both}</div>'
    if item.words:
        words = "".join(_word(shown, word) for word in item.words)
        body += f'<p class="note">{escape(ABOUT_WORDS[score])}</p><div class="figures words">{words}</div>'
    return section(item.text, body, note=f"Matches the picture with probability {item.match:.3f} (ITM).")


def _told(item: Any, method: str, score: str) -> str:
    if item.score is None:
        return method
    unit = "log-probability" if score == "itg" else "fall of the log-odds"
    empty = "" if item.map.any() else "; nothing in the picture speaks for it"
    return f"{method}: {unit} {item.score:.2f}{empty}"


def _word(shown: Image.Image, word: Any) -> str:
    heat = overlay(shown, word.map)
    return _figure(heat, f"evidence for the word {word.word}", f"{word.score:.2f}", heading=word.word)


def _figure(content: bytes, described: str, told: str, *, heading: str = "") -> str:
    bold = f"<b>{escape(heading)}</b> " if heading else ""
    return f"<figure>{picture(content, described)}<figcaption>{bold}{escape(told)}</figcaption></figure>"

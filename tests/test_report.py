from __future__ import annotations

import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lavis_lite.common.expected import Expected
from lavis_lite.tasks.base import BaseTask, EvalArgs, Evaluation, RunFacts
from lavis_lite.tasks.curves import draw, panels, smoothed
from lavis_lite.tasks.pretrain import ImageTextPretrainTask
from tests.retrieval_world import WORDS, Matcher, Pictures

VOID = {"meta", "img", "source", "br"}
EVIL = "<script>alert('x')</script> & \"quoted\""


class Page(HTMLParser):
    """Reads a page strictly: every opened element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


class EvilPictures(Pictures):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.texts = [[f"{EVIL} {number}", f"plain {number}"] for number in range(size)]


class Reader(Matcher):
    """Takes any text, and finds the right one: the number at its end is the picture's."""

    def tokenize(self, texts: list[str]) -> Any:
        said = [WORDS[int(text.split()[-1])] + (f" {WORDS[39]}" if "<" in text else "") for text in texts]
        return super().tokenize(said)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("reports") / f"run {EVIL[:8]}"
    task = ImageTextPretrainTask(k_test=8, loss_batch_size=8)
    evaluation = task.evaluate(Reader(), EvilPictures(30), loader_args=EvalArgs())
    facts = RunFacts(folder, split="val", wall_time=61.0, config=f"model: {EVIL}")
    files = task.write_report(folder, evaluation, log(), facts)
    assert files == {"curves": folder / "curves.png", "report": folder / "report.html"}
    return Page(files["report"].read_text(encoding="utf-8"))


def log(steps: int = 40) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows.append(
            {"kind": "train", "step": step, "loss": 3 / step, "loss_itc": 2 / step, "lr": 1e-4, "epoch": 0}
        )
        if step % 20 == 0:
            metrics = {"val/itc/tr_r1": 0.5, "val/loss": 0.4, "val/num_images": 30.0, "val/probe/shape": 0.9}
            rows.append({"kind": "eval", "split": "val", "step": step, **metrics})
    return rows


def test_the_page_is_whole_and_needs_nothing_outside_itself(page: Page) -> None:
    assert len(page.html) < 1_500_000
    for _, attrs in page.elements:
        for name, value in attrs.items():
            if name in ("src", "srcset", "href"):
                assert str(value).startswith("data:image/"), value
    assert not re.search(r"https?://|url\(|@import", page.html)
    assert not page.all("script")
    assert EVIL in page.text and f"model: {EVIL}" in page.text and "1 min 1 s" in page.text
    assert page.all("html")[0]["lang"] == "en" and "prefers-color-scheme: dark" in page.html


def test_every_picture_is_described_and_right_answers_are_marked_in_words(page: Page) -> None:
    pictures = page.all("img")
    assert len(pictures) > 20 and all(attrs["alt"] for attrs in pictures)
    rights = [attrs for attrs in page.all("li") if attrs["class"] == "right"]
    ticks = [attrs for attrs in page.all("span") if attrs.get("aria-label") == "right"]
    assert len(rights) == len(ticks) > 0
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.all("th"))


def test_right_and_wrong_answers_are_told_apart() -> None:
    data = EvilPictures(30)
    task = ImageTextPretrainTask(rerank="none", num_examples=4)
    details = task.evaluate(Reader(), data, loader_args=EvalArgs()).details
    examples, gallery = details.examples, details.gallery
    assert len(examples.images) == len(examples.texts) == 4 and len(examples.wrong_texts) <= 2
    for example in examples.images + examples.wrong_images:
        first = gallery.similarity[example.image].topk(5).indices.tolist()
        assert [text for text, _ in example.answers] == [gallery.texts[number] for number in first]
        assert all(right == (text in data.texts[example.image]) for text, right in example.answers)
    assert not any(example.answers[0][1] for example in examples.wrong_images + examples.wrong_texts)
    assert all(
        right == (image == example.image) for example in examples.texts for image, right in example.answers
    )
    shown = {image for example in examples.texts + examples.wrong_texts for image, _ in example.answers}
    assert shown <= set(examples.thumbnails)
    with Image.open(io.BytesIO(examples.thumbnails[examples.images[1].image])) as thumbnail:
        assert thumbnail.format == "JPEG" and max(thumbnail.size) == 160


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"kind": "train", "step": 1, "loss": 2.0, "lr": 1e-4}],
        [{"kind": "train", "step": 1, "loss": "nan"}, {"kind": "note"}],
        [{"kind": "eval", "split": "val", "step": 3, "val/itc/tr_r1": 0.5}],
        [{"kind": "train", "step": 1, "loss": float("inf")}, {"kind": "train", "step": 2, "loss": 1.0}],
    ],
)
def test_an_interrupted_run_gets_its_report(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    files = ImageTextPretrainTask().write_report(tmp_path, None, rows, RunFacts(tmp_path))
    page = Page(files["report"].read_text())
    assert "This run ended before an evaluation." in page.text
    with Image.open(files["curves"]) as image:
        assert image.format == "PNG" and len(image.convert("L").getcolors() or []) > 2
    assert ImageTextPretrainTask().summary(None, RunFacts(tmp_path)) == ["not evaluated yet"]


def test_a_task_without_retrieval_has_the_plain_report(tmp_path: Path) -> None:
    evaluation = Evaluation({"probe/shape": 0.96, "<b>": 1.0})
    files = BaseTask().write_report(tmp_path, evaluation, log(), RunFacts(tmp_path))
    page = Page(files["report"].read_text())
    assert "probe/shape" in page.text and "0.96" in page.text and "<b>" in page.text


def test_curves_show_losses_rates_and_scores_but_no_counts() -> None:
    shown = {panel.title: panel for panel in panels(log())}
    assert list(shown) == [
        "Loss (sum)", "Contrastive loss, ITC", "Held-out retrieval", "Held-out scores", "Learning rate"
    ]  # fmt: skip
    assert shown["Loss (sum)"].held_out["held out (val)"].xy() == ([20, 40], [0.4, 0.4])
    assert list(shown["Held-out retrieval"].held_out) == ["TR@1 by ITC"]
    assert list(shown["Held-out scores"].held_out) == ["probe/shape"]


def test_a_step_done_again_after_a_resume_counts_once() -> None:
    rows = [*log(3), {"kind": "train", "step": 2, "loss": 9.0}]
    assert panels(rows)[0].training["training"].xy() == ([1, 2, 3], [3.0, 9.0, 1.0])


def test_curves_are_drawn_for_both_kinds_of_page() -> None:
    light, dark = (Image.open(io.BytesIO(draw(log(), dark=dark))).convert("RGB") for dark in (False, True))
    assert light.size == dark.size and light.getpixel((0, 0)) == (255, 255, 255)
    assert sum(dark.getpixel((0, 0))) < 100


def test_smoothing_is_a_moving_mean() -> None:
    values = torch.rand(80).tolist()
    smooth = smoothed(values)
    assert len(smooth) == 80 and smooth[40] == pytest.approx(sum(values[38:43]) / 5)
    assert smooth[0] == pytest.approx(sum(values[:3]) / 3) and smoothed(values[:10]) == []


def test_matplotlib_is_loaded_for_reports_only() -> None:
    code = "import sys, lavis_lite.tasks.pretrain; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_published_numbers_stand_in_the_report(tmp_path: Path) -> None:
    comparison = Expected("A <Paper>", {"loss": 0.5, "lost": 1.0}).rows({"loss": 0.75})
    facts = RunFacts(tmp_path, comparison=comparison)
    page = BaseTask().write_report(tmp_path, Evaluation({"loss": 0.75}), log(), facts)["report"].read_text()
    assert "expected (A &lt;Paper&gt;)" in page
    assert "<td>0.5000</td><td>0.7500</td><td>+0.2500</td>" in page
    assert "lost (not measured; did you mean &#x27;loss&#x27;?)" in page

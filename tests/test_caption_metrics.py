from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from data_helpers import COCO_MINI, needs_coco_mini, warnings_logged

from lavis_lite.common.errors import MissingDependencyError
from lavis_lite.metrics import coco_caption, java_caption
from lavis_lite.metrics.caption import bleu, cider, common_subsequence, rouge_l
from lavis_lite.metrics.coco_caption import QUICK_METRICS, score_by_group, score_captions
from lavis_lite.metrics.ptb import words

needs_pycocoevalcap = pytest.mark.skipif(not find_spec("pycocoevalcap"), reason="needs pycocoevalcap")


def split(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


# --- by hand ------------------------------------------------------------------------------------------------


def test_bleu_by_hand() -> None:
    """Clipping to the best reference, corpus totals, and the nearest reference's length."""
    scores = bleu(
        split("the the the cat", "a dog"), [split("the cat the", "a cat sat here now"), split("a dog")]
    )
    # Unigrams: "the" twice of three times, "cat", "a", "dog": 5 of 6; bigrams: "the cat", "a dog": 2 of 4.
    # Lengths: 4 and 2 predicted; of 3 and 5 words, equally near to 4, the shorter: 5 in all, no penalty.
    assert scores[:2] == pytest.approx([5 / 6, math.sqrt(5 / 6 * 2 / 4)])
    (first, *_) = bleu(split("a cat"), [split("a cat sat down here")])
    assert first == pytest.approx(math.exp(1 - 5 / 2))


def test_rouge_by_hand() -> None:
    """Precision from the one reference, recall from the other."""
    score = rouge_l(split("a dog on a mat"), [split("a dog sits on the mat today", "dog mat")])
    precision, recall = 4 / 5, 2 / 2  # "a dog on mat" of the first; "dog mat" is all of the second
    assert score == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))
    assert common_subsequence(list("abcbdab"), list("bdcaba")) == 4


def test_cider_by_hand() -> None:
    """Three images: a word of one image weighs log 3, of two log 1.5, of all nothing; unseen words log 3."""
    references = [split("a dog"), split("a cat"), split("a dog", "a cow")]
    scores = cider(split("a dog", "a bird", "cow cow"), references)
    # Unigrams: cosine 1 each ("a" is nothing). Bigrams: "a dog" is in two images: cosine 1. No longer n-grams.
    assert scores[0] == pytest.approx(10 * (1 + 1) / 4)
    assert scores[1] == pytest.approx(0)
    # "cow" twice where the reference has it once: min(2w, w) * w / (2w * w) = 1/2, of the second reference only.
    assert scores[2] == pytest.approx(10 * (0 + 1 / 2) / 2 / 4)


def test_cider_is_less_for_another_length() -> None:
    filler = [split("x"), split("y")]
    near, *_ = cider(split("red dog", "x", "y"), [split("red dog"), *filler])
    far, *_ = cider(split("red dog", "x", "y"), [split("red dog runs far away"), *filler])
    logs = {1: math.sqrt(2 / 5), 2: math.sqrt(1 / 4)}  # cosines of two words to five, one pair to four
    assert near == pytest.approx(10 * 2 / 4)
    assert far == pytest.approx(10 * (logs[1] + logs[2]) / 4 * math.exp(-9 / 72))


def test_the_reference_itself_scores_highest() -> None:
    texts = ["a man rides a wave on a board", "two dogs sleep on a red sofa", "a plate of food and a fork"]
    scores = score_captions(texts, [[text] for text in texts], QUICK_METRICS)
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0) | {"cider": 10.0})
    assert list(scores) == ["cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]


# --- edges --------------------------------------------------------------------------------------------------


def test_an_empty_prediction_scores_nothing_and_harms_nobody() -> None:
    whole = ["a red dog on a mat", "two cats"]
    scores = score_captions(["", "two cats"], [[text] for text in whole], QUICK_METRICS)
    assert scores["rouge_l"] == pytest.approx(0.5) and scores["cider"] == pytest.approx(10 * 2 / 4 / 2)
    assert scores["bleu_1"] == pytest.approx(math.exp(1 - 8 / 2))
    nothing = score_captions(["", "..."], [[text] for text in whole], QUICK_METRICS)
    assert set(nothing.values()) == {0.0}
    assert score_captions([], []) == {}


def test_references_without_words_are_no_fault() -> None:
    scores = score_captions(["a dog", "..."], [["...", ""], [""]], QUICK_METRICS)
    assert all(0 <= value < 1e-3 for value in scores.values())


def test_a_single_image_has_no_cider_and_the_log_says_so() -> None:
    with warnings_logged() as messages:
        scores = score_captions(["a dog"], [["a dog", "a hound"]], QUICK_METRICS)
    assert scores["cider"] == 0 and scores["bleu_1"] == pytest.approx(1) and scores["rouge_l"] == 1
    assert len(messages) == 1 and "single image" in messages[0]


def test_other_scripts_count_like_english() -> None:
    scores = score_captions(["un café", "犬 が 走る"], [["Un café."], ["犬 が 走る"]], QUICK_METRICS)
    assert scores["bleu_1"] == pytest.approx(1) and scores["rouge_l"] == 1 and scores["cider"] > 0


# --- one that fails -----------------------------------------------------------------------------------------

TEXTS = (["a red dog", "a cat"], [["a red dog"], ["a black cat"]])


def test_a_failing_metric_loses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> dict[str, float]:
        raise ZeroDivisionError("no luck")

    monkeypatch.setitem(coco_caption.SCORERS, "bleu", broken)
    with warnings_logged() as messages:
        scores = score_by_group(*TEXTS, groups=["a", "b"], metrics=QUICK_METRICS)
    assert {"cider", "rouge_l", "rouge_l_a", "rouge_l_b"} <= set(scores) and "bleu_1" not in scores
    about = [message for message in messages if "bleu" in message]
    assert len(about) == 1 and "ZeroDivisionError: no luck" in about[0]


def test_without_java_its_metrics_are_left_out_with_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java_caption.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(java_caption.shutil, "which", lambda name: None)
    with warnings_logged() as messages:
        scores = score_captions(*TEXTS)
    assert len(scores) == 6 and [message.split()[0] for message in messages] == ["meteor", "spice"]
    assert all("needs Java" in message for message in messages)


def test_without_the_package_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java_caption.importlib.util, "find_spec", lambda name: None)
    for metric in (java_caption.meteor, java_caption.spice):
        with pytest.raises(MissingDependencyError, match=r"pip install 'lavis-lite\[eval\]'"):
            metric(split("a"), [split("a")])


def test_spice_without_its_files_never_asks_the_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    def fetched(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(java_caption.importlib.util, "find_spec", lambda name: Spec())
    monkeypatch.setattr(java_caption.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(java_caption, "import_module", fetched)
    with pytest.raises(MissingDependencyError, match=r"400 MB.*get_stanford_models"):
        java_caption.spice(split("a"), [split("a")])


def test_the_javas_get_tokens_and_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Fake:
        def compute_score(self, references: Any, predictions: Any) -> tuple[float, list[float]]:
            print("noise")
            assert (references, predictions) == ({0: ["a dog"], 1: ["b", "c"]}, {0: ["a  dog"], 1: [""]})
            return 0.25, []

    monkeypatch.setattr(java_caption, "_need_java", lambda name: None)
    monkeypatch.setattr(java_caption, "import_module", lambda name: type("M", (), {"Meteor": Fake}))
    predictions = [["a", "|||", "dog"], []]
    assert java_caption.meteor(predictions, [split("a dog"), split("b", "c")]) == 0.25
    assert capsys.readouterr().out == ""


# --- groups -------------------------------------------------------------------------------------------------


def test_groups_are_scored_as_corpora_of_their_own() -> None:
    predictions = ["a red dog", "a cat", "two men", "a bus", "no group"]
    references = [["a red dog runs"], ["a black cat"], ["two men sit"], ["a bus"], ["x"]]
    groups = ["in-domain", "out of domain", "in-domain", "out of domain", None]
    scores = score_by_group(predictions, references, groups, QUICK_METRICS)
    within = score_captions(predictions[0:3:2], references[0:3:2], QUICK_METRICS)
    assert {name: scores[f"{name}_in_domain"] for name in within} == within
    assert scores["cider"] == score_captions(predictions, references, QUICK_METRICS)["cider"]
    assert len(scores) == 3 * len(within) and "cider_out_of_domain" in scores


# --- pycocoevalcap's own ------------------------------------------------------------------------------------


def coco_mini_corpus() -> tuple[list[str], list[list[str]]]:
    """The first caption of each image as its prediction, some of them another image's, cut or repeated."""
    captions: dict[int, list[str]] = {}
    for name in ("train", "val"):
        content = json.loads((COCO_MINI / f"annotations/captions_{name}2017.json").read_text())
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    several = list(captions.values())
    changes = [
        lambda i: several[i][0],
        lambda i: several[i - 1][0],
        lambda i: several[i][0][:25],
        lambda i: several[i][0] + " on a " + several[i][-1],
        lambda i: "",
        lambda i: "a a a a man",
    ]
    predictions = [changes[i % len(changes)](i) for i in range(len(several))]
    return predictions, [own[1 : 2 + i % 4] for i, own in enumerate(several)]


def theirs(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    hypotheses = {i: [" ".join(words(text))] for i, text in enumerate(predictions)}
    truths = {i: [" ".join(words(text)) for text in own] for i, own in enumerate(references)}
    scorers = {}
    for name in ("Bleu", "Rouge", "Cider"):
        scorers[name] = getattr(
            importlib.import_module(f"pycocoevalcap.{name.lower()}.{name.lower()}"), name
        )()
    with contextlib.redirect_stdout(io.StringIO()):
        found = {name: scorer.compute_score(truths, hypotheses)[0] for name, scorer in scorers.items()}
    blues = {f"bleu_{n}": float(value) for n, value in enumerate(found["Bleu"], 1)}
    return {**blues, "rouge_l": float(found["Rouge"]), "cider": float(found["Cider"])}


@needs_pycocoevalcap
@needs_coco_mini
@pytest.mark.parametrize("images", [159, 7, 1])
def test_scores_are_pycocoevalcaps_own(images: int) -> None:
    predictions, references = coco_mini_corpus()
    assert len(predictions) == 159
    chosen = predictions[:images], references[:images]
    assert score_captions(*chosen, QUICK_METRICS) == pytest.approx(theirs(*chosen), abs=1e-7)


@needs_pycocoevalcap
def test_a_corpus_without_a_match_has_their_small_bleu() -> None:
    predictions, references = ["a dog runs on grass", "b"], [["one two three four five"], ["two words"]]
    assert score_captions(predictions, references, QUICK_METRICS) == pytest.approx(
        theirs(predictions, references), abs=1e-7
    )


@pytest.mark.slow
@needs_pycocoevalcap
@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_meteor_runs() -> None:
    score = score_captions(
        ["a dog on a sofa", "", "two men"], [["a dog on a couch"], ["a cat"], ["two men"]], ["meteor"]
    )
    assert 0.3 < score["meteor"] < 0.8

"""Re-ranking what a search has found: its order, its scores, and the weight of matching."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_helpers import warnings_logged
from PIL import Image
from search_world import colour_encoder, save_pictures

from lavis_lite.common.errors import InputError
from lavis_lite.search import Searcher, build_index, open_index
from lavis_lite.search import searcher as module
from lavis_lite.search.present import as_json, as_table


@pytest.fixture
def built(tmp_path: Path) -> Path:
    save_pictures(tmp_path / "pictures", 12)
    build_index(tmp_path / "pictures", tmp_path / "idx", colour_encoder())
    return tmp_path / "idx"


def test_rerank_orders_by_matching_and_keeps_what_cannot_be_read(built: Path, tmp_path: Path) -> None:
    encoder = colour_encoder()
    searcher = Searcher(open_index(built), encoder)
    plain = searcher.search("120 9 99", top=12)
    (tmp_path / "pictures" / plain[0].image[-7:]).unlink()
    with warnings_logged() as messages:
        found = searcher.search("120 9 99", top=12, rerank="itm", candidates=6)
    assert len(messages) == 1 and "not re-ranked" in messages[0] and "no such file" in messages[0]
    with_blue = {hit.image: Image.open(hit.image).getpixel((0, 0))[2] for hit in plain[1:6]}
    assert [hit.image for hit in found[:5]] == sorted(with_blue, key=lambda image: with_blue[image])
    assert found[5].image == plain[0].image and found[5].itm is None
    assert [hit.image for hit in found[6:]] == [hit.image for hit in plain[6:]]
    total = searcher.search("120 9 99", top=3, rerank="sum", candidates=6)
    assert all(hit.itm is not None and 0 <= hit.itm <= 1 for hit in total)
    logit = 5 - 9 * with_blue[total[0].image] / 255
    assert total[0].reranked == pytest.approx(logit + total[0].score / 0.1, abs=1e-4)


def test_the_text_is_read_once_for_all_pictures(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_SIZE", 5)
    encoder = colour_encoder()
    found = Searcher(open_index(built), encoder).search("120 9 99", top=12, rerank="itm")
    assert all(hit.itm is not None for hit in found)
    assert (encoder.model.images_seen, encoder.model.texts_seen) == (12, 2)  # once by ITC, once by matching


def test_a_score_is_a_cosine_and_what_is_re_ranked_says_so(built: Path) -> None:
    searcher = Searcher(open_index(built), colour_encoder())
    cosines = {hit.image: hit.score for hit in searcher.search("120 9 99", top=12)}
    hits = searcher.search("120 9 99", top=8, rerank="sum", candidates=5)
    assert {hit.image: hit.score for hit in hits}.items() <= cosines.items()
    shown = json.loads(as_json("120 9 99", hits))["results"]
    assert [sorted(one) for one in shown[:5]] == [["image", "itm", "rank", "reranked", "score"]] * 5
    assert [sorted(one) for one in shown[5:]] == [["image", "rank", "score"]] * 3
    values = [one["reranked"] for one in shown[:5]]
    assert values == sorted(values, reverse=True)
    rows = [list(column.cells) for column in as_table(hits).columns]
    assert [column.header for column in as_table(hits).columns] == ["", "score", "re-ranked", "ITM", "image"]
    assert rows[2][5:] == rows[3][5:] == ["-"] * 3


def test_the_weight_of_matching_is_the_encoders_unless_it_is_given(built: Path) -> None:
    encoder = colour_encoder()
    encoder.itm_weight = 0.5
    searcher = Searcher(open_index(built), encoder)
    for given, used in ((None, 0.5), (2.0, 2.0)):
        for hit in searcher.search("120 9 99", rerank="sum", itm_weight=given):
            logit = 5 - 9 * Image.open(hit.image).getpixel((0, 0))[2] / 255  # type: ignore[index, operator]
            assert hit.reranked == pytest.approx(used * logit + hit.score / 0.1, abs=1e-4)
    for form, weight, said in (
        ("sum", 0.0, "must be above 0, not 0.0"),
        ("itm", 1.0, "part of --rerank sum"),
        (None, 1.0, "part of --rerank sum"),
    ):
        with pytest.raises(InputError, match=said):
            searcher.search("120 9 99", rerank=form, itm_weight=weight)

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.registry import registry
from lavis_lite.tasks import feature_spool, rerank
from lavis_lite.tasks.base import BaseTask, EvalArgs, RunFacts
from lavis_lite.tasks.pretrain import ImageTextPretrainTask
from lavis_lite.tasks.rerank import pair_scores
from lavis_lite.tasks.summary import duration, table_lines
from tests.retrieval_world import Matcher, Pictures, slow_retrieval

ARGS = EvalArgs(batch_size=5, max_bad_fraction=0.5)


def evaluate(
    data: Any, model: Any = None, *, args: EvalArgs = ARGS, final: bool = True, **options: Any
) -> Any:
    task = ImageTextPretrainTask(**{"k_test": 5, "loss_batch_size": 4, **options})
    return task.evaluate(model or Matcher(), data, loader_args=args, final=final)


@pytest.mark.parametrize("form", ["sum", "itm", "lavis"])
@pytest.mark.parametrize("k", [5, 12, 1000])
def test_retrieval_equals_the_slow_version(form: Any, k: int) -> None:
    data = Pictures(unreadable=(4, 11))
    metrics = evaluate(data, rerank=form, k_test=k).metrics
    expected = slow_retrieval(Matcher(), data, k, form)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert f"rerank_{form}/tr_r1" not in metrics
    for other in {"sum", "itm", "lavis"} - {form}:
        slow = slow_retrieval(Matcher(), data, k, other)
        for name in ("tr_r1", "tr_r5", "ir_r1", "ir_r10"):
            assert metrics[f"rerank_{other}/{name}"] == pytest.approx(slow[f"rerank/{name}"])
    assert expected["itc/ir_mean_rank"] != expected["rerank/ir_mean_rank"]


def test_a_small_weight_of_the_matching_head_only_breaks_ties_of_itc() -> None:
    data = Pictures()
    metrics = evaluate(data, k_test=12, itm_weight=1e-9).metrics
    full = evaluate(data, k_test=12).metrics
    for name in ("tr_mean_rank", "ir_mean_rank", "ir_r1"):
        assert metrics[f"rerank/{name}"] == metrics[f"itc/{name}"]
    assert full["rerank/ir_mean_rank"] != full["itc/ir_mean_rank"]
    with pytest.raises(ConfigError, match=r"task\.itm_weight: must be above 0, got 0"):
        ImageTextPretrainTask(itm_weight=0)


def test_the_sum_is_the_odds_of_a_match_given_how_negatives_were_drawn() -> None:
    """Bayes' rule on a small joint distribution: the forms rank alike only where they should."""
    joint = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) ** 4
    joint /= joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0)
    similarity = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    negatives = independent * (similarity / 0.5).exp()
    best_head = torch.stack([(negatives / negatives.sum()).log(), joint.log()], dim=-1)
    scores = pair_scores("sum", best_head, similarity, 0.5)
    odds = (joint / independent).log()
    assert torch.allclose(scores - scores.mean(), odds - odds.mean(), atol=1e-5)
    assert not torch.equal(pair_scores("itm", best_head, similarity, 0.5).argsort(), odds.argsort())


def test_everything_is_computed_once() -> None:
    data, model = Pictures(), Matcher()
    details = evaluate(data, model, loss_batches=0).details
    similarity = details.gallery.similarity
    union = {(i, int(t)) for i in range(23) for t in similarity[i].topk(5).indices}
    union |= {(int(i), t) for t in range(similarity.shape[1]) for i in similarity[:, t].topk(5).indices}
    texts = sum(len(captions) for captions in data.texts)
    assert (model.images_seen, model.texts_seen, model.pairs_seen) == (23, texts, len(union))


def test_re_ranking_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    model = Matcher()
    evaluate(Pictures(), model, loss_batches=0)
    assert f"pair {model.pairs_seen}/{model.pairs_seen}" in capsys.readouterr().err


@pytest.mark.parametrize(("images", "texts", "pairs"), [(1, 7, 3), (24, 1 << 20, 64), (1 << 20, 1, 2)])
def test_blocks_of_images_texts_and_pairs_change_nothing(
    monkeypatch: pytest.MonkeyPatch, images: int, texts: int, pairs: int
) -> None:
    first = Matcher()
    whole = evaluate(Pictures(), first, k_test=5).metrics
    assert first.texts_projected == whole["num_texts"]
    monkeypatch.setattr(rerank, "IMAGE_BLOCK", 12 * images)
    monkeypatch.setattr(rerank, "TEXT_BLOCK", texts)
    monkeypatch.setattr(rerank, "MAX_PAIRS", pairs)
    monkeypatch.setattr(feature_spool, "MEMORY_LIMIT", 0)
    model = Matcher()
    assert evaluate(Pictures(), model, k_test=5).metrics == pytest.approx(whole, abs=1e-6)
    assert model.texts_projected == (model.pairs_seen if images == 1 else first.texts_projected)


def test_what_was_projected_is_gone_before_the_next_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of a block of images are hundreds of megabytes."""
    monkeypatch.setattr(rerank, "IMAGE_BLOCK", 12 * 4)
    monkeypatch.setattr(rerank, "TEXT_BLOCK", 5)

    class Watched(Matcher):
        images: tuple[weakref.ref[Any], ...] = ()
        starts: tuple[weakref.ref[Any], ...] = ()

        def project_image(self, image_embeds: torch.Tensor) -> torch.Tensor:
            assert [kept() for kept in self.images] == [None] * len(self.images)
            found = super().project_image(image_embeds)
            self.images = (*self.images, weakref.ref(found), weakref.ref(image_embeds))
            return found

        def project_text(self, tokens: Any) -> Any:
            assert [kept() for kept in self.starts] == [None] * len(self.starts)
            found = replace(super().project_text(tokens))
            self.starts = (*self.starts, weakref.ref(found))
            return found

        def query_features(self, images: torch.Tensor) -> torch.Tensor:
            found = super().query_features(images)
            self.images = ()  # the encoding's own features, which the batch still has
            return found

    model = Watched()
    evaluate(Pictures(), model, loss_batches=0)
    assert len(model.images) == 2 * 7 and len(model.starts) > 6


def test_result_depends_neither_on_batch_size_nor_on_what_was_drawn_before() -> None:
    data = Pictures()
    first = evaluate(data).metrics
    torch.rand(3)
    assert evaluate(data, args=EvalArgs(batch_size=23)).metrics == pytest.approx(first, abs=1e-6)
    assert evaluate(data, args=EvalArgs(batch_size=4, num_workers=2)).metrics == pytest.approx(
        first, abs=1e-6
    )


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = Matcher()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    evaluate(Pictures(), model)
    assert model.training and torch.equal(torch.rand(1), expected)
    model.eval()
    evaluate(Pictures(), model)
    assert not model.training


def test_a_constant_scorer_gets_nothing() -> None:
    class Constant(Matcher):
        def text_features(self, tokens: Any) -> torch.Tensor:
            return torch.zeros(len(tokens.input_ids), 8)

        def match_logits(self, image_kv: Any, tokens: Any) -> torch.Tensor:
            return torch.zeros(len(tokens.input_ids), 2)

    metrics = evaluate(Pictures(), Constant()).metrics
    assert {metrics[f"{by}/{way}_r1"] for by in ("itc", "rerank") for way in ("tr", "ir")} == {0.0}


def test_what_runs_in_training_is_told_apart() -> None:
    data = Pictures()
    assert "rerank/tr_r1" not in evaluate(data, final=False).metrics
    model = Matcher()
    few = evaluate(data, model, final=False, k_test_in_training=2, loss_batches=0)
    assert "rerank/tr_r1" in few.metrics and model.pairs_seen < 23 * 2 + few.metrics["num_texts"] * 2
    assert "rerank/tr_r1" not in evaluate(data, rerank="none").metrics


@pytest.mark.parametrize(
    ("final", "options", "kept"),
    [(False, {}, 0), (True, {"rerank": "none"}, 0), (False, {"k_test_in_training": 2}, 23), (True, {}, 23)],
)
def test_features_are_kept_only_where_they_will_be_re_ranked(
    monkeypatch: pytest.MonkeyPatch, final: bool, options: dict[str, Any], kept: int
) -> None:
    appended: list[int] = []
    append = feature_spool.FeatureSpool.append

    def counted(spool: feature_spool.FeatureSpool, rows: torch.Tensor) -> None:
        appended.append(len(rows))
        append(spool, rows)

    monkeypatch.setattr(feature_spool.FeatureSpool, "append", counted)
    evaluate(Pictures(), final=final, **options)
    assert sum(appended) == kept


def test_unreadable_images_leave_with_their_captions() -> None:
    data = Pictures(unreadable=(0, 9))
    metrics = evaluate(data).metrics
    left = [len(texts) for row, texts in enumerate(data.texts) if row not in (0, 9)]
    assert (metrics["num_images"], metrics["num_texts"], metrics["unreadable_images"]) == (21, sum(left), 2)
    assert metrics["chance_ir_r1"] == pytest.approx(1 / 21)
    assert metrics["chance_tr_r1"] == pytest.approx(sum(left) / sum(left) / 21)


def test_nothing_to_retrieve_is_an_error_of_the_data() -> None:
    with pytest.raises(DataError, match="none of"):
        evaluate(Pictures(3, unreadable=(0, 1, 2)), args=EvalArgs(max_bad_fraction=1.0))
    silent = Pictures(3)
    silent.captions = lambda index: []  # type: ignore[method-assign]
    with pytest.raises(DataError, match="none has a caption"):
        evaluate(silent)


def test_rows_of_one_picture_are_one_image() -> None:
    data = Pictures()
    data.ids[7] = data.ids[2]
    data.pixels[7] = data.pixels[2]
    evaluation = evaluate(data)
    gallery = evaluation.details.gallery
    assert len(gallery.rows) == 22 and 7 not in gallery.rows
    own = [
        text for text, image in zip(gallery.texts, gallery.image_of_text.tolist(), strict=True) if image == 2
    ]
    assert own == data.texts[2] + data.texts[7]


def test_losses_come_from_whole_batches_of_different_images_drawn_once_and_for_all() -> None:
    data, model = Pictures(), Matcher()
    first = evaluate(data, model).metrics
    assert [len(batch) for batch in model.batches] == [4] * 5
    again = Matcher()
    assert evaluate(data, again).metrics == first and again.batches == model.batches
    assert evaluate(data, seed=1).metrics["loss"] != first["loss"]
    assert first["loss_itc"] == pytest.approx(first["loss"] / 2) and "features" not in first
    whole = Matcher()
    evaluate(data, whole, loss_batch_size=100)
    assert [len(batch) for batch in whole.batches] == [23]
    few = Matcher()
    evaluate(data, few, loss_batches=2)
    assert len(few.batches) == 2


def run_ranks(world: int, folder: Path) -> list[Any]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("retrieval_world.py")
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(world), "PYTHONPATH": str(Path(__file__).parent.parent)}
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(folder)], env={**common, "RANK": str(rank)})
        for rank in range(world)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0] * world
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    """23 images of which 2 can't be read, one image for two processes, and features just too many for the memory."""
    (alone,) = run_ranks(1, tmp_path / "one")
    assert alone[-1] == {"on_disk": True}
    both = run_ranks(2, tmp_path / "two")
    for rank in both:
        for shared, expected in zip(rank, alone, strict=True):
            assert shared == pytest.approx(expected, abs=1e-6)


def test_a_task_without_retrieval_reports_means(tmp_path: Path) -> None:
    task = BaseTask(loss_batch_size=8)
    evaluation = task.evaluate(Matcher(), Pictures(), loader_args=ARGS)
    assert set(evaluation.metrics) == {"loss", "loss_itc", "itm_acc"}
    lines = task.summary(evaluation, RunFacts(tmp_path, 75.0, "val", files={"log": tmp_path / "log.jsonl"}))
    assert lines[0] == "held-out split: val" and "wall time  1 min 15 s" in lines
    assert f"log  {tmp_path / 'log.jsonl'}" in lines and any("loss_itc" in line for line in lines)


def test_summary_shows_before_after_and_chance() -> None:
    task = registry.get_task_class("image_text_pretrain")()
    metrics = {"loss": 1.5, "loss_itc": 0.75, "itm_acc": 0.8, "num_images": 500.0, "num_texts": 1000.0}
    for by, value in (("itc/", 0.5), ("rerank/", 0.6), ("rerank_itm/", 0.7), ("chance_", 0.0)):
        metrics |= {f"{by}{way}_r{k}": value + k / 1000 for way in ("tr", "ir") for k in (1, 5, 10)}
    text = "\n".join(task.metric_lines(metrics))
    for expected in (
        "1.500",
        "0.750",
        "0.800",
        "by ITC            0.501  0.505  0.510",
        "re-ranked by ITM  0.601",
        "  as form itm     0.701",
    ):
        assert expected in text, text
    assert "chance            0.001" in text and "500 images, 1000 captions" in text
    assert "unreadable" not in text
    assert "3 unreadable" in "\n".join(task.metric_lines({**metrics, "unreadable_images": 3.0}))


def test_tables_are_aligned() -> None:
    assert table_lines(["a", "value"], [["long name", "1"], ["b", "23"]]) == [
        "a          value",
        "----------------",
        "long name      1",
        "b             23",
    ]
    assert [duration(seconds) for seconds in (3.4, 187, 7384)] == ["3 s", "3 min 7 s", "2 h 3 min"]

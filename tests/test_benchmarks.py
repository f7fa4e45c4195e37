"""The benchmarks in their tiny setting: both sides agree, and a disagreement is not timed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("generate")


@pytest.fixture
def stage2_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("stage2_step")


def test_generation_is_measured_where_tokens_agree(generate: Any, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    generate.main(
        ["--tiny", "--batches", "1", "3", "--rounds", "1", "--new-tokens", "8", "--json", str(result)]
    )
    cases = json.loads(result.read_text())["cases"]
    assert len(cases) == 2 * 2 * 2 and all(case["ratio"] > 0 for case in cases)
    assert max(case["different_texts"] for case in cases) > 1


def test_generation_that_differs_is_not_timed(generate: Any) -> None:
    pair = generate.Pair("opt", generate.TINY, seed=0)
    images = generate.draw_images(2, generate.TINY, torch.Generator().manual_seed(0))
    with torch.no_grad():
        pair.ours.llm_proj.weight.mul_(-1)
    with pytest.raises(SystemExit, match="token ids differ"):
        generate.compare(pair, images, 1, new_tokens=8, rounds=1)


@pytest.mark.parametrize("plain", [["graph", "logits", "text"], []])
def test_stage_2_is_measured_where_losses_agree(stage2_step: Any, tmp_path: Path, plain: list[str]) -> None:
    result = tmp_path / "result.json"
    options = ["--steps", "1", "--batch-size", "3", "--no-memory", "--json", str(result), "--plain", *plain]
    stage2_step.main(["--tiny", *options])
    cases = json.loads(result.read_text())["cases"]
    assert [case["family"] for case in cases] == ["opt", "t5"]
    assert all(case["largest_loss_difference"] < 1e-4 for case in cases)


def test_only_the_graph_of_the_plain_side_reaches_frozen_weights(stage2_step: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    images = stage2_step.draw_images(2, stage2_step.TINY, draw)
    for arrangement, expected in ((["graph"], True), ([], False)):
        plain = stage2_step.Plain("opt", stage2_step.TINY, arrangement)
        texts = stage2_step.draw_texts(2, "opt", stage2_step.TINY, draw)
        stage2_step.train_step(plain, images, texts, "fp32", 0)
        language_model = [p.grad is not None for p in plain.hf.language_model.parameters()]
        vision = [p.grad is not None for p in plain.hf.vision_model.encoder.parameters()]
        assert any(language_model) == any(vision) == expected
        assert plain.hf.query_tokens.grad is not None


def test_ranking_is_measured_where_scores_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    vqa_rank = importlib.import_module("vqa_rank")
    result = tmp_path / "result.json"
    vqa_rank.main(["--tiny", "--images", "2", "--answers", "12", "--rounds", "1", "--json", str(result)])
    cases = json.loads(result.read_text())["cases"]
    assert [case["family"] for case in cases] == ["opt", "t5"]
    assert all(case["ratio"] > 0 and case["largest_relative_difference"] < 1e-5 for case in cases)
    model = vqa_rank.build("opt", vqa_rank.TINY, seed=0)
    plain = vqa_rank.Plain(vqa_rank.build("opt", vqa_rank.TINY, seed=1))
    images = vqa_rank.draw_images(2, vqa_rank.TINY, torch.Generator().manual_seed(0))
    with pytest.raises(SystemExit, match="scores differ"):
        vqa_rank.compare(model, plain, images, ["w1", "w2"], ["w3", "w4 w5"], rounds=1)


def test_shards_are_measured_against_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path))  # which the benchmark sets for itself
    result = tmp_path / "result.json"
    small = ["--count", "6", "--shards", "2", "--workers", "1", "--batch-size", "2", "--rounds", "1"]
    importlib.import_module("shards").main([*small, "--seconds", "0.1", "--json", str(result)])
    measured = json.loads(result.read_text())
    assert len(measured["rates"]) == 5 and min(measured["ms_per_image"].values()) > 0


@pytest.mark.slow
def test_saving_is_measured_for_every_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    saving, result = importlib.import_module("saving"), tmp_path / "result.json"
    saving.main(["--layers", "1", "--rounds", "1", "--folder", str(tmp_path), "--json", str(result)])
    ways = json.loads(result.read_text())["ways"]
    assert list(ways) == ["whole", "sharded", "behind"]
    assert all(0 < way["still_s"] <= way["written_s"] for way in ways.values())
    assert list(tmp_path.iterdir()) == [result]


@pytest.mark.slow
def test_scaling_is_measured_for_every_strategy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result, picture = tmp_path / "result.json", tmp_path / "picture.svg"
    sizes = ["--batch-sizes", "2", "--precisions", "fp32", "--world-sizes", "1", "2", "--steps", "1"]
    where = ["--json", str(result), "--picture", str(picture)]
    importlib.import_module("scaling").main([*sizes, "--strategies", "fsdp2", "--profile", *where])
    cases = json.loads(result.read_text())["cases"]
    assert [case["strategy"] for case in cases] == ["single", "fsdp2"]
    assert all(0 < case["of_ceiling"] < 1.5 and case["images_per_s"] > 0 for case in cases)
    for case in cases:
        assert [0 < share < 1 for _, share in case["largest_items"]] == [True] * 3
    # The other process's pictures and texts are compared with, and drawn as negatives, too.
    assert cases[0]["gflop_a_process"] < cases[1]["gflop_a_process"]
    assert "<svg" in picture.read_text()


def test_attention_is_counted_like_the_products_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    count_flop = importlib.import_module("timing").count_flop
    query, key = (torch.randn(2, 3, length, 16, requires_grad=True) for length in (5, 7))
    value = torch.randn(2, 3, 7, 16, requires_grad=True)

    def written_out() -> torch.Tensor:
        return (query @ key.transpose(-1, -2)).softmax(-1) @ value

    def in_one() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    counts = []
    for attend in (written_out, in_one):
        with count_flop() as counter:
            attend()
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 2 * 3 * 5 * 7 * 16] * 2
    with count_flop() as counter:
        in_one().sum().backward()
    assert counter.get_total_flops() > 3 * counts[0]  # three products' gradients, and the scores made again

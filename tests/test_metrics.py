from __future__ import annotations

import itertools
import math

import pytest
import torch

from lavis_lite.metrics.retrieval import (
    chance_recall,
    ranks,
    relevant_images,
    relevant_texts,
    reranked_ranks,
    retrieval_metrics,
)


def test_ranks_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.3], [0.9, 0.8, 0.1, 0.3], [0.2, 0.5, 0.5, 0.1]])
    relevant = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    # one better; last; tied with one wrong answer
    assert ranks(scores, relevant).tolist() == [2, 4, 2]


def test_a_constant_scorer_ranks_last_and_right_answers_do_not_compete() -> None:
    relevant = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    assert ranks(torch.zeros(2, 5), relevant).tolist() == [4, 3]
    assert ranks(torch.full((2, 5), float("nan")), relevant).tolist() == [4, 3]
    assert ranks(torch.full((2, 5), -math.inf), relevant).tolist() == [4, 3]


def test_a_query_without_right_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one right answer"):
        ranks(torch.zeros(2, 3), torch.tensor([[1, 0, 0], [0, 0, 0]], dtype=torch.bool))


@pytest.mark.parametrize("levels", [3, 1000])
def test_ranks_equal_the_slow_version(levels: int) -> None:
    draw = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (40, 17), generator=draw).float()
    relevant = torch.rand(40, 17, generator=draw) < 0.2
    relevant[:, 3] = True
    for row, right, rank in zip(
        scores.tolist(), relevant.tolist(), ranks(scores, relevant).tolist(), strict=True
    ):
        # Sorted from the best, wrong answers first where scores are equal.
        order = sorted(range(17), key=lambda item: (-row[item], right[item]))
        slow = next(place for place, item in enumerate(order) if right[item])
        assert rank == slow + 1


def test_texts_of_equal_wording_are_right_for_both_images_but_images_are_not_exchanged() -> None:
    texts, image_of_text = ["a", "b", "a", "c"], torch.tensor([0, 0, 1, 2])
    assert relevant_texts(texts, image_of_text, 3).int().tolist() == [
        [1, 1, 1, 0],
        [1, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    assert relevant_images(image_of_text, 3).int().tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_reranking_by_hand() -> None:
    relevant = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    candidates = torch.tensor([[1, 2], [1, 2], [0, 3]])
    scores = torch.tensor([[0.1, 0.7], [0.5, 0.9], [0.4, 0.4]])
    first = torch.tensor([2, 3, 1])
    # moved up; not a candidate, keeps its rank; tied within the candidates
    assert reranked_ranks(first, relevant, candidates, scores).tolist() == [1, 3, 2]


def test_metrics_by_hand() -> None:
    metrics = retrieval_metrics(torch.tensor([1, 5, 6, 11]), torch.tensor([1, 1, 2, 20, 10]))
    assert metrics == pytest.approx(
        {
            "tr_r1": 0.25, "tr_r5": 0.5, "tr_r10": 0.75, "ir_r1": 0.4, "ir_r5": 0.6, "ir_r10": 0.8,
            "r1_mean": 0.325, "tr_mean_rank": 5.75, "ir_mean_rank": 6.8,
        }
    )  # fmt: skip


@pytest.mark.parametrize("at", [1, 2, 5, 10])
def test_chance_is_the_mean_over_all_orders(at: int) -> None:
    relevant = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    hits = total = 0
    for row in relevant.tolist():
        for order in itertools.permutations(row):
            hits += any(order[:at])
            total += 1
    assert chance_recall(relevant, at) == pytest.approx(hits / total)

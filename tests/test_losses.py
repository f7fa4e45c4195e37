"""The losses against slow, obvious versions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lavis_lite.models import losses


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


def test_itc_similarity_is_the_best_query() -> None:
    image_feats, text_feat = torch.randn(3, 4, 5), torch.randn(2, 5)
    similarity = losses.itc_similarity(image_feats, text_feat)
    for i in range(3):
        for j in range(2):
            assert similarity[i, j].item() == pytest.approx(
                max(float(image_feats[i, q] @ text_feat[j]) for q in range(4)), abs=1e-6
            )


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [7, 7, 2, 7], [5, 5, 5, 5]])
def test_itc_loss(ids: list[int]) -> None:
    i2t, t2i, smoothing = torch.randn(4, 4) * 3, torch.randn(4, 4) * 3, 0.1
    same = torch.tensor([[a == b for b in ids] for a in ids])
    expected = 0.0
    for i in range(4):
        twins = sum(ids[j] == ids[i] for j in range(4))
        target = [(1 - smoothing) * (ids[j] == ids[i]) / twins + smoothing / 4 for j in range(4)]
        for logits in (i2t, t2i):
            predicted = log_softmax(logits[i].tolist())
            expected -= sum(t * p for t, p in zip(target, predicted, strict=True)) / 8
    assert losses.itc_loss(i2t, t2i, same, smoothing=smoothing).item() == pytest.approx(expected, abs=1e-5)


def test_itc_without_twins_is_the_usual_smoothed_loss() -> None:
    i2t, t2i = torch.randn(4, 6), torch.randn(4, 6)
    same = torch.eye(4, 6, dtype=torch.bool)
    labels = torch.arange(4)
    usual = [torch.nn.functional.cross_entropy(x, labels, label_smoothing=0.1) for x in (i2t, t2i)]
    torch.testing.assert_close(losses.itc_loss(i2t, t2i, same, smoothing=0.1), sum(usual) / 2)


def test_negatives_are_drawn_from_the_softmax_of_other_pictures() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, 5.0]]).expand(40_000, -1)
    same = torch.tensor([[False, False, False, True]]).expand(40_000, -1)
    columns, valid = losses.sample_negatives(logits, same, generator=torch.Generator().manual_seed(0))
    assert valid.all()
    share = columns.flatten().bincount(minlength=4) / 40_000
    expected = torch.tensor([2.0, 1.0, 0.0]).softmax(0)
    torch.testing.assert_close(share[:3], expected, rtol=0, atol=0.01)
    assert share[3] == 0


def test_several_negatives_are_different_and_short_rows_say_so() -> None:
    same = torch.tensor([[True, False, False, False], [True, True, True, False], [True, True, True, True]])
    # Underflowing probabilities must not lose a candidate.
    logits = torch.tensor([0.0, 900.0, -900.0, 0.0]).expand(3, -1)
    for seed in range(20):
        columns, valid = losses.sample_negatives(
            logits, same, count=3, generator=torch.Generator().manual_seed(seed)
        )
        assert valid.sum(1).tolist() == [3, 1, 0]
        assert sorted(columns[0].tolist()) == [1, 2, 3]
        assert columns[1][valid[1]].tolist() == [3]


def test_more_negatives_than_rows() -> None:
    columns, valid = losses.sample_negatives(torch.zeros(2, 2), torch.eye(2, dtype=torch.bool), count=5)
    assert columns.shape == (2, 2) and valid.sum(1).tolist() == [1, 1]


def test_itm_loss_counts_valid_rows_only() -> None:
    logits = torch.randn(5, 2, requires_grad=True)
    labels, valid = torch.tensor([1, 1, 0, 0, 0]), torch.tensor([True, True, True, False, True])
    loss, accuracy = losses.itm_loss(logits, labels, valid)
    rows = [0, 1, 2, 4]
    expected = -sum(log_softmax(logits[r].tolist())[int(labels[r])] for r in rows) / 4
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert accuracy.item() == sum(int(logits[r].argmax()) == int(labels[r]) for r in rows) / 4
    loss.backward()
    assert logits.grad is not None and logits.grad[3].abs().max() == 0


def test_itm_without_any_valid_row_is_zero() -> None:
    logits = torch.randn(2, 2, requires_grad=True)
    loss, accuracy = losses.itm_loss(logits, torch.tensor([1, 0]), torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and accuracy.item() == 0
    assert logits.grad is not None and logits.grad.abs().max() == 0


def test_itg_loss() -> None:
    logits, targets, smoothing = torch.randn(6, 9), torch.randint(0, 9, (6,)), 0.1
    expected = 0.0
    for n in range(6):
        predicted = log_softmax(logits[n].tolist())
        expected -= (1 - smoothing) * predicted[int(targets[n])] / 6
        expected -= smoothing / 9 * sum(predicted) / 6
    assert losses.itg_loss(logits, targets, smoothing=smoothing).item() == pytest.approx(expected, abs=1e-5)
    half = losses.itg_loss(logits, targets, smoothing=smoothing, total=torch.tensor(12.0))
    assert half.item() == pytest.approx(expected / 2, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_itg_loss_and_its_gradient_are_those_of_cross_entropy(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(9, 50, generator=draw)).to(dtype)
    targets = torch.randint(50, (9,), generator=draw)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = losses.itg_loss(ours, targets, smoothing=0.1)
    expected = F.cross_entropy(plain.float(), targets, label_smoothing=0.1)
    (3 * loss).backward()
    (3 * expected).backward()
    assert torch.allclose(loss, expected, rtol=1e-6) and loss.dtype == torch.float32
    assert ours.grad is not None and plain.grad is not None and ours.grad.dtype == dtype
    assert torch.allclose(ours.grad, plain.grad, atol=1e-6 if dtype == torch.float32 else 1e-3)

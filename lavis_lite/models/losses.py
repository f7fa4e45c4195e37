"""The three losses of representation learning (BLIP-2, section 3.2) as pure functions.

B rows of this rank, G rows of all ranks, Q queries, E projection width, V vocabulary, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def itc_similarity(image_feats: Tensor, text_feat: Tensor) -> Tensor:
    """s[i, j] = max over queries q of <image_feats[i, q], text_feat[j]>: cosines, in [-1, 1].

    Args:
        image_feats: [I, Q, E], normalised. text_feat: [J, E], normalised.

    Returns: float32[I, J], under autocast as well: in bf16, cosines / 0.07 come in steps of 0.06.
    """
    with torch.autocast(image_feats.device.type, enabled=False):
        return (image_feats.float() @ text_feat.float().t()).amax(1)


def itc_targets(same_image: Tensor, smoothing: float) -> Tensor:
    """t[i, j] = (1 - smoothing) same[i, j] / sum_k same[i, k] + smoothing / G.

    Pairs of the same picture share the target equally (section 4.4); a row without any twin gets the usual
    smoothed one-hot.

    Args:
        same_image: bool[B, G], each row with at least its own pair.
    """
    same = same_image.float()
    return (1 - smoothing) * same / same.sum(1, keepdim=True) + smoothing / same.shape[1]


def itc_loss(logits_i2t: Tensor, logits_t2i: Tensor, same_image: Tensor, *, smoothing: float) -> Tensor:
    """Image-text contrast, the mean of both directions' cross-entropy.

    1/2 mean_i [ -sum_j t[i, j] (log softmax_j i2t[i, j] + log softmax_j t2i[i, j]) ],  t = itc_targets

    Args:
        logits_i2t: [B, G], similarity / temperature of this rank's images with all texts.
        logits_t2i: [B, G], of this rank's texts with all images.
        same_image: bool[B, G].
    """
    targets = itc_targets(same_image, smoothing)
    return (F.cross_entropy(logits_i2t.float(), targets) + F.cross_entropy(logits_t2i.float(), targets)) / 2


def sample_negatives(
    logits: Tensor, same_image: Tensor, *, count: int = 1, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`count` different hard negatives for each row, drawn from softmax(logits) over the pairs of other
    pictures.

    One draw for the whole batch by the Gumbel-top-k trick (Kool et al., 2019), which is sampling without
    replacement from that softmax and, unlike a multinomial draw, needs neither a check of its weights nor a
    wait for the device, and doesn't lose a candidate to underflow.

    Args:
        logits: [B, G]. same_image: bool[B, G], True = no negative.

    Returns: columns int64[B, K] and valid bool[B, K], K = min(count, G); an invalid entry means that its row
    has fewer than K pairs of other pictures, and its column is to be ignored.
    """
    logits = logits.detach().float()
    gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
    scores = (logits + gumbel).masked_fill(same_image, float("-inf"))
    best = scores.topk(min(count, scores.shape[1]), dim=1)
    return best.indices, best.values > float("-inf")


def itm_loss(
    logits: Tensor, labels: Tensor, valid: Tensor, *, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Image-text matching: -sum_r valid[r] log softmax(logits[r])[labels[r]] / total, and the share of right
    answers.

    Args:
        logits: [R, 2], averaged over the queries. labels: int64[R], 1 = match. valid: bool[R].
        total: what to divide the loss by; by default the number of valid rows. Without any valid row both are
            0.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    count = valid.sum()
    right = ((logits.argmax(1) == labels) & valid).sum()
    total = count.float() if total is None else total
    # A row that doesn't count may hold anything; `where` also keeps its gradient out.
    loss = torch.where(valid, losses, 0.0).sum() / torch.where(total > 0, total, 1.0)
    return loss, right / count.clamp(min=1)


def itg_loss(logits: Tensor, targets: Tensor, *, smoothing: float, total: Tensor | None = None) -> Tensor:
    """Image-grounded text generation: cross-entropy of the next token, smoothed over the vocabulary.

    -sum_n [(1 - smoothing) log p[n, y_n] + smoothing / V sum_v log p[n, v]] / total

    Args:
        logits: [N, V] at the positions that have a next token. targets: int64[N].
        total: what to divide by; by default N.
    """
    summed: Tensor = _SmoothedCrossEntropy.apply(logits, targets, smoothing)
    return summed / (targets.numel() if total is None else total)


class _SmoothedCrossEntropy(torch.autograd.Function):
    """The sum over rows of cross-entropy with label smoothing, in float32.

    -(1 - s) log p[y] - s / V sum_v log p[v]  =  lse - (1 - s) x[y] - s / V sum_v x[v],  lse = log sum_v exp x[v]

    with the gradient p - (1 - s) [v = y] - s / V. `F.cross_entropy` gets there by four more matrices of logits'
    size, which at 30,523 words took 5% of a step (benchmarks/stage1_step.py, bf16).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        exact = logits.float()
        log_sum = exact.logsumexp(1)
        ctx.save_for_backward(logits, targets, log_sum)
        ctx.smoothing = smoothing
        right = exact.gather(1, targets[:, None]).sum()
        return log_sum.sum() - (1 - smoothing) * right - smoothing / exact.shape[1] * exact.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, log_sum = ctx.saved_tensors
        slope = (logits - log_sum[:, None]).exp_()  # float32, as log_sum is
        slope -= ctx.smoothing / slope.shape[1]
        rows = torch.arange(len(slope), device=slope.device)
        slope[rows, targets] -= 1 - ctx.smoothing
        return slope.mul_(grad).to(logits.dtype), None, None

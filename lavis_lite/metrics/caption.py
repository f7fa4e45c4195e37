"""Corpus scores of captions against references as COCO's evaluation reports them: BLEU, ROUGE-L, CIDEr.

All three are between 0 and 1 but CIDEr, which is at most 10: papers print 100 times these numbers, so a CIDEr
of 1.458 here is their 145.8.

A caption is a sequence of words (`lavis_lite.metrics.ptb.words`); an image has one prediction and one or more
references.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

Words = Sequence[str]
NGrams = Counter[tuple[str, ...]]

MAX_N = 4
# How much ROUGE-L prefers recall.
BETA = 1.2
# Width, in words, of CIDEr's penalty on a difference of length.
SIGMA = 6.0
# A corpus with no match has a small BLEU, not zero: the original's guards against division and powers of
# zero.
TINY, SMALL = 1e-15, 1e-9


def ngrams(words: Words, n: int) -> NGrams:
    """How often each n-gram occurs."""
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def bleu(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the corpus (Papineni et al., ACL 2002).

    Matches are counted over all images before anything is divided, clipped to the most often any one
    reference has an n-gram. The brevity penalty sums the reference lengths nearest to each prediction's, the
    shorter of two that are equally near. All 0 for a corpus without a predicted word.
    """
    matched, guessed = [0] * MAX_N, [0] * MAX_N
    predicted_length = reference_length = 0
    for prediction, own in zip(predictions, references, strict=True):
        predicted_length += len(prediction)
        reference_length += min((abs(len(text) - len(prediction)), len(text)) for text in own)[1]
        for n in range(1, MAX_N + 1):
            most: NGrams = Counter()
            for text in own:
                most |= ngrams(text, n)
            found = ngrams(prediction, n)
            guessed[n - 1] += found.total()
            matched[n - 1] += (found & most).total()
    if not predicted_length:
        return [0.0] * MAX_N
    penalty = math.exp(min(0.0, 1 - reference_length / predicted_length))
    logs = [math.log((m + TINY) / (g + SMALL)) for m, g in zip(matched, guessed, strict=True)]
    return [penalty * math.exp(sum(logs[:n]) / n) for n in range(1, MAX_N + 1)]


def rouge_l(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Mean over images of ROUGE-L (Lin, 2004), precision and recall each from the best reference for it."""
    scores = [_rouge_l(words, own) for words, own in zip(predictions, references, strict=True)]
    return sum(scores) / len(scores) if scores else 0.0


def _rouge_l(prediction: Words, references: Sequence[Words]) -> float:
    common = [(common_subsequence(prediction, text), len(text)) for text in references]
    if not any(length for length, _ in common):
        return 0.0
    precision = max(length for length, _ in common) / len(prediction)
    recall = max(length / total for length, total in common if total)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_subsequence(first: Words, second: Words) -> int:
    """The length of the longest sequence of words that both have in this order, gaps allowed."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for at, other in enumerate(second, 1):
            diagonal, row[at] = row[at], diagonal + 1 if word == other else max(row[at], row[at - 1])
    return row[-1]


def cider(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Each image's CIDEr-D (Vedantam et al., CVPR 2015); the corpus' score is their mean.

    10 times the mean, over n = 1 to 4 and the references, of the clipped cosine of n-gram counts, each
    weighted by log(images / images with that n-gram in a reference) and by a Gaussian of the difference in
    length.

    With a single image every weight is log(1): the score is 0 whatever was predicted. The weights, and so an
    image's score, depend on which images are scored together.
    """
    seen = Counter(gram for own in references for gram in {g for text in own for g in _all_ngrams(text)})
    log_images = math.log(max(1, len(references)))

    def weighted(words: Words) -> list[dict[tuple[str, ...], float]]:
        return [
            {gram: count * (log_images - math.log(max(1, seen[gram]))) for gram, count in grams.items()}
            for grams in (ngrams(words, n) for n in range(1, MAX_N + 1))
        ]

    return [
        _cider(weighted(words), len(words), [(weighted(text), len(text)) for text in own])
        for words, own in zip(predictions, references, strict=True)
    ]


def _all_ngrams(words: Words) -> Iterator[tuple[str, ...]]:
    for n in range(1, MAX_N + 1):
        yield from ngrams(words, n)


Weights = list[dict[tuple[str, ...], float]]


def _cider(prediction: Weights, length: int, references: Sequence[tuple[Weights, int]]) -> float:
    total = 0.0
    for weights, reference_length in references:
        # The original takes the number of bigrams for the length: it differs where there is no word at all.
        delta = max(length - 1, 0) - max(reference_length - 1, 0)
        nearness = math.exp(-(delta**2) / (2 * SIGMA**2))
        total += nearness * sum(_clipped_cosine(*pair) for pair in zip(prediction, weights, strict=True))
    return 10 * total / (MAX_N * len(references))


def _clipped_cosine(
    prediction: Mapping[tuple[str, ...], float], reference: Mapping[tuple[str, ...], float]
) -> float:
    """A repeated n-gram counts no more often than the reference has it."""
    shared = prediction.keys() & reference.keys()
    dot = sum(min(prediction[gram], reference[gram]) * reference[gram] for gram in shared)
    norms = _norm(prediction) * _norm(reference)
    return dot / norms if norms else 0.0


def _norm(weights: Mapping[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(weight * weight for weight in weights.values()))

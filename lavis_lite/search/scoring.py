"""The score of an image for a query, and the exact search by it.

An image has Q vectors, one a query token of the Q-Former; a text has one, a picture that is searched with has Q.
With v over the query's vectors and q over the image's,

    s(query, image) = mean over v of max over q of <query[v], image[q]>

which for a text is ITC's similarity (paper, section 3.2), and for a picture asks each of its vectors as if it
were a text.

Legend: N images, Q vectors each, E their width, M queries of V vectors each.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Cosines held at a time, 256 MiB.
COSINES = 1 << 26


def score(queries: Tensor, images: Tensor) -> Tensor:
    """float32[M, N] of queries float32[M, V, E] and images float32[N, Q, E], all vectors normalised."""
    count, vectors, width = queries.shape
    cosines = images.reshape(-1, width) @ queries.reshape(-1, width).T
    return cosines.view(*images.shape[:2], count, vectors).amax(1).mean(2).T


def search_exactly(
    queries: Tensor, blocks: Iterable[tuple[int, Tensor]], alive: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """The `top` best images (all, where there are fewer) of each query: scores float32[M, K], rows int64[M, K].

    Args:
        queries: float32[M, V, E].
        blocks: (row of the first image, float32[n, Q, E]) over all images.
        alive: bool[N]; images that are not are never found.
    """
    best = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long)
    for start, images in blocks:
        here = torch.arange(start, start + len(images))
        kept = alive[here]
        if not kept.all():
            images, here = images[kept], here[kept]
        few = max(1, COSINES // max(1, images.shape[0] * images.shape[1] * queries.shape[1]))
        scores = torch.cat([score(some, images) for some in queries.split(few)])
        scores, place = scores.topk(min(top, scores.shape[1]), dim=1)
        best = torch.cat([best, scores], 1)
        rows = torch.cat([rows, here[place]], 1)
        best, place = best.topk(min(top, best.shape[1]), dim=1)
        rows = rows.gather(1, place)
    return best, rows

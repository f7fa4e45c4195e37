"""The approximate index below search over many images: faiss finds candidates, their stored vectors decide.

Cells (IVF) keep each search within a part of the vectors, product quantisation (PQ, Jégou et al., 2011) keeps these
small in memory: half a byte for two numbers. How many cells are looked into and how many vectors are fetched isn't
guessed: `tune` measures the recall against exact search and takes more until it is enough.

Legend: N images, Q vectors each, E their width, M queries of V vectors each.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_lite.common.errors import ConfigError, MissingDependencyError
from lavis_lite.common.logging import get_logger
from lavis_lite.search.manifest import Candidates
from lavis_lite.search.scoring import score, search_exactly
from lavis_lite.search.store import Store

logger = get_logger(__name__)

# Up to so many vectors everything is compared with everything.
EXACT_VECTORS = 1_000_000
# Above so many cells, which is above 2^25 vectors, the nearest ones are found through a graph (HNSW) instead of by
# comparing with all.
GRAPH_CELLS = 16_384
POINTS_PER_CELL = 64
# An index with fewer cells is trained as if it had so many; one without cells, by the second number.
LEAST_CELLS, WITHOUT_CELLS = 16, 1024
# Recall is measured, and candidates are fetched, for at least so many images.
MEASURED_TOP = 100
MEASURED_QUERIES = 100
# Each has Q vectors, so fewer of them.
MEASURED_PICTURES = 20
# What its messages begin with: "Error in FUNCTION at FILE:LINE: Error: 'CONDITION' failed: ", the last part sometimes.
FAISS_SOURCE = re.compile(r"^Error in .*? at \S+:\d+: (Error: '.*?' failed: )?")
FIRST_NPROBE, FIRST_OVERSAMPLE, LARGEST_OVERSAMPLE = 16, 4, 512


def choose_factory(kind: str, vectors: int, width: int) -> str | None:
    """faiss's description of the index for so many vectors; None for exact search.

    kind: auto, flat, ivfpq, hnsw, or such a description itself, e.g. "IVF65536_HNSW32,PQ128x4fs".
    """
    if kind == "flat" or (kind == "auto" and vectors <= EXACT_VECTORS):
        return None
    if kind == "hnsw":
        # Not over product codes: HNSW32_PQ8 took 17 s to train on 3,000 vectors of 16 numbers (faiss 1.15.1).
        return "HNSW32_SQ8"
    if kind not in ("auto", "ivfpq"):
        return kind
    cells = 2 ** max(4, round(math.log2(4 * math.sqrt(vectors))))
    graph = "_HNSW32" if cells > GRAPH_CELLS else ""
    codes = width // 2 if width % 2 == 0 else width
    return f"IVF{cells}{graph},PQ{codes}x4fs"


def check_kind(kind: str, vectors: int, width: int) -> None:
    """Raises early what training the index for so many vectors (at most) would raise after hours of encoding.

    ConfigError for a description of which faiss can't make anything, or that needs more vectors to train on;
    MissingDependencyError without faiss.
    """
    least = least_vectors(kind, vectors, width)
    if vectors < least:
        factory = choose_factory(kind, vectors, width)
        raise ConfigError(
            f"--kind '{factory}': it is trained on at least {least} vectors, and there are {vectors}; "
            "--kind flat needs no training"
        )


def least_vectors(kind: str, vectors: int, width: int) -> int:
    """How many vectors training the index for so many needs at the least, 0 for exact search.

    Raises ConfigError for a description of which faiss can't make anything, MissingDependencyError without faiss.
    """
    factory = choose_factory(kind, vectors, width)
    return _least_vectors(_untrained(factory, width)) if factory is not None else 0


@dataclass
class Setting:
    """How an index is asked: cells looked into, and vectors fetched for each image wanted."""

    nprobe: int = FIRST_NPROBE
    oversample: int = FIRST_OVERSAMPLE


class CandidateIndex:
    """A faiss index over the vectors of a store; vector number row * Q + q."""

    def __init__(self, index: Any, factory: str, setting: Setting, *, trained_on: int) -> None:
        self.index, self.factory, self.setting, self.trained_on = index, factory, setting, trained_on

    @classmethod
    def train(cls, store: Store, factory: str, *, seed: int = 0) -> CandidateIndex:
        """Train on a sample of the store's vectors and add all of them.

        Raises ConfigError when faiss can't make anything of the description, or there are too few vectors.
        """
        index = _untrained(factory, store.manifest.width)
        cells = _cells_of(index)
        if cells is not None:
            cells.cp.niter, cells.cp.seed = 10, seed + 1
            cells.cp.min_points_per_centroid, cells.cp.max_points_per_centroid = 1, POINTS_PER_CELL
        floor = LEAST_CELLS if cells is not None else WITHOUT_CELLS
        sample = _sample(store, POINTS_PER_CELL * max(floor, _least_vectors(index)), seed)
        with _one_line(factory):
            index.train(sample)
        found = cls(index, factory, Setting(), trained_on=len(store))
        found.add(store)
        return found

    @classmethod
    def of_entry(cls, root: Path, entry: Candidates) -> CandidateIndex:
        """The one that a manifest names."""
        index = import_faiss().read_index(str(root / entry.file.path))
        setting = Setting(entry.nprobe, entry.oversample)
        return cls(index, entry.factory, setting, trained_on=entry.trained_on)

    def save(self, path: Path) -> None:
        """Write it to a file."""
        import_faiss().write_index(self.index, str(path))

    def add(self, store: Store) -> None:
        """Add the images of the store that it doesn't hold yet: those at its end."""
        for _, images in store.blocks(self.index.ntotal // store.manifest.queries):
            self.index.add(images.flatten(0, 1).numpy())

    def search(self, store: Store, queries: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """As `search_exactly`, over the candidates; where fewer than `top` were found, score -inf and row -1."""
        best = torch.full((len(queries), top), -torch.inf)
        rows = torch.full((len(queries), top), -1)
        for number, query in enumerate(queries):
            candidates = self._candidates(store, query, top)
            scores = score(query[None], store.gather(candidates))[0]
            scores, place = scores.topk(min(top, len(scores)))
            best[number, : len(place)], rows[number, : len(place)] = scores, candidates[place]
        return best, rows

    def _candidates(self, store: Store, query: Tensor, top: int) -> Tensor:
        """Rows of living images that have a vector near one of the query's [V, E]."""
        vectors, living = query.contiguous().numpy(), int(store.alive.sum())
        if living == 0:
            return torch.empty(0, dtype=torch.long)
        wanted = min(self.setting.oversample * max(top, MEASURED_TOP), living * store.manifest.queries)
        fetched, nprobe = wanted, min(self.setting.nprobe, self.most_cells)
        while True:
            near = self._nearest(vectors, fetched, nprobe)
            rows = torch.from_numpy(near[near >= 0] // store.manifest.queries)
            alive = store.alive[rows]
            found = rows[alive].unique()
            full, short = len(rows) == near.size, len(found) < min(top, living)
            # Deleted images take places of living ones, vectors may be of few images, and cells may hold too few.
            few = short or int(alive.sum()) < wanted * len(vectors)
            if full and few and fetched < self.index.ntotal:
                fetched = min(2 * fetched, self.index.ntotal)
            elif not full and short and nprobe < self.most_cells:
                nprobe = min(2 * nprobe, self.most_cells)
            else:
                return found

    def _nearest(self, vectors: np.ndarray[Any, Any], fetched: int, nprobe: int) -> np.ndarray[Any, Any]:
        """Vector numbers int64[V, fetched], -1 where the cells looked into hold fewer."""
        cells = _cells_of(self.index)
        if cells is not None:
            cells.nprobe = nprobe
        elif hasattr(self.index, "hnsw"):
            self.index.hnsw.efSearch = fetched
        found: np.ndarray[Any, Any] = self.index.search(vectors, fetched)[1]
        return found

    @property
    def most_cells(self) -> int:
        """More than this is never looked into."""
        cells = _cells_of(self.index)
        return int(cells.nlist) if cells is not None else 1


def tune(index: CandidateIndex, store: Store, queries: Tensor, *, target: float) -> float:
    """Set how `index` is asked so that it finds the share `target` of the exact first 100 images; the recall.

    Of looking into twice as many cells and fetching twice as many vectors, each step does what finds more.

    Args:
        queries: float32[M, 1, E], texts or what is like them.
    """
    _, exact = search_exactly(queries, store.blocks(), store.alive, MEASURED_TOP)
    recall = _recall(index, store, queries, exact)
    while recall < target:
        now, tried = index.setting, []
        wider = Setting(min(2 * now.nprobe, index.most_cells), now.oversample)
        for setting in (wider, Setting(now.nprobe, min(2 * now.oversample, LARGEST_OVERSAMPLE))):
            if setting != now:
                index.setting = setting
                tried.append((_recall(index, store, queries, exact), setting))
        if not tried:
            index.setting = now
            break
        recall, index.setting = max(tried, key=lambda pair: pair[0])
    return recall


def measure_recall(index: CandidateIndex, store: Store, queries: Tensor) -> float:
    """The share of the exact first 100 images of queries float32[M, V, E] that `index` finds as it is set."""
    _, exact = search_exactly(queries, store.blocks(), store.alive, MEASURED_TOP)
    return _recall(index, store, queries, exact)


def _recall(index: CandidateIndex, store: Store, queries: Tensor, exact: Tensor) -> float:
    _, rows = index.search(store, queries, exact.shape[1])
    right = sum(
        len(np.intersect1d(found, first)) for found, first in zip(rows.numpy(), exact.numpy(), strict=True)
    )
    return right / max(1, exact.numel())


def draw_queries(store: Store, count: int = MEASURED_QUERIES, *, seed: int = 0) -> Tensor:
    """Queries float32[M, 1, E] for measuring: stored vectors moved off their place to a cosine of about 0.5.

    Searching for what is stored would be too easy: the vector of a text lies away from those of the images.
    """
    draw = torch.Generator().manual_seed(seed)
    living = store.alive.nonzero()[:, 0]
    rows = living[torch.randint(len(living), (count,), generator=draw)]
    which = torch.randint(store.manifest.queries, (count,), generator=draw)
    vectors = store.gather(rows)[torch.arange(count), which]
    noise = torch.nn.functional.normalize(torch.randn(vectors.shape, generator=draw), dim=-1)
    return torch.nn.functional.normalize(vectors + math.sqrt(3) * noise, dim=-1)[:, None]


def draw_pictures(store: Store, count: int = MEASURED_PICTURES, *, seed: int = 0) -> Tensor:
    """Queries float32[M, Q, E] for measuring: pictures of the store, all of them where there are fewer.

    They aren't moved as those for texts are: a picture that isn't stored lies among the stored ones as these do among
    each other. That each finds itself is one of the 100.
    """
    draw = torch.Generator().manual_seed(seed)
    living = store.alive.nonzero()[:, 0]
    return store.gather(living[torch.randperm(len(living), generator=draw)[:count]])


def import_faiss() -> Any:
    """The package faiss; MissingDependencyError says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "an approximate index needs the package faiss-cpu: pip install 'lavis-lite[index]' (--kind flat doesn't)"
        ) from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _cells_of(index: Any) -> Any | None:
    """The IVF part of an index, None without one."""
    faiss = import_faiss()
    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:
        return None


def _untrained(factory: str, width: int) -> Any:
    """An empty index by faiss's description of it."""
    faiss = import_faiss()
    with _one_line(factory):
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    # It could be trained, but not added to without numbers of its own.
    numbers = next((layer for layer in _layers(index) if isinstance(layer, faiss.IndexIDMap)), None)
    if numbers is not None:
        name = type(numbers).__name__.removeprefix("Index")
        raise ConfigError(f"--kind '{factory}': an index numbers its vectors itself; leave {name} out")
    return index


def _least_vectors(index: Any) -> int:
    """So many vectors can be trained on at the least: as many as there are cells, or codes in the largest codebook."""
    cells = _cells_of(index)
    return max([int(cells.nlist) if cells is not None else 0, *map(_codes_of, _layers(index))])


def _layers(index: Any) -> Iterator[Any]:
    """An index and those it wraps: behind a rotation (OPQ, PCA) or numbers (IDMap), below refining, a graph."""
    while index is not None:
        index = import_faiss().downcast_index(index)
        yield index
        names = ("base_index", "index", "storage")
        index = next((below for name in names if (below := getattr(index, name, None)) is not None), None)


def _codes_of(layer: Any) -> int:
    """Codes in the largest codebook of one layer, 0 without codebooks."""
    if hasattr(layer, "pq"):
        return int(layer.pq.ksub)
    # Residual codebooks are found by clustering as product codes are; local search needs no least number.
    if hasattr(layer, "rq"):
        return 2 ** int(import_faiss().vector_to_array(layer.rq.nbits).max())
    return 0


@contextlib.contextmanager
def _one_line(factory: str) -> Iterator[None]:
    """faiss's complaint about a description, without the places in its source that it names."""
    try:
        yield
    except RuntimeError as error:
        reason = FAISS_SOURCE.sub("", " ".join(str(error).split()))
        raise ConfigError(f"--kind '{factory}': faiss can't build this index: {reason}") from error


def _sample(store: Store, count: int, seed: int) -> np.ndarray[Any, Any]:
    """About `count` vectors of images drawn without replacement, float32[n, E]."""
    images = min(len(store), math.ceil(count / store.manifest.queries))
    rows = torch.randperm(len(store), generator=torch.Generator().manual_seed(seed))[:images].sort().values
    sample: np.ndarray[Any, Any] = store.gather(rows).flatten(0, 1).numpy()
    return sample

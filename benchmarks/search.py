"""Search over many vectors: faiss's candidates ranked by their stored vectors, against comparing with all of them.

    python benchmarks/search.py [--images 1000000] [--queries 1] [--width 64] [--data clustered random] [--json FILE]

Both sides give the 100 images whose best vector is nearest to a query, one query at a time. The plain side is one
product with the matrix of all vectors in float32, the maximum over each image's, and the 100 largest. The index is
tuned at build on queries of its own; recall is measured on others. Rounds alternate in one process; a ratio is the
median over rounds of plain time / our time, above 1 where ours is faster.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import show, surroundings, time_alternately
from torch import Tensor
from torch.nn.functional import normalize

from lavis_lite.search.candidates import CandidateIndex, choose_factory, draw_queries, tune
from lavis_lite.search.journal import write_part
from lavis_lite.search.manifest import Manifest
from lavis_lite.search.store import Store

TOP = 100
BLOCK = 50_000
VECTORS_PER_CLUSTER = 100


def draw_vectors(data: str, images: int, queries: int, width: int, seed: int) -> list[Tensor]:
    """Blocks float32[n, Q, E] of normalised vectors: all directions alike, or around centres at a cosine near 0.9."""
    draw = torch.Generator().manual_seed(seed)
    centres = normalize(
        torch.randn(max(1, images * queries // VECTORS_PER_CLUSTER), width, generator=draw), dim=-1
    )
    blocks = []
    for start in range(0, images, BLOCK):
        shape = (min(BLOCK, images - start), queries, width)
        vectors = normalize(torch.randn(shape, generator=draw), dim=-1)
        if data == "clustered":
            own = torch.randint(len(centres), shape[:2], generator=draw)
            vectors = normalize(centres[own] + 0.5 * vectors, dim=-1)
        blocks.append(vectors)
    return blocks


def write_store(root: Path, blocks: Sequence[Tensor]) -> Store:
    """Vectors as an index stores them, in fp16."""

    def write(target: Path) -> None:
        with target.open("wb") as file:
            for block in blocks:
                file.write(block.numpy().astype(np.float16).tobytes())

    images, (queries, width) = sum(map(len, blocks)), blocks[0].shape[1:]
    part = write_part(root, [str(number) for number in range(images)], write)
    return Store(root, Manifest({}, queries, width, "fp16", parts=(part,)))


def measure(data: str, args: argparse.Namespace) -> dict[str, Any]:
    """One kind of vectors: build, tune, compare."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = write_store(
            Path(folder), draw_vectors(data, args.images, args.queries, args.width, args.seed)
        )
        vectors = args.images * args.queries
        factory = choose_factory(args.kind, vectors, args.width)
        if factory is None:
            raise SystemExit("exact search is the plain side itself: choose another --kind")
        start = time.perf_counter()
        index = CandidateIndex.train(store, factory)
        built = time.perf_counter()
        tuned = tune(index, store, draw_queries(store, seed=args.seed + 1), target=args.recall)
        done = time.perf_counter()
        index.save(Path(folder) / "index.faiss")
        # As it is stored, so that both sides rank the same numbers.
        matrix = torch.cat([images.flatten(0, 1) for _, images in store.blocks()])
        store.forget_blocks()
        asked = draw_queries(store, args.asked, seed=args.seed + 2)

        def plain() -> list[Tensor]:
            best = ((matrix @ query[0]).view(args.images, args.queries).amax(1).topk(TOP) for query in asked)
            return [found.indices for found in best]

        def ours() -> list[Tensor]:
            return [index.search(store, query[None], TOP)[1][0] for query in asked]

        pairs = zip(plain(), ours(), strict=True)
        recall = [len(np.intersect1d(exact.numpy(), found.numpy())) / TOP for exact, found in pairs]
        timed = time_alternately({"plain": plain, "ours": ours}, args.rounds)
        return {
            "data": data,
            "factory": factory,
            "nprobe": index.setting.nprobe,
            "oversample": index.setting.oversample,
            "recall_tuned": tuned,
            "recall": float(np.mean(recall)),
            "recall_worst_query": min(recall),
            "build_seconds": built - start,
            "tune_seconds": done - built,
            "index_bytes_per_vector": (Path(folder) / "index.faiss").stat().st_size / vectors,
            "plain_bytes_per_vector": 4 * args.width,
            "ms_per_query": {side: 1e3 * seconds / args.asked for side, seconds in timed["seconds"].items()},
            **timed,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table and the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1, help="vectors of an image")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--data", nargs="+", choices=("clustered", "random"), default=["clustered", "random"])
    parser.add_argument("--kind", default="ivfpq", help="as of lavis-lite index build")
    parser.add_argument("--recall", type=float, default=0.99, help="what is tuned for")
    parser.add_argument("--asked", type=int, default=30, help="queries in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="for the index, by default the system's for temporary files"
    )
    parser.add_argument("--json", type=Path, help="write the result there, too")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {
        **{key: getattr(args, key) for key in ("images", "queries", "width", "asked", "rounds", "seed")},
        **surroundings(),
        "cases": [],
    }
    print(
        f"{'data':10}{'recall@100':>11}{'plain ms':>10}{'ours ms':>9}{'ratio':>8}  (rounds)  bytes a vector"
    )
    for data in args.data:
        case = measure(data, args)
        result["cases"].append(case)
        (low, high), each = case["ratio_range"], case["ms_per_query"]
        print(
            f"{data:10}{case['recall']:11.4f}{each['plain']:10.2f}{each['ours']:9.2f}{case['ratio']:7.1f}x  "
            f"({low:.1f} to {high:.1f})  {case['plain_bytes_per_vector']} / {case['index_bytes_per_vector']:.0f}",
            flush=True,
        )
    show(result, args.json)


if __name__ == "__main__":
    main()

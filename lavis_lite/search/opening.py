"""Opening an index: its files are checked before they are believed, and its model before it is asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from lavis_lite.common.errors import DataError
from lavis_lite.search.candidates import CandidateIndex
from lavis_lite.search.encoding import Encoder
from lavis_lite.search.manifest import VECTORS, Manifest, load_manifest
from lavis_lite.search.scoring import search_exactly
from lavis_lite.search.store import Store

# A writer may replace an index between our reading its manifest and opening or checking the files that this names.
ATTEMPTS = 3

T = TypeVar("T")


class ImageIndex:
    """An index opened for search by vectors; `store` has the names.

    Files are checked by their SHA-256, the stored vectors (they may be many) only where search is exact and reads all
    of them anyway; `check_index` reads everything.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        for file in manifest.files():
            file.check(root, content=manifest.candidates is None or not file.path.endswith(VECTORS))
        self.root, self.manifest = root, manifest
        self.store = Store(root, manifest)
        self.candidates: CandidateIndex | None = None
        if manifest.candidates:
            self.candidates = CandidateIndex.of_entry(root, manifest.candidates)

    def __len__(self) -> int:
        return self.manifest.images - self.manifest.num_deleted

    def search(self, queries: Tensor, top: int = 10, *, exact: bool = False) -> tuple[Tensor, Tensor]:
        """The best images of each query by `scoring.score`.

        Args:
            queries: float32[M, V, E], normalised: V = 1 for a text, Q for a picture.
            exact: compare with every image also where there is an approximate index.

        Returns: scores float32[M, K] and rows int64[M, K], best first, K = min(top, images).
        """
        top = min(top, len(self))
        if self.candidates is None or exact:
            return search_exactly(queries, self.store.blocks(), self.store.alive, top)
        return self.candidates.search(self.store, queries, top)


def open_index(path: str | os.PathLike[str]) -> ImageIndex:
    """Open an index for search; raises DataError when there is none or one of its files is corrupt."""
    root = Path(path)
    return _as_it_is(root, lambda manifest: ImageIndex(root, manifest))


def check_index(path: str | os.PathLike[str]) -> Manifest:
    """Compare every file with its checksum; the manifest. Raises DataError naming the first that differs."""
    root = Path(path)

    def check(manifest: Manifest) -> Manifest:
        for file in manifest.files():
            file.check(root, content=True)
        return manifest

    return _as_it_is(root, check)


def _as_it_is(root: Path, read: Callable[[Manifest], T]) -> T:
    """What `read` makes of the index; again where its files are gone because another process has replaced it."""
    for _ in range(ATTEMPTS):
        manifest = load_manifest(root)
        try:
            return read(manifest)
        except (DataError, FileNotFoundError):
            if load_manifest(root) == manifest:
                raise
    raise DataError(
        f"'{root}' was replaced {ATTEMPTS} times while it was read; try again when no process changes it"
    )


def check_same_model(root: Path, manifest: Manifest, encoder: Encoder) -> None:
    """Raises DataError when an index was built by another model: their vectors have nothing to do with each other."""
    own, other = manifest.model, encoder.identity
    if own["fingerprint"] != other["fingerprint"]:
        raise DataError(
            f"'{root}' was built by {_describe(own)}, and this is {_describe(other)}: name that model with --model and "
            "--checkpoint, or build the index again"
        )


def _describe(identity: dict[str, str | None]) -> str:
    weights = f" with '{identity['checkpoint']}'" if identity["checkpoint"] else ""
    return f"{identity['model']}{weights} (weights {str(identity['fingerprint'])[:8]})"

"""What changes an index: building, adding, deleting, compacting; each ends by replacing index.json."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lavis_lite.common import locks
from lavis_lite.common.errors import ConfigError, DataError, InputError
from lavis_lite.common.io import atomic_file, remove_leftovers
from lavis_lite.common.logging import get_logger
from lavis_lite.search import candidates
from lavis_lite.search.candidates import CandidateIndex
from lavis_lite.search.encode import encode_pictures
from lavis_lite.search.encoding import Encoder
from lavis_lite.search.journal import Journal, write_part
from lavis_lite.search.manifest import (
    BUILDING,
    MANIFEST,
    PARTS,
    Candidates,
    FileSum,
    Manifest,
    fresh_name,
    load_manifest,
)
from lavis_lite.search.naming import find_rows
from lavis_lite.search.opening import check_same_model
from lavis_lite.search.sources import list_pictures, short_name
from lavis_lite.search.store import DTYPES, Store

logger = get_logger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """How an index is made.

    kind: auto (by the number of vectors), flat, ivfpq, hnsw or a faiss factory string. dtype: fp16 or fp32, of the
    stored vectors. target: recall of the exact first 100 that an approximate index is tuned to. texts: for measuring
    it; without, stored vectors are moved. batch_size, num_workers: of reading and encoding pictures. What is added to
    an index has its kind, dtype and target.

    Raises ConfigError, by the options of `lavis-lite index`.
    """

    kind: str = "auto"
    dtype: str = "fp16"
    target: float = 0.99
    texts: tuple[str, ...] = ()
    batch_size: int = 32
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if not 0 < self.target <= 1:
            raise ConfigError(f"--recall must be above 0 and at most 1, got {self.target}")
        for option, value, least in (
            ("--batch-size", self.batch_size, 1),
            ("--num-workers", self.num_workers, 0),
        ):
            if value < least:
                raise ConfigError(f"{option} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Summary:
    """What a change did: images in the index now, added or deleted ones, unreadable ones, speed, and the recall.

    recall: of searching with texts, measured against exact search; picture_recall: with pictures. None where search
    is exact.
    """

    images: int
    changed: int
    unreadable: int = 0
    images_per_second: float = 0.0
    recall: float | None = None
    picture_recall: float | None = None

    @classmethod
    def of(cls, manifest: Manifest, changed: int, *, unreadable: int = 0, speed: float = 0.0) -> Summary:
        """Of the index that a change has left."""
        found = manifest.candidates
        recalls = (found.recall, found.picture_recall) if found else (None, None)
        return cls(manifest.images - manifest.num_deleted, changed, unreadable, speed, *recalls)


def build_index(
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    encoder: Encoder,
    options: BuildOptions | None = None,
    *,
    replace_old: bool = False,
) -> Summary:
    """Encode pictures and make an index of them; interrupted, the same call goes on where it was.

    Args:
        images: a folder, a tar file, or a pattern of tar files, see `list_pictures`.
        out: the index's folder.
        replace_old: when there is an index already: it is searchable until the new one takes its place.

    Raises DataError when there is an index already, no picture can be read, or an unfinished build was begun with
    another model; before anything is encoded, what `candidates.check_kind` raises.
    """
    root, options = Path(out), options or BuildOptions()
    names = list(list_pictures(images))
    queries, width = _shape_of(encoder)
    candidates.check_kind(options.kind, len(names) * queries, width)
    _make_folder(root)
    with locked(root):
        old = load_manifest(root) if (root / MANIFEST).exists() else None
        if old and not replace_old:
            _forget_if_done(root, old)
            raise DataError(
                f"there is an index at '{root}' already: `index add` adds to it, --replace replaces it"
            )
        manifest = Manifest(encoder.identity, queries, width, options.dtype, options.kind, options.target)
        return _extend(
            root, manifest, names, encoder, options, old=old, what="build", source=_absolute(images)
        )


def add_images(
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    encoder: Encoder,
    options: BuildOptions | None = None,
) -> Summary:
    """Add the pictures that aren't in the index yet, by its own kind, dtype and target. Else as `build_index`."""
    root = Path(out)
    with changing(root) as manifest:
        check_same_model(root, manifest, encoder)
        held = {name for _, name in Store(root, manifest).names()}
        names = [name for name in list_pictures(images) if name not in held]
        if not names:
            _clean(root, manifest)
            return Summary.of(manifest, 0)
        vectors = (manifest.images + len(names)) * manifest.queries
        candidates.check_kind(manifest.kind, vectors, manifest.width)
        return _extend(
            root,
            manifest,
            names,
            encoder,
            options or BuildOptions(),
            old=manifest,
            what="add",
            source=_absolute(images),
        )


def delete_images(out: str | os.PathLike[str], patterns: Sequence[str]) -> Summary:
    """Delete the images that `patterns` mean, names or patterns of a shell, see `find_rows`.

    Raises InputError when one of them fits no image, and then deletes nothing.
    """
    root = Path(out)
    with changing(root) as manifest:
        store = Store(root, manifest)
        found = find_rows(store.names(), patterns)
        if not all(found):
            raise InputError(f"'{patterns[found.index([])]}' fits no image of '{root}'")
        rows = sorted({row for several in found for row in several})
        store.alive[rows] = False
        path = f"deleted-{fresh_name()}.npy"
        with atomic_file(root / path) as temporary, temporary.open("wb") as file:
            np.save(file, (~store.alive).nonzero()[:, 0].numpy())
        deleted = int((~store.alive).sum())
        manifest = replace(manifest, deleted=FileSum.of(root, path), num_deleted=deleted)
        manifest.save(root)
        _clean(root, manifest)
        return Summary.of(manifest, len(rows))


def compact_index(out: str | os.PathLike[str]) -> Summary:
    """Write the index again without its deleted images, from its vectors: nothing is encoded.

    Where too few images are left to train its kind on, it is of kind auto from then on, and a line says so.

    Raises DataError when an `add` is unfinished.
    """
    root = Path(out)
    with changing(root) as manifest:
        _clean(root, manifest)
        if (root / BUILDING).exists():
            raise DataError(
                f"'{root}' has an unfinished add or build: finish it first, by the same command, or remove "
                f"'{root / BUILDING}', and what it has encoded with it"
            )
        store, before = Store(root, manifest), manifest.images
        names = [name for _, name in store.names()]
        kind = _kind_of_the_rest(manifest, len(names) * manifest.queries)
        part = write_part(root, names, lambda target: _write_living(store, target))
        manifest = replace(manifest, kind=kind, parts=(part,), deleted=None, num_deleted=0, candidates=None)
        manifest = _with_candidates(root, manifest, None)
        manifest.save(root)
        _clean(root, manifest)
        return Summary.of(manifest, before - len(names))


def _kind_of_the_rest(manifest: Manifest, vectors: int) -> str:
    """The index's kind; auto where its kind can't be trained on the vectors that are left."""
    # An index without images isn't trained, and may be filled again.
    if not vectors or vectors >= (least := candidates.least_vectors(manifest.kind, vectors, manifest.width)):
        return manifest.kind
    logger.warning(
        "'%s' is trained on at least %d vectors, and %d are left: the index is of --kind auto now, %s",
        manifest.kind,
        least,
        vectors,
        candidates.choose_factory("auto", vectors, manifest.width) or "which is exact search",
    )
    return "auto"


def _make_folder(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"'{root}' can't be an index's folder: there is a file of that name") from error


@contextlib.contextmanager
def changing(root: Path) -> Iterator[Manifest]:
    """The manifest of an index that this process alone changes; DataError where there is none."""
    load_manifest(root)  # first: the lock leaves a file, which a folder that is no index shouldn't get
    with locked(root):
        yield load_manifest(root)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """One process at a time changes an index; DataError for a second one. A killed process holds nothing."""
    with locks.held(
        root / ".lock",
        what=f"is changing the index '{root}'",
        refused=lambda busy: DataError(f"{busy}; wait for it to end"),
        wait=False,
    ):
        yield


def _extend(
    root: Path,
    manifest: Manifest,
    names: Sequence[str],
    encoder: Encoder,
    options: BuildOptions,
    *,
    old: Manifest | None,
    what: str,
    source: str,
) -> Summary:
    """Encode `names`, add them to `manifest` as a part, and put that in the place of `old`."""
    if old:
        _forget_if_done(root, old)
    header = {
        "command": what,
        "images": source,
        "model": f"{encoder.identity['model']} {encoder.identity['fingerprint']}",
        "dtype": manifest.dtype,
        "parts": [part.name for part in old.parts] if old else [],
    }
    shape = (manifest.queries, manifest.width)
    with Journal(root, header, shape=shape, dtype=DTYPES[manifest.dtype]) as journal:
        speed = encode_pictures(
            encoder, names, journal, batch_size=options.batch_size, num_workers=options.num_workers
        )
        if not journal.names:
            return _without_new_pictures(root, manifest, journal, speed)
        part = journal.finish()
    manifest = replace(manifest, parts=(*manifest.parts, part))
    texts = encoder.encode_texts(options.texts) if options.texts else None
    manifest = _with_candidates(root, manifest, texts)
    manifest.save(root)
    journal.remove()
    _clean(root, manifest)
    return Summary.of(manifest, part.images, unreadable=len(journal.unreadable), speed=speed)


def _without_new_pictures(root: Path, manifest: Manifest, journal: Journal, speed: float) -> Summary:
    """An index stays as it is where none of the pictures can be read; DataError where there is nothing in it."""
    journal.remove()
    if not manifest.images:
        raise DataError(
            f"none of the {len(journal.unreadable)} pictures can be read; the first: {_first_problem(journal)}"
        )
    _clean(root, manifest)
    return Summary.of(manifest, 0, unreadable=len(journal.unreadable), speed=speed)


def _with_candidates(root: Path, manifest: Manifest, texts: Tensor | None) -> Manifest:
    """The manifest with an approximate index over all its vectors, if it is to have one.

    An index that exists is added to, unless there are more than twice the images that it was trained on.
    """
    store = Store(root, manifest)
    factory = candidates.choose_factory(manifest.kind, len(store) * manifest.queries, manifest.width)
    if factory is None or not bool(store.alive.any()):
        return replace(manifest, candidates=None)
    old = manifest.candidates
    if old and len(store) <= 2 * old.trained_on:
        index = CandidateIndex.of_entry(root, old)
        index.add(store)
    else:
        logger.info("training the index %s on %d vectors", factory, len(store) * manifest.queries)
        index = CandidateIndex.train(store, factory)
    queries = texts if texts is not None else candidates.draw_queries(store)
    recall = candidates.tune(index, store, queries, target=manifest.target)
    picture_recall = candidates.measure_recall(index, store, candidates.draw_pictures(store))
    for found, kind in ((recall, "a text's"), (picture_recall, "a picture's")):
        if found < manifest.target:
            logger.warning(
                "the index finds %.4f of %s exact first 100, not %s; `index search --exact` and --kind flat are exact",
                found,
                kind,
                manifest.target,
            )
    path = f"candidates-{fresh_name()}.faiss"
    with atomic_file(root / path) as temporary:
        index.save(temporary)
    entry = Candidates(
        index.factory,
        FileSum.of(root, path),
        vectors=len(store) * manifest.queries,
        trained_on=index.trained_on,
        nprobe=index.setting.nprobe,
        oversample=index.setting.oversample,
        recall=recall,
        picture_recall=picture_recall,
    )
    return replace(manifest, candidates=entry)


def _forget_if_done(root: Path, manifest: Manifest) -> None:
    """Remove a journal whose images are in the index: its process was killed between the two."""
    begun_on = Journal.parts_of(root)
    if begun_on is not None and begun_on != [part.name for part in manifest.parts]:
        shutil.rmtree(root / BUILDING, ignore_errors=True)


def _clean(root: Path, manifest: Manifest) -> None:
    """Remove what no manifest names any more."""
    _forget_if_done(root, manifest)
    remove_leftovers(root)
    named = {file.path for file in manifest.files()}
    for path in [*root.glob("deleted-*.npy"), *root.glob("candidates-*.faiss")]:
        if path.name not in named:
            path.unlink()
    for folder in (root / PARTS).glob("*"):
        if folder.name not in {part.name for part in manifest.parts}:
            shutil.rmtree(folder, ignore_errors=True)


def _write_living(store: Store, target: Path) -> None:
    """The vectors of all images that aren't deleted, as they are stored."""
    with target.open("wb") as file:
        for start, images in store.blocks():
            kept = images[store.alive[start : start + len(images)]]
            file.write(kept.numpy().astype(DTYPES[store.manifest.dtype]).tobytes())


def _shape_of(encoder: Encoder) -> tuple[int, int]:
    """(Q, E) of the model's image vectors."""
    queries: Any = encoder.model.query_tokens
    return int(queries.shape[1]), int(encoder.model.vision_proj.out_features)


def _absolute(images: str | os.PathLike[str]) -> str:
    return os.path.abspath(os.path.expanduser(os.fspath(images)))


def _first_problem(journal: Journal) -> str:
    return next((f"{short_name(name)}: {reason}" for name, reason in journal.unreadable.items()), "-")

"""index.json: what an index is made of. It alone changes, at once; it names all other files, each written once.

IDX/index.json                   model, shape of the vectors, names, sizes and SHA-256 of the files below
    parts/<name>/vectors.bin     fp16 or fp32 [images, Q, E]
                 names.arrow     the images' names, a row each
    deleted-<name>.npy           rows that are no longer found
    candidates-<name>.faiss      the approximate index over all vectors, absent where search is exact
    building/                    what an unfinished build or add has encoded so far
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import DataError
from lavis_lite.common.fingerprint import file_digest
from lavis_lite.common.io import atomic_write

FORMAT = 1
MANIFEST, PARTS, BUILDING = "index.json", "parts", "building"
VECTORS, NAMES = "vectors.bin", "names.arrow"


@dataclass(frozen=True)
class FileSum:
    """A file of the index by its path within it, with its size and SHA-256."""

    path: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, root: Path, path: str) -> FileSum:
        """As the file is now."""
        return cls(path, (root / path).stat().st_size, file_digest(root / path))

    def check(self, root: Path, *, content: bool) -> None:
        """Raises DataError when the file is missing, of another size, or (`content`) of another checksum."""
        file = root / self.path
        if not file.is_file():
            raise DataError(f"'{root}': corrupt index: {self.path} is missing; build it again")
        if file.stat().st_size != self.bytes:
            raise DataError(
                f"'{root}': corrupt index: {self.path} is of another size than it was; build it again"
            )
        if content and file_digest(file) != self.sha256:
            raise DataError(f"'{root}': corrupt index: {self.path} doesn't have its checksum; build it again")


@dataclass(frozen=True)
class PartEntry:
    """Images that were added together."""

    name: str
    images: int
    files: tuple[FileSum, ...]


@dataclass(frozen=True)
class Candidates:
    """The approximate index and how it is to be asked.

    factory: faiss's description of it. vectors: how many it holds; trained_on: how many there were when it was
    trained. nprobe: cells looked into. oversample: vectors fetched for each image wanted. recall: of the exact
    first 100 images of texts, as measured when it was tuned; picture_recall: of pictures, None in an index from before
    these were measured.
    """

    factory: str
    file: FileSum
    vectors: int
    trained_on: int
    nprobe: int
    oversample: int
    recall: float
    picture_recall: float | None = None


@dataclass(frozen=True)
class Manifest:
    """index.json.

    model: what `Encoder.identity` says. queries: Q. width: E. dtype: fp16 or fp32. kind: what the user asked for,
    auto, flat or a faiss factory string. target: the recall that an approximate index is tuned to.
    """

    model: dict[str, Any]
    queries: int
    width: int
    dtype: str
    kind: str = "auto"
    target: float = 0.99
    parts: tuple[PartEntry, ...] = ()
    deleted: FileSum | None = None
    num_deleted: int = 0
    candidates: Candidates | None = None
    format: int = field(default=FORMAT)

    @property
    def images(self) -> int:
        """All images, deleted ones included."""
        return sum(part.images for part in self.parts)

    def files(self) -> list[FileSum]:
        """All files that belong to the index."""
        several = [file for part in self.parts for file in part.files]
        several += [self.deleted] if self.deleted else []
        return several + ([self.candidates.file] if self.candidates else [])

    def save(self, root: Path) -> None:
        """Replace index.json: from now on readers see this index, at every moment before the old one."""
        content = asdict(self)
        atomic_write(root / MANIFEST, json.dumps({**content, "checksum": _sum_of(content)}, indent=1) + "\n")


def load_manifest(root: Path) -> Manifest:
    """The index.json of a folder. Raises DataError when there is none, or it isn't as it was written."""
    try:
        content = json.loads((root / MANIFEST).read_text())
    except FileNotFoundError as error:
        unfinished = (root / BUILDING).is_dir()
        raise DataError(
            f"no index at '{root}'"
            + (": its build was interrupted; run the same `index build` again to go on" if unfinished else "")
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"'{root}': corrupt index: {MANIFEST} can't be read ({error}); build it again"
        ) from error
    checksum = content.pop("checksum", None) if isinstance(content, dict) else None
    if checksum != _sum_of(content):
        raise DataError(f"'{root}': corrupt index: {MANIFEST} doesn't have its checksum; build it again")
    if content["format"] != FORMAT:
        raise DataError(
            f"'{root}': an index of format {content['format']}, this version reads {FORMAT}; build it again"
        )
    return _parse(content)


def _parse(content: dict[str, Any]) -> Manifest:
    parts = tuple(
        PartEntry(part["name"], part["images"], tuple(FileSum(**file) for file in part["files"]))
        for part in content.pop("parts")
    )
    deleted, candidates = content.pop("deleted"), content.pop("candidates")
    return Manifest(
        **content,
        parts=parts,
        deleted=FileSum(**deleted) if deleted else None,
        candidates=Candidates(**{**candidates, "file": FileSum(**candidates["file"])})
        if candidates
        else None,
    )


def fresh_name() -> str:
    """A name that no file of the index had before: what it names is never written to again."""
    return uuid.uuid4().hex[:12]


def _sum_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

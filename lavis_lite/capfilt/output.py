"""What CapFilt writes: for each piece of the input a tar shard, and a manifest that makes it count.

<out>/settings.json            what was asked, of which inputs; every process checks its own against it
      000000.tar               key.jpg and key.json: {"captions", "scores", "source", ...}, best first
      000000.jsonl             for pictures of a folder: the same as annotations of that folder
      000000.json              the manifest: counts, sizes and sha256; written last, so what it names is whole
      000000.failed            in its place, of a piece that can't be read: why, and how often that was tried
      annotations.jsonl        all of the .jsonl files, once everything is done
      summary.json report.html
      claims/ workers/         who does what now; how fast each was
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image
from webdataset import TarWriter

from lavis_lite.capfilt.inputs import Item
from lavis_lite.capfilt.selection import Scored
from lavis_lite.capfilt.tally import Tally
from lavis_lite.common.errors import DataError
from lavis_lite.common.fingerprint import file_digest
from lavis_lite.common.io import TEMPORARY, atomic_file, atomic_write

# Equal work must give equal bytes, whenever it is done.
MTIME = 0
JPEG_MAGIC = b"\xff\xd8\xff"
# So often, by whomever, a piece that can't be read is tried before it is given up.
ATTEMPTS = 3


@dataclass(frozen=True)
class Failure:
    """A piece that couldn't be read: its name in the input, why, and how often that was tried."""

    source: str
    reason: str
    attempts: int

    @property
    def final(self) -> bool:
        """Whether it is given up."""
        return self.attempts >= ATTEMPTS


class Output:
    """The folder of one CapFilt.

    tars, annotations: which of the two files a piece gets.
    """

    def __init__(self, folder: Path, *, tars: bool, annotations: bool) -> None:
        self.folder = folder
        self.tars = tars
        self.annotations = annotations

    def manifest_path(self, name: str) -> Path:
        """Where the manifest of a piece is."""
        return self.folder / f"{name}.json"

    def manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest of a finished piece; None when it isn't, or a file that it names is gone or cut."""
        try:
            manifest: dict[str, Any] = json.loads(self.manifest_path(name).read_text(encoding="utf-8"))
            files = manifest["files"].items()
            whole = all((self.folder / file).stat().st_size == about["bytes"] for file, about in files)
        except (OSError, ValueError, KeyError):
            return None
        return manifest if whole else None

    def failure_path(self, name: str) -> Path:
        """Where it is told why a piece can't be read."""
        return self.folder / f"{name}.failed"

    def failure(self, name: str) -> Failure | None:
        """Why a piece couldn't be read, so far; None when nobody has failed at it."""
        try:
            return Failure(**json.loads(self.failure_path(name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def failures(self, names: Iterable[str]) -> dict[str, Failure]:
        """Those of the pieces that are given up, with why; a piece that is finished is none of them."""
        found = {name: self.failure(name) for name in names}
        return {
            name: failure
            for name, failure in found.items()
            if failure is not None and failure.final and self.manifest(name) is None
        }

    def note_failure(self, name: str, source: str, reason: str) -> Failure:
        """Tell all processes that a piece couldn't be read; for the one that holds its claim."""
        before = self.failure(name)
        failure = Failure(source, reason, 1 + (before.attempts if before else 0))
        atomic_write(self.failure_path(name), json.dumps(asdict(failure), indent=1) + "\n")
        return failure

    def forget_failure(self, name: str) -> None:
        """A piece may be tried again, or was read after all."""
        self.failure_path(name).unlink(missing_ok=True)

    def is_over(self, name: str) -> bool:
        """Whether nothing is left to do for a piece: it is finished, or given up."""
        if self.manifest(name) is not None:
            return True
        failure = self.failure(name)
        return failure is not None and failure.final

    def remove_leftovers(self, name: str) -> None:
        """Remove what a process that was killed over a piece left."""
        for path in self.folder.glob(f"{TEMPORARY}{name}.*"):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def piece(self, name: str) -> Iterator[PieceWriter]:
        """Write a piece's files; they and the manifest appear when the block ends without an error."""
        with contextlib.ExitStack() as files:
            opened: dict[str, IO[bytes]] = {}
            for suffix, wanted in (("tar", self.tars), ("jsonl", self.annotations)):
                if wanted:
                    temporary = files.enter_context(atomic_file(self.folder / f"{name}.{suffix}"))
                    opened[f"{name}.{suffix}"] = files.enter_context(temporary.open("wb"))
            writer = PieceWriter(opened)
            files.callback(writer.abandon)
            yield writer
            writer.close()
            described = {file: _described(handle) for file, handle in opened.items()}
        manifest = {
            "input": writer.source,
            "damage": writer.damage,
            "files": described,
            "tally": asdict(writer.tally),
        }
        atomic_write(self.manifest_path(name), json.dumps(manifest, indent=1) + "\n")
        self.forget_failure(name)


class PieceWriter:
    """Takes a piece's pictures with their captions. source, damage: what the manifest says of the input."""

    def __init__(self, files: dict[str, IO[bytes]]) -> None:
        self.tally = Tally()
        self.source = ""
        self.damage: str | None = None
        by_suffix = {file.rpartition(".")[2]: handle for file, handle in files.items()}
        self._tar = TarWriter(by_suffix["tar"], mtime=MTIME, encoder=False) if "tar" in by_suffix else None
        self._lines = by_suffix.get("jsonl")
        self._keys: set[str] = set()

    def add(self, item: Item, picture: Image.Image, scored: Sequence[Scored], keep: int) -> None:
        """Write a picture with its best captions; a key that was written before gets a number behind it."""
        key = self._new_key(item.key)
        kept = list(scored[:keep])
        made = {
            "captions": [entry.text for entry in kept],
            "scores": [entry.score for entry in kept],
            "source": [entry.source for entry in kept],
        }
        about = {**made, **item.about, **made}  # these first, and in the place of fields with their names
        line = json.dumps(about, ensure_ascii=False).encode()
        if self._tar is not None:
            self._tar.write({"__key__": key, "jpg": _jpeg(item.content or b"", picture), "json": line})
        if self._lines is not None:
            self._lines.write(line + b"\n")
        self.tally.add(key, scored, kept)

    def _new_key(self, key: str) -> str:
        # Readers of webdataset take neighbours with the same key for one sample, and fail.
        tries = itertools.chain([key], (f"{key}_{number}" for number in itertools.count(2)))
        new = next(name for name in tries if name not in self._keys)
        self._keys.add(new)
        return new

    def close(self) -> None:
        """Write the end of the tar."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def abandon(self) -> None:
        """Let go of a tar that was not closed, or its destructor would write to a closed file."""
        if self._tar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._tar.close()


def _jpeg(content: bytes, picture: Image.Image) -> bytes:
    """A picture's own bytes when they are JPEG, else the picture as JPEG with full-resolution colour."""
    if content.startswith(JPEG_MAGIC):
        return content
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _described(handle: IO[bytes]) -> dict[str, Any]:
    handle.flush()
    path = Path(handle.name)
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def refused(error: OSError, folder: Path, done: int) -> DataError:
    """What to tell when the output can't be written."""
    return DataError(
        f"can't write to '{error.filename or folder}': {error.strerror or error}; {done} shards are done and stay; "
        "make room, or make the folder writable, and give the same command again"
    )
